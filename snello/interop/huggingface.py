"""Export to the folder that Transformers loads: plain numbers, Hugging Face names and config, its own tokenizer files.

Lean weights are dequantized into the plain basis. The names are the inverse of the table that reading uses, so what
goes out comes in again; a config that would not describe the model is refused. The folder is written beside its place,
read back in a fresh process, compared value by value (and logit by logit, where Transformers is installed), then
renamed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models.families import FAMILIES
from snello.models.families.convolutions import FAMILIES_WITH, convolving_layers
from snello.models.families.family import Names, names_for
from snello.models.families.resolve import spec_from_config
from snello.models.files import read_json_if_there
from snello.models.model import Model
from snello.models.plain_folder import stated_config
from snello.models.quantized import KEYS as QUANTIZED
from snello.models.spec import Format, Spec
from snello.models.stored_tensors import stored_tensors
from snello.models.tensor_writer import DType, Floats, write_shards
from snello.models.tokenizer import TOKENIZER_FILES, copy_tokenizer_files
from snello.optimize.files import check_exchangeable, publish_folder

TORCH_NAMES: Mapping[DType, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SMALL_FILES = ("generation_config.json", "sentence_bert_config.json")
POOLING_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """`proof`: what the fresh process compared, in words."""

    path: Path
    num_bytes: int
    proof: str


def export(
    model: Model, path: Path, *, dtype: DType = "fp32", shard_bytes: int = 5_000_000_000, overwrite: bool = False
) -> Exported:
    """Writes `path`, a folder for Transformers, and proves it by a round trip.

    Raises:
        SnelloError: the folder exists or would take something else with it, a number does not fit `dtype`, or the round
            trip differs.
        Unsupported: no Hugging Face config can say what this model is.
    """
    if path.exists() and not overwrite:
        raise SnelloError(f"{path} is there already", "--overwrite replaces it")
    check_exchangeable(path, [model.path])
    config = hf_config(model, dtype)
    staged = path.with_name(f".{path.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        shapes, values = hf_tensors(model)
        num_bytes = write_shards(staged, shapes, values, dtype, shard_bytes)
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _small_files(model, staged)
        proof = round_trip(staged, model, dtype)
        publish_folder(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Exported(path=path, num_bytes=num_bytes, proof=proof)


# ---- the configuration ----------------------------------------------------------------------------------------------


def hf_config(model: Model, dtype: DType) -> dict[str, Any]:
    """The config.json of the export: the source's own, if it still describes this model."""
    spec = model.spec
    if any(form.skip for _, form in spec.formats):
        hint = "export the model that `skip` was applied to"
        raise Unsupported(f"{model.name} skips small inputs, which a Hugging Face config cannot say", hint)
    if convolving_layers(spec) and spec.family in FAMILIES_WITH:
        hint = "run it with snello; a plain folder of `apply convolution` holds its weights in safetensors"
        raise Unsupported(f"{model.name} convolves, which no Hugging Face {spec.family} config can say", hint)
    if spec.family not in FAMILIES:
        raise Unsupported(f"{model.name} is of a family of its own", "run it with snello, which reads its own folder")
    left_out = ("dtype", "torch_dtype", *QUANTIZED)
    config = {key: value for key, value in stated_config(model).items() if key not in left_out}
    architectures = FAMILIES[spec.family].architectures
    named = [name for name, task in architectures.items() if task == spec.task]
    config |= {"architectures": named[:1], "torch_dtype": TORCH_NAMES[dtype]}
    described = spec_from_config(config, task=spec.task, generation=model.generation)
    if skeleton(described) != skeleton(spec):
        ours, theirs = skeleton(spec), skeleton(described)
        differing = [f.name for f in dataclasses.fields(Spec) if getattr(ours, f.name) != getattr(theirs, f.name)]
        hint = f"these differ: {', '.join(differing)}; run it with snello, which reads its own folder"
        raise Unsupported(f"a Hugging Face {spec.family} config cannot say what {model.name} has become", hint)
    return config


def skeleton(spec: Spec) -> Spec:
    """What must be the same on both sides of an export: all but formats, pooling (a file of its own) and length."""
    head = dataclasses.replace(spec.head, pooling=None, normalize=False)
    plain = Format(weights="fp32")
    return dataclasses.replace(spec, formats=(), default_format=plain, cache_format="fp32", head=head, max_positions=0)


# ---- the weights ----------------------------------------------------------------------------------------------------


def hf_tensors(model: Model) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Floats]]:
    """Shapes of all tensors by their Hugging Face names, and how to get the values of one."""
    tensors = stored_tensors(model.spec, hf_names(model.spec))
    return tensors.shapes, lambda name: tensors.values(name, model.weights.values)


def hf_names(spec: Spec) -> Names:
    """Checkpoint names; a model without a head is saved without the base prefix, as Transformers does."""
    return names_for(FAMILIES[spec.family], spec, has_base=spec.head.kind != "embed")


# ---- the files beside -----------------------------------------------------------------------------------------------


def _small_files(model: Model, folder: Path) -> None:
    copy_tokenizer_files(model.path, folder)
    for name in SMALL_FILES:
        if (model.path / name).exists():
            shutil.copyfile(model.path / name, folder / name)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        model.tokenizer.save(folder)
    if model.spec.head.kind == "embed":
        _sentence_files(model.spec, folder)


def _sentence_files(spec: Spec, folder: Path) -> None:
    """What makes the folder one for sentence-transformers: modules.json and the pooling's config."""
    names = ["Transformer", "Pooling"] + (["Normalize"] if spec.head.normalize else [])
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    pooling = {"word_embedding_dimension": spec.hidden_size}
    modes = {mode: kind == spec.head.pooling for kind, mode in POOLING_MODES.items()}
    (folder / "1_Pooling").mkdir()
    lengths = read_json_if_there(folder / "sentence_bert_config.json") | {"max_seq_length": spec.max_positions}
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {**pooling, **modes}),
        ("sentence_bert_config.json", lengths),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- the round trip -------------------------------------------------------------------------------------------------


def round_trip(folder: Path, model: Model, dtype: DType) -> str:
    """Reads the folder in a fresh Python process and compares; returns what was compared."""
    command = [sys.executable, "-m", "snello.interop.round_trip", str(folder), str(model.path), model.spec.task, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (lines or done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise SnelloError(
            f"the export does not read back as this model: {reason}", "nothing was left; please report it"
        )
    return lines[-1]

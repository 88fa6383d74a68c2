"""The plain folder: an ordinary checkpoint, written so that Transformers and `load` both open it.

It is what a technique leaves that changes shapes but not number formats. config.json is the source's own with the new
shapes written over it, and must describe the result before a weight is read; snello_history.json beside it keeps the
steps that were applied, which no config has a place for. Written beside its place and renamed, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models import stories
from snello.models.families import FAMILIES, convolutions, lfm2
from snello.models.families.family import names_for
from snello.models.families.resolve import spec_from_config
from snello.models.families.sentence import copy_sentence_files, is_sentence_folder, read_sentence_folder
from snello.models.files import read_json
from snello.models.lean import move_into_place
from snello.models.model import Floats, Model
from snello.models.packed_writer import cannot_write
from snello.models.parameters import matrix_names
from snello.models.quantized import KEYS as QUANTIZED
from snello.models.spec import Attention, FloatFormat, Spec
from snello.models.stored_tensors import stored_tensors
from snello.models.tensor_writer import write_shards
from snello.models.tokenizer import copy_tokenizer_files

HISTORY = "snello_history.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CONFIG, INDEX, SHARD_BYTES = "config.json", "model.safetensors.index.json", 5_000_000_000
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WIDTH_KEYS = {  # others: intermediate_size, num_hidden_layers
    "distilbert": ("hidden_dim", "n_layers"),
    "gpt2": ("n_inner", "n_layer"),
    "opt": ("ffn_dim", "num_hidden_layers"),
}
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")  # with num_key_value_heads
LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3_text")  # whose config says what each layer sees
HEADS_APART = ("llama", "mistral", "qwen2", "qwen3")  # whose config says head_dim, so heads and width are free


def read_history(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The steps that made this folder; none where it is somebody else's checkpoint."""
    if not (folder / HISTORY).exists():
        return ()
    steps = read_json(folder / HISTORY).get("history")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise SnelloError(f"{folder / HISTORY} holds no list of steps", "remove it, or make the folder again")
    return tuple(steps)


def shaped_config(
    source: Model,
    spec: Spec,
    edits: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The source's config.json with the shapes of `spec`, and what else a technique changed in it (`edits`).

    `generation` is the generation_config.json beside it, the source's own if none is given.

    Raises:
        Unsupported: there is none, or read back it would not describe `spec`.
    """
    config = {
        key: value
        for key, value in (convolutions.unwrap(stated_config(source))[0] | dict(edits or {})).items()
        if key not in ("dtype", "torch_dtype", *QUANTIZED)
    }
    if spec.family == lfm2.LFM2.name:
        config = lfm2.config_of(config, spec) | {"torch_dtype": TORCH_NAMES[spec.default_format.weights]}
    else:
        config = _reshaped(config, source.spec, spec)
    beside = source.generation if generation is None else generation
    described = spec_from_config(config, task=spec.task, generation=beside)
    if spec.task == "embedding" and is_sentence_folder(source.path):
        described = read_sentence_folder(source.path).applied(described)
    plain = dataclasses.replace(spec, formats=())
    if described != plain:
        fields = [f.name for f in dataclasses.fields(Spec) if getattr(described, f.name) != getattr(plain, f.name)]
        raise Unsupported(
            f"a Hugging Face {spec.family} config cannot say what {source.name} would become",
            f"these differ: {', '.join(fields)}; start from the original checkpoint",
        )
    return config


def stated_config(source: Model) -> dict[str, Any]:
    """Its config.json; of a llama2.c file the one that it would have.

    Raises:
        Unsupported: there is none.
    """
    if source.path.is_file():
        return stories.config_of(source.spec)
    if not (source.path / CONFIG).exists():
        raise Unsupported(f"{source.name} came without a config.json", "start from a Hugging Face folder")
    return read_json(source.path / CONFIG)


def _reshaped(config: dict[str, Any], source: Spec, stated: Spec) -> dict[str, Any]:
    """The config of `source` with the shapes of `stated` written over it."""
    spec = convolutions.attending(stated)
    layer = spec.layers[0]
    assert isinstance(layer.mixer, Attention)
    width, count = WIDTH_KEYS.get(spec.family, ("intermediate_size", "num_hidden_layers"))
    config |= {width: layer.feed_forward.width, count: len(spec.layers)}
    config["torch_dtype"] = TORCH_NAMES[spec.default_format.weights]
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][: len(spec.layers)]
    if spec.family != source.family:
        config |= _renamed(config, spec)
    config |= _seen(convolutions.attending(source), spec)
    if spec.family in GROUPED:
        config["num_key_value_heads"] = layer.mixer.num_kv_heads
    if spec.family in HEADS_APART:
        config |= {
            "hidden_size": spec.hidden_size,
            "num_attention_heads": layer.mixer.num_heads,
            "head_dim": layer.mixer.head_dim,
        }
    return convolutions.state(config, stated) if stated != spec else config


def _renamed(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The same weights under another family's name, which can say more of their attention."""
    architectures = FAMILIES[spec.family].architectures
    named = next(name for name, task in architectures.items() if task == spec.task)
    keys: dict[str, Any] = {"model_type": spec.family, "architectures": [named]}
    if spec.family == "longformer":
        keys |= {"max_position_embeddings": spec.embedding.learned_positions, "pad_token_id": spec.pad_token}
        keys["position_embedding_type"] = None  # Longformer has no other, and no key for it
    return keys


def _seen(source: Spec, spec: Spec) -> dict[str, Any]:
    """What says how far rows see, where that is new."""
    windows = [layer.mixer.window for layer in spec.layers if isinstance(layer.mixer, Attention)]
    if windows == [layer.mixer.window for layer in source.layers if isinstance(layer.mixer, Attention)]:
        return {}
    widest = max((window for window in windows if window is not None), default=None)
    if spec.family == "longformer":
        return {"attention_window": [2 * ((window or 1) - 1) for window in windows]}
    if spec.family in ("mistral", "phi3"):
        return {"sliding_window": widest}
    if spec.family in LAYER_TYPES:
        switch = {"use_sliding_window": widest is not None} if spec.family.startswith("qwen") else {}
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {**switch, "sliding_window": widest, "layer_types": types}
    return {}


def write_plain_folder(
    path: Path,
    spec: Spec,
    source: Model,
    history: Sequence[Mapping[str, Any]],
    values: Callable[[str], Floats],
    *,
    edits: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    small_files: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint at `path`; `values` gives each canonical parameter, asked for in the order of computation.

    Matrices keep the types of `spec`; vectors are FP32. A plain folder that was written here before is replaced.
    `edits` and `generation` as in `shaped_config`; `small_files` writes the tokenizer and generation_config.json, which
    are the source's otherwise.
    """
    config = shaped_config(source, spec, edits, generation)
    check_free(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _write_weights(beside, spec, values)
        if small_files is not None:
            small_files(beside)
        else:
            _copy_small_files(source, beside)
        for name, table in ((CONFIG, config), (HISTORY, {"history": list(history)})):
            (beside / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if spec.max_positions > source.spec.max_positions:
            _lengthen(beside / TOKENIZER_CONFIG, spec.max_positions)
        if spec.task == "embedding" and is_sentence_folder(source.path):
            copy_sentence_files(source.path, beside)
        move_into_place(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _lengthen(path: Path, positions: int) -> None:
    """Tokenizers cut texts where their own settings say that the model ends."""
    if path.exists():
        settings = read_json(path) | {"model_max_length": positions}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_small_files(source: Model, folder: Path) -> None:
    if source.path.is_file():
        return source.tokenizer.save(folder)
    copy_tokenizer_files(source.path, folder)
    if (source.path / "generation_config.json").exists():
        shutil.copyfile(source.path / "generation_config.json", folder / "generation_config.json")


def check_free(path: Path) -> None:
    """Only an absent or empty folder, or one that was written here, may be replaced."""
    if path.exists() and not path.is_dir():
        raise SnelloError(f"{path} is a file", "choose another output folder")
    if path.exists() and any(path.iterdir()) and not (path / HISTORY).exists():
        raise SnelloError(f"{path} is not empty and holds something else", "choose another output folder")


def _write_weights(folder: Path, spec: Spec, values: Callable[[str], Floats]) -> None:
    tensors = stored_tensors(spec, names_for(FAMILIES[spec.family], spec, has_base=True))
    matrices = set(matrix_names(spec))
    types: dict[str, FloatFormat] = {
        name: _type(spec, group[0]) if group[0] in matrices else "fp32" for name, (group, _) in tensors.parts.items()
    }
    write_shards(folder, tensors.shapes, lambda name: tensors.values(name, values), types, SHARD_BYTES)


def _type(spec: Spec, parameter: str) -> FloatFormat:
    weights = spec.format(parameter.removesuffix(".weight")).weights
    assert weights in ("fp32", "fp16", "bf16"), weights
    return weights

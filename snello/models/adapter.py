"""An adapter as files, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

PEFT names tensors by the modules of Transformers, so the family's own names are asked for. Beside them stands
snello_adapter.json, which PEFT does not read: the digest of the base and how the adapter was judged. An adapter of an
encoder (SEQ_CLS) holds the head that tells labels apart too, as PEFT's modules to save. One that is a learned prompt
(PROMPT_TUNING) is `soft_prompt`'s. What PEFT can say and this does not compute is refused by name. Numpy alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.arrangement import PLAIN
from snello.models.classifier import HEAD, POOLER, TASK, as_classifier
from snello.models.families import FAMILIES
from snello.models.families.family import names_for
from snello.models.files import read_json, read_json_if_there
from snello.models.lean import move_into_place
from snello.models.model import Floats, Model
from snello.models.packed_writer import cannot_write
from snello.models.parameters import parameter_shapes
from snello.models.soft_prompt import KIND as PROMPT
from snello.models.soft_prompt import TENSOR as PROMPT_TENSOR
from snello.models.soft_prompt import prompt_config, read_prompt
from snello.models.spec import Spec, linear_names, linear_shape
from snello.models.tensor_file import open_tensor_file
from snello.models.tensor_writer import write_shards

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "snello_adapter.json"
PREFIX = "base_model.model."
FACTORS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
# Settings of PEFT's LoRA that change nothing once the factors are there. Any other that says something is refused.
HARMLESS = frozenset(
    [
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules"),
        *("task_type", "use_dora", "use_rslora"),
    ]
)
LARGEST = 2**31  # of ranks and what they count
SAYS_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})
# Beginnings that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ change it, and again when PEFT loads the files.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
# Whole modules that an adapter of an encoder may hold: parts of its head, as PEFT and Transformers call them.
SAVED = frozenset(
    ["classifier", "score", "pooler", "pooler.dense", "pre_classifier", "classifier.dense", "classifier.out_proj"]
)
HINTS = {
    "init_lora_weights": "it changed the base: save it with PEFT's path_initial_model_for_weight_conversion",
    "modules_to_save": "whole modules that were trained are not read: merge it with PEFT (merge_and_unload)",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """`factors`: (A [rank, K], B [N, rank]) by canonical linear; they count `scale`. `base`: its digest, if known.

    `magnitudes` (DoRA): the lengths [N] to which the changed rows are brought, of all linears or of none.

    Of an encoder also `labels`, and `saved`: the parameters of the head that were trained whole, by canonical name.

    `prompt`: rows [N, D] before every text, instead of factors.
    """

    factors: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    rank: int = 0
    alpha: float = 0.0
    scale: float = 0.0
    dropout: float = 0.0
    base: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # how it was made and judged
    labels: tuple[str, ...] = ()
    saved: Mapping[str, Floats] = field(default_factory=dict)
    magnitudes: Mapping[str, Floats] = field(default_factory=dict)
    prompt: Floats | None = None

    def merged(self, linear: str, weight: Floats) -> Floats:
        """The weights [N, K] of a linear with it in them."""
        a, b = self.factors[linear]
        found: Floats = weight + (b @ a) * type(a[0, 0])(self.scale)
        if linear in self.magnitudes:
            lengths = np.linalg.norm(found, axis=1)
            lengths[lengths == 0] = 1  # a row of zeros stays one
            found *= (self.magnitudes[linear] / lengths)[:, None]
        return found


def module_names(spec: Spec, linears: list[str]) -> dict[str, str]:
    """Transformers' names of these linears.

    Raises:
        Unsupported: the family stores one of them together with others or turned, as GPT-2 does.
    """
    sources = names_for(FAMILIES[spec.family], spec, has_base=True).sources
    found: dict[str, str] = {}
    for linear in linears:
        source = sources[f"{linear}.weight"]
        if source.stacked or source.arrangement != PLAIN:
            hint = "adapters of models that store each linear by itself are supported (Llama, Mistral, Qwen)"
            raise Unsupported(f"{spec.family} stores {linear} as part of {source.names[0]}", hint)
        found[linear] = source.names[0].removesuffix(".weight")
    return found


def write_adapter(path: Path, adapter: Adapter, model: Model) -> None:
    """Writes the folder beside its place and renames it. `model`: the base, or the classifier that was made of it."""
    check_adapter_place(path)
    own: dict[str, Any] = {"base": adapter.base, **adapter.facts}
    if adapter.prompt is not None:
        tables = {CONFIG: prompt_config(adapter.prompt, model), OWN: own}
        return _write(path, {PROMPT_TENSOR: adapter.prompt}, tables)
    modules = module_names(model.spec, list(adapter.factors))
    tensors = {
        f"{PREFIX}{modules[linear]}.{name}.weight": values
        for linear, pair in adapter.factors.items()
        for name, values in zip(FACTORS, pair, strict=True)
    }
    tensors |= {f"{PREFIX}{modules[linear]}.{MAGNITUDE}": values for linear, values in adapter.magnitudes.items()}
    if adapter.labels:
        stored = saved_names(model.spec)
        tensors |= {f"{PREFIX}{stored[name]}": values for name, values in adapter.saved.items()}
        own["labels"] = list(adapter.labels)
    _write(path, tensors, {CONFIG: _config(adapter, model, modules), OWN: own})


def _write(path: Path, tensors: Mapping[str, Floats], tables: Mapping[str, dict[str, Any]]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_shards(beside, {n: v.shape for n, v in tensors.items()}, lambda n: tensors[n], "fp32", 1 << 62)
        (beside / "model.safetensors").rename(beside / TENSORS)
        for name, table in tables.items():
            (beside / name).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        move_into_place(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def saved_names(spec: Spec) -> dict[str, str]:
    """Transformers' names of the parameters of a classifier's head, by canonical name."""
    sources = names_for(FAMILIES[spec.family], spec, has_base=True).sources
    return {name: sources[name].names[0] for name in (*POOLER, *HEAD)}


def check_adapter_place(path: Path) -> None:
    """Only an absent or empty folder, or an adapter that was written here, may be replaced."""
    if path.exists() and not path.is_dir():
        raise SnelloError(f"{path} is a file", "choose another output folder")
    if path.exists() and any(path.iterdir()) and not (path / OWN).exists():
        raise SnelloError(f"{path} is not empty and holds something else", "choose another output folder")


def read_adapter(path: Path, model: Model) -> Adapter:
    """An adapter of this model, written here or by PEFT.

    Raises:
        SnelloError: there is none, it was made for another base, or it is damaged.
        Unsupported: it says something that is not computed here.
    """
    if not (path / CONFIG).exists():
        raise SnelloError(f"{path} holds no adapter: {CONFIG} is not there", "give the folder that PEFT or adapt wrote")
    config, own = read_json(path / CONFIG), read_json_if_there(path / OWN)
    rank, alpha = (0, 0.0) if config.get("peft_type") == PROMPT else _numbers(path, config)
    base = own.get("base")
    if base is not None and base != model.digest:
        message = f"{path} was made for another base than {model.name}"
        raise SnelloError(message, f"its base is {config.get('base_model_name_or_path') or 'unknown'}, digest {base}")
    stored = {name: tensor.float32() for name, tensor in open_tensor_file(path / TENSORS).tensors.items()}
    facts = {key: value for key, value in own.items() if key not in ("base", "labels")}
    if config.get("peft_type") == PROMPT:
        return Adapter(prompt=read_prompt(path, config, stored, model), base=base, facts=facts)
    labels = own.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise SnelloError(f"{path / OWN}: labels are {json.dumps(labels)[:80]}", "copy the adapter again")
    spec, saved = _head(path, model, stored, labels) if _classifies(config) else (model.spec, {})
    magnitudes = _magnitudes(path, spec, stored) if config.get("use_dora") else None
    return Adapter(
        factors=_factors(path, spec, rank, stored, magnitudes),
        rank=rank,
        alpha=alpha,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        base=base,
        facts=facts,
        labels=spec.head.labels,
        saved=saved,
        magnitudes=magnitudes or {},
    )


def base_of(path: Path) -> str | None:
    """The digest of the base that an adapter was made for; None: it does not say, as PEFT's do not."""
    base = read_json_if_there(path / OWN).get("base")
    return base if isinstance(base, str) else None


def _numbers(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise Unsupported(
            f"{path} is an adapter of the kind {str(config.get('peft_type'))[:40]}", "LORA and PROMPT_TUNING are read"
        )
    for name, value in config.items():
        neutral = BEGINNINGS if name == "init_lora_weights" else SAYS_NOTHING
        if name == "modules_to_save" and _classifies(config) and _saves(value):
            continue
        if name not in HARMLESS and value not in neutral:
            hint = HINTS.get(name, "merge it with PEFT (merge_and_unload), and use the model")
            raise Unsupported(f"{path / CONFIG} has {name}={repr(value)[:80]}", hint)
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not (type(rank) is int and 0 < rank <= LARGEST and type(alpha) in (int, float) and 0 < alpha <= LARGEST):
        message = f"{path / CONFIG} has r={str(rank)[:40]} and lora_alpha={str(alpha)[:40]}"
        raise SnelloError(message, "both are numbers above zero")
    for name in ("use_dora", "use_rslora"):
        if config.get(name) not in SAYS_NOTHING and config[name] is not True:
            raise SnelloError(f"{path / CONFIG} has {name}={str(config[name])[:40]}", "it is true or false")
    return rank, float(alpha)


def _saves(modules: Any) -> bool:
    return isinstance(modules, list) and all(isinstance(module, str) and module in SAVED for module in modules)


def _classifies(config: Mapping[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_CLS"


def _head(
    path: Path, model: Model, stored: dict[str, Floats], labels: list[str] | None
) -> tuple[Spec, dict[str, Floats]]:
    """The spec of the classifier that this adapter makes of `model`, and its part of the head, taken from `stored`.

    Raises:
        SnelloError: it holds no last linear, or one that does not fit.
    """
    given = model.spec if model.spec.task == TASK else as_classifier(model, ["0", "1"]).model.spec
    names = {canonical: f"{PREFIX}{name}" for canonical, name in saved_names(given).items()}
    if any(names[name] not in stored for name in HEAD):
        raise SnelloError(
            f"{path / TENSORS} holds no {names[HEAD[0]]}", "PEFT saves it with modules_to_save=classifier"
        )
    count = len(stored[names[HEAD[0]]])
    spec = as_classifier(model, labels or [f"LABEL_{number}" for number in range(count)]).model.spec
    shapes, found = parameter_shapes(spec), {}
    for canonical, name in names.items():
        if name in stored:
            found[canonical] = stored.pop(name)
            if found[canonical].shape != shapes[canonical]:
                message = f"{path / TENSORS}: {name} is {found[canonical].shape}, not {shapes[canonical]}"
                raise SnelloError(message, "it is of another base, or of other labels")
    return spec, found


def _adaptable(spec: Spec) -> dict[str, str]:
    """Transformers' names of the linears that an adapter may change."""
    body = [name for name in linear_names(spec) if name.startswith("layers.") or name == "head.pooler"]
    return module_names(spec, body)


def _magnitudes(path: Path, spec: Spec, stored: dict[str, Floats]) -> dict[str, Floats]:
    """Taken from `stored`."""
    found: dict[str, Floats] = {}
    for linear, module in _adaptable(spec).items():
        values = stored.pop(f"{PREFIX}{module}.{MAGNITUDE}", None)
        if values is None:
            continue
        if values.shape != (linear_shape(spec, linear)[0],):
            message = f"{path / TENSORS}: {MAGNITUDE} of {module} is {values.shape}"
            raise SnelloError(f"{message}, not {linear_shape(spec, linear)[:1]}", "it is of another base")
        found[linear] = values
    return found


def _factors(
    path: Path, spec: Spec, rank: int, stored: dict[str, Floats], magnitudes: Mapping[str, Floats] | None
) -> dict[str, tuple[Floats, Floats]]:
    """With `magnitudes`, every linear that is changed has one, and no other has."""
    found: dict[str, tuple[Floats, Floats]] = {}
    for linear, module in _adaptable(spec).items():
        pair = [stored.pop(f"{PREFIX}{module}.{factor}.weight", None) for factor in FACTORS]
        missing = sum(values is None for values in pair)
        if missing == 2:
            continue
        if missing:
            raise SnelloError(f"{path / TENSORS} has only one of the two factors of {module}", "copy the adapter again")
        a, b = (values for values in pair if values is not None)
        outputs, inputs = linear_shape(spec, linear)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            shapes = f"{a.shape} and {b.shape}, not {(rank, inputs)} and {(outputs, rank)}"
            raise SnelloError(f"{path / TENSORS}: the factors of {module} are {shapes}", "it is of another base")
        found[linear] = (a, b)
    if magnitudes is not None and (alone := sorted(magnitudes.keys() ^ found.keys())):
        which = _adaptable(spec)[alone[0]]
        raise SnelloError(f"{path / TENSORS} has only a part of what changes {which}", "copy the adapter again")
    if stored or not found:
        odd = sorted(stored)[0] if stored else "nothing"
        hint = "it is of another base, or corrects more than the linears of blocks"
        raise SnelloError(f"{path / TENSORS} holds {odd}, which this model has no place for", hint)
    return found


def _config(adapter: Adapter, model: Model, modules: Mapping[str, str]) -> dict[str, Any]:
    """A decoder's linears are named by their last word, which is theirs alone; an encoder has many of one name."""
    targets = modules.values() if adapter.labels else {name.rpartition(".")[2] for name in modules.values()}
    kept = {saved_names(model.spec)[name].rpartition(".")[0] for name in adapter.saved} if adapter.labels else set()
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.labels else "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": bool(adapter.magnitudes),
        "use_rslora": not math.isclose(adapter.scale, adapter.alpha / adapter.rank),
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": sorted(name.removeprefix(FAMILIES[model.spec.family].base) for name in kept) or None,
    }

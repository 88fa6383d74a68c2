"""A sentence-transformers folder: an encoder, a pooling and perhaps a normalization, listed in modules.json.

It owns what those small files may say. Modules that would change the embedding (a dense layer, weighted pooling, a
prompt put before every text) are refused rather than left out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snello.errors import SnelloError, Unsupported
from snello.models.files import read_json, read_json_if_there
from snello.models.spec import Spec

MODULES = "modules.json"
POOLINGS: dict[str, Literal["mean", "cls", "last"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class SentenceFolder:
    """What the folder says besides the encoder itself."""

    encoder: Path
    pooling: Literal["mean", "cls", "last"]
    normalize: bool
    max_positions: int | None

    def applied(self, spec: Spec) -> Spec:
        head = dataclasses.replace(spec.head, pooling=self.pooling, normalize=self.normalize)
        positions = min(spec.max_positions, self.max_positions or spec.max_positions)
        return dataclasses.replace(spec, head=head, max_positions=positions)


def copy_sentence_files(source: Path, target: Path) -> None:
    """Modules, pooling and settings of one folder into another; its encoder lies in the folder itself."""
    paths = [Path(MODULES), Path("sentence_bert_config.json"), Path("config_sentence_transformers.json")]
    paths += [Path(path) / "config.json" for _, path in _modules(source) if path]
    for path in paths:
        if (source / path).exists():
            (target / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / path, target / path)


def is_sentence_folder(folder: Path) -> bool:
    return (folder / MODULES).exists()


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Reads modules.json and the files it points to."""
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Unsupported(
            f"{folder / MODULES} lists {', '.join(kinds)}", "supported: Transformer, Pooling, and Normalize or not"
        )
    paths = dict(modules)
    encoder = folder / paths["Transformer"]
    settings = read_json_if_there(encoder / "sentence_bert_config.json")
    if settings.get("do_lower_case"):
        raise Unsupported(f"{encoder}: do_lower_case is not supported", "set it in the tokenizer's normalizer")
    prompts = read_json_if_there(folder / "config_sentence_transformers.json")
    if prompts.get("default_prompt_name"):
        raise Unsupported(f"{folder}: a default prompt is put before every text", "set default_prompt_name to null")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        message = f"{encoder}: max_seq_length is {json.dumps(length)}"
        raise SnelloError(message, "give a whole number above zero in sentence_bert_config.json, or remove it")
    return SentenceFolder(encoder, _pooling(folder / paths["Pooling"]), "Normalize" in kinds, length)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class name, path) of each module."""
    try:
        listed = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder / MODULES} is not a list of modules: {error}"
        raise SnelloError(message, "copy or download the file again") from None


def _pooling(folder: Path) -> Literal["mean", "cls", "last"]:
    config = read_json(folder / "config.json")
    chosen = _modes(config)
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise Unsupported(
            f"{folder}: pooling {', '.join(chosen) or 'unknown'}", "supported: mean, cls, last token, one alone"
        )
    return POOLINGS[chosen[0]]


def _modes(config: Mapping[str, Any]) -> list[str]:
    """Switched-on modes; newer folders name one in `pooling_mode`."""
    named = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    mode = config.get("pooling_mode")
    if mode is not None:
        return [named.get(str(mode), str(mode))]
    return [key for key, value in config.items() if key.startswith("pooling_mode_") and value]

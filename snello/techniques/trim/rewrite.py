"""The tokenizer's and the configs' files with new ids: every place that names a token by its number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snello.models.files import read_json, read_json_if_there
from snello.techniques.trim.vocabulary import Vocabulary, pair_of

LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")
COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
UNSAID = ("bos_token_id", "eos_token_id", "pad_token_id")  # a class's own default may be an id that is gone

New = Mapping[int, int]


def names_tokens(key: str) -> bool:
    """Whether this key of a config holds token ids."""
    return key.endswith(("_token_id", "_token_ids")) or key in LISTS


def ids_in(value: Any) -> set[int]:
    """All numbers of a value, however nested."""
    if isinstance(value, list):
        return set[int]().union(*(ids_in(item) for item in value))
    return {value} if type(value) is int else set()


def named_in(config: Mapping[str, Any]) -> set[int]:
    """Ids that a config names."""
    return set[int]().union(*(ids_in(value) for key, value in config.items() if names_tokens(key)))


def renumbered(config: Mapping[str, Any], new: New) -> dict[str, Any]:
    """A config with new ids. An id that was no token before (-1, or beyond the vocabulary) is left out."""
    return {key: _mapped(value, new) if names_tokens(key) else value for key, value in config.items()}


def _mapped(value: Any, new: New) -> Any:
    if isinstance(value, list):
        return [_mapped(item, new) for item in value if type(item) is not int or item in new]
    return new.get(value) if type(value) is int else value


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


def tokenizer_table(vocabulary: Vocabulary, new: New) -> dict[str, Any]:
    """tokenizer.json of the tokens that stay."""
    table = dict(vocabulary.table)
    table["model"] = _model(vocabulary, new)
    added = [{**token, "id": new[token["id"]]} for token in table.get("added_tokens") or ()]
    table["added_tokens"] = sorted(added, key=lambda token: token["id"])
    table["post_processor"] = _processor(table.get("post_processor"), new)
    return table


def _model(vocabulary: Vocabulary, new: New) -> dict[str, Any]:
    model = dict(vocabulary.model)
    ids = {token: new[number] for token, number in vocabulary.ids.items() if number in new}
    if vocabulary.kind == "Unigram":
        model["vocab"] = _pieces(vocabulary, new)
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
        return model
    model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    if vocabulary.kind == "BPE":
        model["merges"] = [merge for merge in model["merges"] if _whole(pair_of(merge), ids)]
    return model


def _whole(pair: tuple[str, str], ids: Mapping[str, int]) -> bool:
    return pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids


def _pieces(vocabulary: Vocabulary, new: New) -> list[list[Any]]:
    """Unigram's ids are places in its list; where an added token lies between, its text fills the place."""
    old = {number: place for place, number in new.items()}
    texts = {token["id"]: token["content"] for token in vocabulary.table.get("added_tokens") or ()}
    listed, lowest = vocabulary.model["vocab"], min(score for _, score in vocabulary.model["vocab"])
    last = max(new[number] for number in new if number < len(listed))
    places = [old[place] for place in range(last + 1)]
    return [
        listed[number] if number < len(listed) else [texts.get(number, f"<unused {number}>"), lowest]
        for number in places
    ]


def named_beside(table: Mapping[str, Any], settings: Mapping[str, Any]) -> set[int]:
    """Ids that a tokenizer's post-processor names, and tokenizer_config.json: added tokens mostly, but not always."""
    return _processed(table.get("post_processor")) | {int(key) for key in settings.get("added_tokens_decoder") or ()}


def _processed(processor: Any) -> set[int]:
    if isinstance(processor, list):
        return set[int]().union(*map(_processed, processor))
    if not isinstance(processor, dict):
        return set()
    found = set[int]()
    for key, value in processor.items():
        named = key == "ids" or (key in ("sep", "cls") and isinstance(value, list))
        found |= ids_in(value) if named else _processed(value)
    return found


def _processor(processor: Any, new: New) -> Any:
    """Post-processors name tokens as `ids` of a template, or as `sep` and `cls` pairs."""
    if isinstance(processor, list):
        return [_processor(item, new) for item in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {}
    for key, value in processor.items():
        if key in ("sep", "cls") and isinstance(value, list):
            changed[key] = [value[0], new[value[1]]]
        elif key == "ids":
            changed[key] = [new[number] for number in value]
        else:
            changed[key] = _processor(value, new)
    return changed


# ---- files ----------------------------------------------------------------------------------------------------------


def write_tokenizer(source: Path, folder: Path, table: Mapping[str, Any], new: New, special: Mapping[str, str]) -> None:
    """tokenizer.json with its settings; files of the older kinds (vocab.txt, merges.txt) say nothing beside it."""
    text = json.dumps(table, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = read_json_if_there(source / "tokenizer_config.json") or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    decoder = settings.get("added_tokens_decoder")
    if decoder:
        settings["added_tokens_decoder"] = {str(new[int(key)]): value for key, value in decoder.items()}
    _write(folder / "tokenizer_config.json", settings)
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "generation_config.json").exists():
        _write(folder / "generation_config.json", renumbered(read_json(source / "generation_config.json"), new))


def _write(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Text to token ids and back, with the checkpoint's own tokenizer.

It owns which files make a tokenizer (tokenizer.json; else a GPT-2 vocabulary with merges, or a BERT word list),
which special tokens it has and adds, its chat template, and a decoder for streams that never splits a character.
The package `tokenizers` does the work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from snello.errors import SnelloError
from snello.models import chat
from snello.models.files import read_json_if_there

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates"  # a folder; each file is a template of its name
_CONVERT = "convert it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
REPLACEMENT = "\ufffd"  # what incomplete UTF-8 decodes to
LONGEST_CHARACTER = 4  # bytes, so also tokens
WINDOW, LONGEST_WINDOW = 8, 64  # tokens that a stream decodes again
BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
WORD_PIECE_CLASSES = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
BERT_SPECIAL = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip

MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the settings beside it. `special_tokens` holds texts by name ("bos_token", ...)."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    name: str = "this model"

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids; special tokens are added as the checkpoint says.

        Raises:
            SnelloError: the text holds half of a surrogate pair, which is how Python keeps a byte that is not UTF-8.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        except TypeError:
            place = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if place is None:
                raise
            hint = "convert it to UTF-8, for example: iconv -f latin1 -t utf-8"
            raise SnelloError(f"the text is not UTF-8 (character {place})", hint) from None
        return ids

    def encode_pair(self, text: str, pair: str, add_special: bool = True) -> tuple[list[int], list[int]]:
        """Token ids and token types of two texts in one row, for encoders."""
        encoded = self.backend.encode(text, pair, add_special_tokens=add_special)
        return encoded.ids, encoded.type_ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self, context: Sequence[int] = (), skip_special: bool = True) -> StreamDecoder:
        """A decoder to feed one token at a time; `context` are ids before them, whose text is not given again."""
        return StreamDecoder(self, context, skip_special)

    @property
    def vocab_size(self) -> int:
        """Tokens that this tokenizer knows, added ones included; a model's vocabulary may be padded beyond."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides which tokens a text becomes."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def mask_token(self) -> int | None:
        """The token that hides a word from an encoder, if there is one."""
        return next((found for name in MASKS if (found := self.token_id(name)) is not None), None)

    def token_id(self, token: str) -> int | None:
        number: int | None = self.backend.token_to_id(token)
        return number

    def prompt(self, messages: Sequence[chat.Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text that the checkpoint's chat template makes of these messages."""
        name = "tool_use" if variables.get("tools") and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            hint = "give plain text, or a model tuned for chat (often named -Instruct or -Chat)"
            raise SnelloError(f"{self.name} has no chat template", hint)
        return chat.render(
            self.chat_templates[name],
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            **variables,
        )

    def chat(self, messages: Sequence[chat.Message], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of a chat; the template writes the special tokens itself."""
        prompt = self.prompt(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(prompt, add_special=False)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json; Transformers loads them too."""
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_templates.keys() == {"default"}:
            config["chat_template"] = self.chat_templates["default"]
        elif self.chat_templates:
            config["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_templates.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class StreamDecoder:
    """Text of a growing sequence, piece by piece: only complete characters come out.

    A token may hold part of a character, and how a token reads can depend on the one before it. So a short window is
    decoded again with each token. What is new in its text is given, but for a tail that may be an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._window = list(context)[-WINDOW:]
        self._given = len(self._text())  # characters of the window's text that are out
        self._whole = len(self._window)  # tokens of the window that ended with a complete character

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._window.append(token)
        text = self._text()
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        held = len(self._window) - self._whole
        if broken and held < LONGEST_CHARACTER:
            return ""
        # after four tokens without a complete character at the end, only the last few bytes can still become one
        unfinished = min(broken, LONGEST_CHARACTER - 1)
        new = self._give(text, len(text) - unfinished)
        if not unfinished:
            self._forget(self._whole)
        elif len(self._window) > LONGEST_WINDOW:
            self._forget(len(self._window) - WINDOW)
            self._given = max(self._given - unfinished, 0)
        return new

    def flush(self) -> str:
        """What is left at the end, as `decode` would show it."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)

    def _give(self, text: str, end: int) -> str:
        new, self._given = text[self._given : end], max(self._given, end)
        return new

    def _forget(self, count: int) -> None:
        """Drops the oldest tokens, whose text is out; the rest is kept for what it says about the next one."""
        self._window = self._window[count:]
        self._whole, self._given = len(self._window), len(self._text())


# ---- files ----------------------------------------------------------------------------------------------------------


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """What makes a tokenizer in one folder into another."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    for template in _named_templates(source):
        (target / NAMED_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, target / NAMED_TEMPLATES / template.name)


def _named_templates(folder: Path) -> list[Path]:
    return sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))


# ---- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a llama2.c file."""
    if path.is_file():
        from snello.models.stories import load_stories_tokenizer

        return load_stories_tokenizer(path)
    config = read_json_if_there(path / "tokenizer_config.json")
    backend, defaults = _backend(path, config)
    special = {**defaults, **_special_tokens(path, config)}
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, path, config, special)
    if defaults is GPT2_SPECIAL or config.get("tokenizer_class") in BYTE_LEVEL_CLASSES:
        _set_prefix_space(backend, config)
    if defaults is GPT2_SPECIAL:
        _add_bos_and_eos(backend, config, special)
    return Tokenizer(backend, special, _chat_templates(path, config), path.resolve().name)


def _backend(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, Mapping[str, str]]:
    """The tokenizer itself, and special tokens that go without saying for its kind."""
    if (path / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")), {}
        except Exception as error:  # the package raises bare Exceptions
            raise SnelloError(f"{path / 'tokenizer.json'} cannot be read: {error}", "download it again") from None
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        _expect_class(path, config, BYTE_LEVEL_CLASSES)
        return _byte_level_bpe(path), GPT2_SPECIAL
    if (path / "vocab.txt").exists():
        _expect_class(path, config, WORD_PIECE_CLASSES)
        return _word_piece(path, config), BERT_SPECIAL
    sentencepiece = [name for name in ("tokenizer.model", "spiece.model") if (path / name).exists()]
    if sentencepiece:
        raise SnelloError(f"{path} has only a SentencePiece tokenizer ({sentencepiece[0]})", _CONVERT)
    raise SnelloError(f"{path} has no tokenizer", "copy tokenizer.json and tokenizer_config.json into the folder")


def _expect_class(path: Path, config: Mapping[str, Any], known: Sequence[str]) -> None:
    """Without tokenizer.json only the class says how text is cut; another one would cut it differently."""
    named = config.get("tokenizer_class")
    if named is not None and named not in known:
        raise SnelloError(f"{path} has no tokenizer.json, which a {named} needs", _CONVERT)


def _byte_level_bpe(path: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files."""
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # the package raises bare Exceptions
        message = f"{path}: vocab.json and merges.txt cannot be read: {error}"
        raise SnelloError(message, "copy or download both files again") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _word_piece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its word list."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = (path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = {word: index for index, word in enumerate(words)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in ids]
    if missing:
        raise SnelloError(f"{path / 'vocab.txt'} lacks {', '.join(missing)}", "is it a BERT vocabulary?")
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    backend.add_special_tokens([token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in ids])
    return backend


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    listed = {**read_json_if_there(path / "special_tokens_map.json"), **config}
    texts = {key: _text(path, key, listed.get(key)) for key in SPECIAL}
    return {key: text for key, text in texts.items() if text is not None}


def _extra_special_tokens(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role (or with one of the model's own), under either of the names that they have had."""
    listed = {**read_json_if_there(path / "special_tokens_map.json"), **config}
    found: list[str | None] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = listed.get(key)
        tokens = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
        found += [_text(path, key, token) for token in tokens]
    return [text for text in found if text is not None]


def _text(path: Path, key: str, token: Any) -> str | None:
    """A special token is a text, or a table whose `content` is the text; null, false and a table without say none."""
    content = token.get("content") if isinstance(token, dict) else token
    if content in (None, False):
        return None
    if not isinstance(content, str) or any("\ud800" <= letter <= "\udfff" for letter in content):
        message = f"{path}: {key} is {json.dumps(token)[:80]}, expected a text"
        raise SnelloError(message, "correct it in tokenizer_config.json or special_tokens_map.json")
    return content


def _add_tokens(
    backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Tokens that are written down only beside tokenizer.json."""
    for number, token in _tokens_beside(path, config):
        if backend.token_to_id(token.content) is not None:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            message = f"{path}: token {token.content} is number {number}, and tokens before it are written down nowhere"
            raise SnelloError(message, "copy tokenizer.json from where the checkpoint came from")
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    listed = (*special.values(), *_extra_special_tokens(path, config))
    backend.add_special_tokens([token for token in dict.fromkeys(listed) if token not in known])


def _tokens_beside(path: Path, config: Mapping[str, Any]) -> list[tuple[int, tokenizers.AddedToken]]:
    """By number; with its settings where there are any."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    listed, bare = config.get("added_tokens_decoder") or {}, read_json_if_there(path / "added_tokens.json")
    try:
        found = [
            (int(number), tokenizers.AddedToken(token["content"], **{key: token[key] for key in flags if key in token}))
            for number, token in listed.items()
        ]
        found += [(int(number), tokenizers.AddedToken(token)) for token, number in bare.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        message = f"{path}: added_tokens_decoder or added_tokens.json does not say numbers and tokens"
        raise SnelloError(message, "download or copy the files again") from None
    return sorted(found, key=lambda numbered: numbered[0])


def _set_prefix_space(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """GPT-2's tokenizer_config.json says whether a space stands before a text, whatever tokenizer.json says."""
    stated = config.get("add_prefix_space")
    if isinstance(stated, bool) and isinstance(backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = stated


def _add_bos_and_eos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """tokenizer_config.json says which ends are added where no tokenizer.json does, as in Transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    first, second = ([f"{bos}:{side}"] * bool(bos) for side in (0, 1))
    single = [*first, "$A:0", *[f"{eos}:0"] * bool(eos)]
    pair = [*single, *second, "$B:1", *[f"{eos}:1"] * bool(eos)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos} if token]
    )


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own win over tokenizer_config.json; one without a name is "default"."""
    files = {"default": path / "chat_template.jinja"} if (path / "chat_template.jinja").exists() else {}
    files |= {file.stem: file for file in _named_templates(path)}
    if files:
        return {name: _template(file) for name, file in files.items()}
    found = config.get("chat_template")
    if found is None:
        found = read_json_if_there(path / "chat_template.json").get("chat_template")
    try:
        named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else {"default": found}
    except (TypeError, KeyError):
        message = f"{path}: chat_template is a list of things that are not named templates"
        raise SnelloError(message, "copy the tokenizer's files again") from None
    templates = {name: template for name, template in named.items() if template is not None}
    if not all(isinstance(template, str) for template in templates.values()):
        raise SnelloError(f"{path}: chat_template is not a text", "copy the tokenizer's files again")
    return templates


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SnelloError(f"{path} cannot be read: {error}", "download or copy the file again") from None

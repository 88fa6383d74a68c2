"""Tokenizers: equal to Transformers from every set of files, and streams that never split a character."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from snello.errors import SnelloError
from snello.models.tokenizer import REPLACEMENT, Tokenizer, load_tokenizer
from tests.checkpoints import write_tokenizer

DATA = Path(__file__).parents[3] / "shared/data/tokenizers"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here")
TEXTS = [
    "Hello world, it's 3:45 pm.",
    "  two  spaces\n\n\tand tabs ",
    "Zażółć gęślą jaźń — 日本語のテキスト 😀👩‍👩‍👧",
    "def f(x):\n    return x**2  # comment",
    "",
]


def folder(path: Path, config: dict[str, object] | None = None, **files: str) -> Path:
    """A folder with these files of ../shared/data and this tokenizer_config.json."""
    path.mkdir()
    for target, source in files.items():
        shutil.copy(DATA / source, path / target.replace("_", "."))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@needs_data
def test_gpt2_from_two_files(tmp_path: Path) -> None:
    mine = load_tokenizer(folder(tmp_path / "a", vocab_json="gpt2-vocab.json", merges_txt="gpt2-merges.txt"))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "a")
    for text in [*TEXTS, "one<|endoftext|>two"]:
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text), skip_special=False) == text
    assert mine.token_id("<|endoftext|>") == 50256 and mine.vocab_size == 50257
    assert mine.decode([50256, 15496]) == "Hello"
    assert mine.special_tokens["eos_token"] == "<|endoftext|>"


@needs_data
@pytest.mark.parametrize("lower", [True, False])
def test_bert_from_its_word_list(lower: bool, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", {"do_lower_case": lower}, vocab_txt="bert-uncased-vocab.txt")
    mine = load_tokenizer(path)
    theirs = transformers.BertTokenizer(vocab=str(DATA / "bert-uncased-vocab.txt"), do_lower_case=lower)
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text)
        ids, types = mine.encode_pair(text, "and a second one")
        expected = theirs(text, "and a second one")
        assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
    assert mine.encode("Hello", add_special=False) == theirs.encode("Hello", add_special_tokens=False)
    assert mine.decode(mine.encode("hello world")) == "hello world"


@needs_data
def test_llama_from_tokenizer_json(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "a",
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}},
        tokenizer_json="llama2-tokenizer.json",
    )
    mine, theirs = load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text)
    assert mine.special_tokens["eos_token"] == "</s>"


@needs_data
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=str)
def test_added_ends_are_those_of_transformers(files: tuple[str, ...], bos: bool, eos: bool, tmp_path: Path) -> None:
    """The flags count without tokenizer.json; with it, what it says counts."""
    sources = {
        "vocab.json": "gpt2-vocab.json",
        "merges.txt": "gpt2-merges.txt",
        "tokenizer.json": "llama2-tokenizer.json",
    }
    config: dict[str, object] = {"add_bos_token": bos, "add_eos_token": eos}
    if "tokenizer.json" in files:
        config |= {"bos_token": "<s>", "eos_token": "</s>"}
    path = folder(tmp_path / "a", config, **{name.replace(".", "_"): sources[name] for name in files})
    mine = load_tokenizer(path)
    cls = transformers.GPT2Tokenizer if len(files) == 2 else transformers.PreTrainedTokenizerFast
    theirs = cls.from_pretrained(path)
    assert mine.encode("Hello there") == theirs.encode("Hello there")
    if len(files) == 2:
        assert (mine.encode("Hello")[0] == 50256, mine.encode("Hello")[-1] == 50256) == (bos, eos)


@needs_data
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=str)
def test_a_space_before_the_text_is_what_gpt2_s_config_says(
    files: tuple[str, ...], stated: bool, tmp_path: Path
) -> None:
    config: dict[str, object] = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": stated}
    path = folder(tmp_path / "a", config, **{name.replace(".", "_"): f"gpt2-{name}" for name in files})
    mine, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text)
    assert mine.decode(mine.encode("Hello")) == (" Hello" if stated else "Hello")


def test_tokens_written_only_beside_tokenizer_json(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 307)
    before = load_tokenizer(tmp_path).vocab_size
    added = {str(before): {"content": "<|im_start|>", "special": True}, str(before + 1): {"content": "<think>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "pad_token": "<|pad|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": before, "<tool>": before + 2}))
    mine = load_tokenizer(tmp_path)
    names = ("<|im_start|>", "<think>", "<tool>", "<|pad|>")
    assert [mine.token_id(name) for name in names] == list(range(before, before + 4))
    ids = mine.encode("<|im_start|>a<think>b<tool>")
    assert (
        mine.decode(ids) == "a<think>b<tool>" and mine.decode(ids, skip_special=False) == "<|im_start|>a<think>b<tool>"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "does not say numbers"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"400": {"special": true}}}', "does not say numbers"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "does not say numbers"),
        ("tokenizer_config.json", b'{"eos_token": ["x"]}', "eos_token is ..x.., expected a text"),
        ("special_tokens_map.json", b'{"sep_token": 7}', "sep_token is 7, expected a text"),
        ("tokenizer_config.json", b'{"pad_token": {"content": 1}}', "pad_token is .*expected a text"),
        (
            "tokenizer_config.json",
            b'{"additional_special_tokens": ["\\ud800"]}',
            "additional_special_tokens is .*ud800",
        ),
        ("added_tokens.json", b'{"<a>": "b"}', "does not say numbers"),
        ("added_tokens.json", b'{"<a>": 4000}', "token <a> is number 4000"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_damaged_files_beside_are_one_clear_error(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 307)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SnelloError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("beside", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_without_a_role_are_special(key: str, beside: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 307)
    before = load_tokenizer(tmp_path).vocab_size
    stated = json.loads((tmp_path / beside).read_text()) if (tmp_path / beside).exists() else {}
    (tmp_path / beside).write_text(json.dumps(stated | {key: ["<|im_end|>", "<|tool|>"]}))
    mine, theirs = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = mine.encode("a<|im_end|>b<|tool|>")
    assert ids == theirs.encode("a<|im_end|>b<|tool|>") and ids[1::2] == [before, before + 1]
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ab"


def test_special_tokens_map_is_read_and_overruled(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 307)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "x", "pad_token": {"content": "<|end|>"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "unk_token": None}))
    assert load_tokenizer(tmp_path).special_tokens == {"eos_token": "<|end|>", "pad_token": "<|end|>"}


def test_truncation_and_padding_of_the_file_do_not_hold(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 307)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    mine = load_tokenizer(tmp_path)
    assert mine.decode(mine.encode("a long text, not cut")) == "a long text, not cut"


def test_saving_and_loading_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_tokenizer(tmp_path / "a", 307)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    first = load_tokenizer(tmp_path / "a")
    first.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.encode("hello <|end|>") == first.encode("hello <|end|>")
    assert (again.special_tokens, again.chat_templates) == (first.special_tokens, first.chat_templates)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer.model": "x"}, "only a SentencePiece tokenizer"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json and merges.txt cannot be read"),
        ({"vocab.txt": "a\nb"}, r"lacks \[UNK\], \[CLS\], \[SEP\]"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
            "Qwen2Tokenizer needs",
        ),
        (
            {"vocab.txt": "[UNK]", "tokenizer_config.json": '{"tokenizer_class": "TapasTokenizer"}'},
            "TapasTokenizer needs",
        ),
        ({"tokenizer_config.json": "nonsense"}, "not valid JSON"),
    ],
)
def test_what_makes_no_tokenizer(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SnelloError, match=message):
        load_tokenizer(tmp_path)


# ---- streams --------------------------------------------------------------------------------------------------------


@cache
def byte_level() -> Tokenizer:
    """Every byte a token, and a few that hold the end of one character and the start of the next."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = []
    for text in ("日本", "é😀", "é日"):
        units = level.pre_tokenize_str(text)[0][0]
        for left, right in pairwise(units):
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend)


@cache
def sentence_piece() -> Tokenizer:
    """Llama's kind: words begin with a mark, unknown characters are bytes."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {text: index for index, text in enumerate(texts)}
    model = models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return Tokenizer(backend)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_streams_of_text(text: str) -> None:
    for tokenizer in (byte_level(), sentence_piece()):
        ids = tokenizer.encode(text)
        parts = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in part for part in parts)


@given(st.lists(st.integers(0, 270), max_size=100))
@settings(max_examples=300, deadline=None)
def test_streams_of_any_bytes_end_as_decode_would(ids: list[int]) -> None:
    tokenizer = byte_level()
    ids = [token % tokenizer.vocab_size for token in ids]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.encode("a😀")
    assert streamed(tokenizer, ids) == ["", "a", "", "", "", "😀", ""]
    assert streamed(tokenizer, ids[:-1])[-1].startswith(REPLACEMENT)  # cut off: as `decode` shows it


def test_a_long_run_of_broken_bytes_stays_cheap_and_comes_out() -> None:
    tokenizer = byte_level()
    broken = tokenizer.token_id("Ã")  # the byte C3, which begins a character
    assert broken is not None
    decoder = tokenizer.stream()
    text = "".join(decoder.feed(broken) for _ in range(500)) + decoder.flush()
    assert text == tokenizer.decode([broken] * 500) == REPLACEMENT * 500
    assert len(decoder._window) < 100


def test_a_stream_goes_on_after_a_context() -> None:
    tokenizer = sentence_piece()
    first, second = tokenizer.encode("a", add_special=False), tokenizer.encode("ab", add_special=False)
    assert tokenizer.decode(second) == "ab"
    decoder = tokenizer.stream(context=first)
    assert "".join([*(decoder.feed(token) for token in second), decoder.flush()]) == " ab"


def test_special_tokens_are_silent_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.token_id("<|end|>"), *tokenizer.encode("hi")]
    assert "".join(streamed(tokenizer, ids)) == "hi"
    loud = tokenizer.stream(skip_special=False)
    assert "".join(loud.feed(token) for token in ids) == "<|end|>hi"

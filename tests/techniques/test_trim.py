"""Trim: the tokens that stay, a tokenizer that still writes any text, an ordinary checkpoint that all read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.reference import Reference
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.trim import Trim
from snello.techniques.trim.rewrite import renumbered, tokenizer_table
from snello.techniques.trim.vocabulary import Vocabulary, choose
from tests.checkpoints import VARIANTS, make_checkpoint

TEXT = "the treasure of the north sea is there, in the ship that nobody has seen since the storm. " * 3
OTHER = "Hätte er 漢字 😀 gesehen?\n\n  12,345 tons: reseat the anise tree; asinine roar"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
KINDS = ["llama", "llama-tied-bias", "qwen3", "gpt2", "opt", "gpt-neox", "phi3", "gemma3", "bert-mlm", "bert-classify"]


def windows(model: Model, text: str = TEXT) -> list[np.ndarray]:
    return [np.array(model.tokenizer.encode(text)[:100], np.int32)]


def trimmed(source: Model, path: Path, text: str = TEXT, **options: Any) -> Model:
    return Trim(**options).apply(source, Context(output=path, windows=windows(source, text)))


def kept_ids(source: Model, result: Model) -> list[int]:
    """Old ids by new id, found by the tokens' texts."""
    old = [
        source.tokenizer.token_id(str(result.tokenizer.backend.id_to_token(i))) for i in range(result.spec.vocab_size)
    ]
    return [number for number in old if number is not None]


@torch.inference_mode()
@pytest.mark.parametrize("variant", KINDS)
def test_everybody_reads_the_same_model(variant: str, tmp_path: Path) -> None:
    """What stays gives the original's logits in our reference, in Transformers and in the executor."""
    source = load(make_checkpoint(tmp_path / "source", variant))
    result = trimmed(source, tmp_path / "result", keep=0.9)
    assert result.spec == Trim(keep=0.9).plan(source.spec) and result.spec.vocab_size == 277
    rows = kept_ids(source, result)
    assert len(rows) == 277
    new = result.tokenizer.encode(TEXT)[:100]
    old = [rows[token] for token in new]
    assert source.tokenizer.encode(TEXT)[:100] == old
    ours = Reference.from_model(result)(torch.tensor([new]))
    theirs = Reference.from_model(source)(torch.tensor([old]))
    wanted = theirs if source.spec.head.kind == "classify" else theirs[..., rows]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    kind = getattr(transformers, VARIANTS[variant][0])
    stock, report = kind.from_pretrained(result.path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    torch.testing.assert_close(stock.eval()(torch.tensor([new])).logits, ours, atol=2e-5, rtol=1e-5)
    if source.spec.causal:
        with NativeExecutor(result, Deployment(threads=1)) as executor:
            np.testing.assert_allclose(executor.logits(np.array(new, np.int32)), ours[0].numpy(), atol=2e-4, rtol=1e-4)


def test_ids_are_renumbered_wherever_they_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "llama")
    path = tmp_path / "source" / "generation_config.json"
    path.write_text(
        json.dumps({"eos_token_id": [0, 300], "pad_token_id": 299, "top_k": 40, "suppress_tokens": [298, 400]})
    )
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"pad_token_id": -1, "sep_token_id": 297}))
    source = load(tmp_path / "source")
    result = trimmed(source, tmp_path / "result", keep=0.9)
    texts = [source.tokenizer.backend.id_to_token(number) for number in (0, 300, 299, 298, 297)]
    new = [result.tokenizer.token_id(text) for text in texts]
    assert None not in new
    said = json.loads((tmp_path / "result/generation_config.json").read_text())
    assert said == {"eos_token_id": new[:2], "pad_token_id": new[2], "top_k": 40, "suppress_tokens": [new[3]]}
    config = json.loads((tmp_path / "result/config.json").read_text())
    assert (config["bos_token_id"], config["sep_token_id"], config["pad_token_id"]) == (new[0], new[4], None)
    assert config["vocab_size"] == 277 and set(result.spec.eos_tokens) == set(new[:2])


@pytest.mark.parametrize("lacking", ["tokenizer.json", None])
def test_transformers_tokenizes_alike(lacking: str | None, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "gpt2"))
    if lacking:  # a vocabulary and merges in files of their own
        source.tokenizer.backend.model.save(str(source.path))
        (source.path / lacking).unlink()
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "unk_token": "<|end|>"}
        (source.path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|end|>"}))
        source = load(source.path)
    result = trimmed(source, tmp_path / "result", keep=0.9)
    theirs = transformers.AutoTokenizer.from_pretrained(result.path)
    for text in (TEXT, OTHER, "", "<|end|>the end<|end|>"):
        assert theirs(text)["input_ids"] == result.tokenizer.encode(text)
        assert result.tokenizer.decode(result.tokenizer.encode(text), False) == text
    assert theirs.eos_token_id == result.spec.eos_tokens[0]


def test_what_follows_takes_it_as_any_checkpoint(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen3"))
    result = trimmed(source, tmp_path / "result", keep=280.0)
    lean = Quantize().apply(result, Context(output=tmp_path / "lean"))
    assert lean.tokenizer.encode(TEXT) == result.tokenizer.encode(TEXT)
    assert [step["technique"] for step in lean.history] == ["trim", "quantize"]
    assert lean.history[0]["tokens"] == [307, 280]
    again = trimmed(source, tmp_path / "again", keep=280.0)
    assert again.digest == result.digest
    assert (again.path / "tokenizer.json").read_bytes() == (result.path / "tokenizer.json").read_bytes()


# ---- which tokens stay ----------------------------------------------------------------------------------------------


def retold(backend: Tokenizer, text: str, count: int, min_count: int = 1) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with `count` tokens, chosen on this text; and old ids by new."""
    vocabulary = Vocabulary(json.loads(backend.to_str()))
    size = backend.get_vocab_size()
    counts = np.bincount(backend.encode(text).ids, minlength=size)
    kept = choose(vocabulary, counts, count, min_count, (), ())
    assert len(kept) == count == len(set(kept))
    return Tokenizer.from_str(json.dumps(tokenizer_table(vocabulary, {old: new for new, old in enumerate(kept)}))), kept


def corpus() -> list[str]:
    return [TEXT, OTHER, "a store of ropes, oars and sails; these are hers and theirs " * 2, "roses are red"] * 4


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of each kind, trained here."""
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    elif kind == "fallback":
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", "</s>", *pieces])
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    backend.train_from_iterator(corpus(), trainer)
    if kind == "fallback":  # bytes are pieces of the model, not texts that are looked for
        table = json.loads(backend.to_str())
        table["added_tokens"] = table["added_tokens"][:2]
        backend = Tokenizer.from_str(json.dumps(table))
    if kind == "wordpiece":
        ids = [("[SEP]", backend.token_to_id("[SEP]")), ("[CLS]", backend.token_to_id("[CLS]"))]
        backend.post_processor = processors.BertProcessing(*ids)
    return backend


@pytest.mark.parametrize(
    ("kind", "share"), [("byte-level", 0.75), ("fallback", 0.85), ("wordpiece", 0.7), ("unigram", 0.75)]
)
def test_a_text_whose_tokens_stay_is_cut_as_before_and_any_text_comes_back(kind: str, share: float) -> None:
    backend = trained(kind)
    count = int(share * backend.get_vocab_size())
    smaller, kept = retold(backend, "the north sea", count)
    split = 0
    for text in [*corpus()[:4], "the treasure", "hers", "theirs and roses"]:
        old, new = backend.encode(text).ids, smaller.encode(text).ids
        assert smaller.decode(new) == backend.decode(old)
        if set(old) <= set(kept):
            assert [kept[token] for token in new] == old
        else:
            split += 1
            assert len(new) > len(old)
    assert split, "nothing was split, so nothing was tested"


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_bytes_write_anything(text: str) -> None:
    smaller, _ = SMALLER
    assert smaller.decode(smaller.encode(text).ids, skip_special_tokens=False) == text


SMALLER = retold(trained("byte-level"), "sea", 300)


def test_several_ways_to_one_token_and_merges_as_lists() -> None:
    """A token that more than one pair makes keeps the pieces of the way that is taken."""
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cab"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("c", "ab")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    smaller, kept = retold(backend, "abc", 5)
    assert kept == [0, 1, 2, 4, 5] and [kept[i] for i in smaller.encode("abc").ids] == [5]
    table = json.loads(backend.to_str())
    table["model"]["merges"] = [" ".join(merge) for merge in merges]
    again, _ = retold(Tokenizer.from_str(json.dumps(table)), "abc", 5)
    assert again.encode("abcab").ids == smaller.encode("abcab").ids


def test_what_must_stay_is_counted_before_anything_is_written(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(Unsupported, match=r"100 tokens were to stay, but .* are \d+") as caught:
        trimmed(source, tmp_path / "result", keep=100.0)
    assert "min_count" in str(caught.value.hint) and not (tmp_path / "result").exists()
    needed = int(str(caught.value.hint).split()[0].removeprefix("keep="))
    assert trimmed(source, tmp_path / "result", keep=float(needed)).spec.vocab_size == needed
    fewer = trimmed(source, tmp_path / "fewer", keep=float(needed - 3), min_count=9)
    assert fewer.tokenizer.decode(fewer.tokenizer.encode(TEXT)) == TEXT


def test_words_that_only_the_tokenizers_files_name_stay(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", "llama")
    table = json.loads((folder / "tokenizer.json").read_text())
    first, second = list(table["model"]["vocab"])[-2:]
    last = table["model"]["vocab"][second]
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [last - 1], "tokens": [first]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(table))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(last): {"content": second, "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = load(folder)
    result = Trim(keep=0.9).apply(source, Context(output=tmp_path / "result", windows=[np.arange(9, dtype=np.int32)]))
    ids = {token: result.tokenizer.token_id(token) for token in (first, second)}
    assert None not in ids.values() and result.tokenizer.encode("a")[0] == ids[first]
    written = json.loads((result.path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert written == {str(ids[second]): {"content": second, "special": False}}


def test_no_text_and_a_foreign_tokenizer_are_told(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(SnelloError, match="none was given"):
        Trim().apply(source, Context(output=tmp_path / "result"))
    table = json.loads((source.path / "tokenizer.json").read_text())
    table["model"]["vocab"]["zzz"] = 400
    (source.path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(SnelloError, match="knows token 400, the model has rows for 307"):
        trimmed(load(source.path), tmp_path / "result", keep=0.9)


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": -1}, {"keep": 2.5}, {"keep": 1}, {"min_count": 0}, {"keep": True}]
)
def test_slips_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        Trim(**options)
    assert caught.value.hint


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(Unsupported, match="leaves out none of 307"):
        Trim(keep=307).plan(source.spec)
    with pytest.raises(Unsupported, match="is quantized"):
        Trim().plan(Quantize().plan(source.spec))
    for change, message in (
        ({"type": "WordLevel"}, "WordLevel"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ):
        table = json.loads((source.path / "tokenizer.json").read_text())
        table["model"] |= change
        with pytest.raises(Unsupported, match=message):
            Vocabulary(table)


def test_configs_are_renumbered_however_nested() -> None:
    config = {"eos_token_id": [5, 7], "bad_words_ids": [[5], [7, 9]], "top_k": 5, "pad_token_id": 99, "is_x": True}
    assert renumbered(config, {5: 0, 7: 1, 9: 2}) == {
        "eos_token_id": [0, 1], "bad_words_ids": [[0], [1, 2]], "top_k": 5, "pad_token_id": None, "is_x": True
    }  # fmt: skip


@pytest.mark.skipif(not DATA.exists(), reason="the test data is not here")
@pytest.mark.parametrize("name", ["gpt2-tokenizer.json", "llama2-tokenizer.json"])
def test_published_tokenizers(name: str) -> None:
    backend = Tokenizer.from_file(str(DATA / name))
    smaller, kept = retold(backend, TEXT, 6_000)
    for text in (TEXT, OTHER, 'fn main() { println!("{:?}", x); }\n\tif a != b:'):
        old, new = backend.encode(text).ids, smaller.encode(text).ids
        assert smaller.decode(new) == backend.decode(old)
        assert [kept[token] for token in new] == old or not set(old) <= set(kept)
    assert [kept[token] for token in smaller.encode(TEXT).ids] == backend.encode(TEXT).ids

"""Documents are found by one rule, cut by document, windowed, and cleared of what calibration has seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.measure.documents import Document, gather, order, read_labelled, read_source, split
from snello.measure.text import (
    Limits,
    assign,
    bos_prefix,
    cut_examples,
    cut_text,
    windows,
)
from snello.models.overlap import ngrams, seen_ngrams, without_overlap


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def marked(text: str) -> list[int]:
    return [1, *encode(text)]


def document(text: str, name: str = "d") -> Document:
    return Document(source="s", name=name, text=text)


def random_documents(count: int, size: int, seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [document("".join(chr(97 + n) for n in generator.integers(0, 26, size)), f"d{i}") for i in range(count)]


def test_split_by_end_token() -> None:
    assert split("one<end>two<end>", "<end>") == ["one", "two"]


def test_split_at_chapters() -> None:
    text = "".join(f"CHAPTER {n}.\n\n" + "word " * 600 + "\n\n" for n in range(4))
    pieces = split(text)
    assert len(pieces) == 4
    assert all(piece.startswith("CHAPTER") for piece in pieces)
    assert "".join(pieces) == text


def test_split_gathers_blank_line_blocks_to_two_thousand_characters() -> None:
    pieces = split("\n\n".join("word " * 100 for _ in range(20)))
    assert len(pieces) > 3
    assert all(len(piece) >= 2000 for piece in pieces)


def test_gather_joins_a_short_rest_to_the_last() -> None:
    assert [len(piece) for piece in gather(["a" * 2000, "b" * 2500, "c" * 10])] == [2000, 2510]


def test_read_source_jsonl_and_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [d.text for d in read_source(tmp_path / "a.jsonl")] == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(SnelloError, match='line 1 has no "text"'):
        read_source(tmp_path / "b.jsonl")
    with pytest.raises(SnelloError, match="there is no text"):
        read_source(tmp_path / "missing.txt")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SnelloError, match="not UTF-8"):
        read_source(tmp_path / "c.txt")


def test_a_row_is_a_line_whatever_its_text_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028two \x85 three"}, {"text": "caf\u00e9"}]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig"))
    assert [document.text for document in read_source(path)] == [row["text"] for row in rows]


def test_a_text_that_is_no_string_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n')
    with pytest.raises(SnelloError, match='line 3: "text" is null'):
        read_source(tmp_path / "a.jsonl")


def test_read_labelled(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\ngood film\t1\nbad film\t0\n")
    rows = read_labelled(tmp_path / "a.tsv")
    assert [(row.text, row.label) for row in rows] == [("good film", "1"), ("bad film", "0")]
    (tmp_path / "b.tsv").write_text("good film\n")
    with pytest.raises(SnelloError, match="not a table"):
        read_labelled(tmp_path / "b.tsv")
    (tmp_path / "c.tsv").write_text("sentence\tlabel\ngood film\t1\n\n \t0\n")
    with pytest.raises(SnelloError, match="line 4 has an empty field"):
        read_labelled(tmp_path / "c.tsv")


def test_order_is_seeded_and_depends_on_each_text_alone() -> None:
    documents = random_documents(10, 50)
    first = order(documents, 1)
    assert order(list(reversed(documents)), 1) == first
    assert order(documents, 2) != first
    without = order(documents[1:], 1)
    assert without == [d for d in first if d != documents[0]]


def test_order_drops_exact_repeats() -> None:
    assert len(order([document("same", "a"), document("same", "b")], 0)) == 1


def test_cuts_share_no_document() -> None:
    parts = assign(order(random_documents(60, 500), 0), Limits(calib=1000))
    names = [{d.name for d in part} for part in parts.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    sizes = {name: sum(len(d.text) for d in part) for name, part in parts.items()}
    assert sizes["proof"] >= sizes["select"] >= sizes["calib"] > 0


def test_windows_do_not_overlap_and_skip_the_first_tokens() -> None:
    text = random_documents(1, 2500)[0]
    blocks = windows([text], encode, [], 1024, 10**6)
    assert [len(block.tokens) for block in blocks] == [1024, 1024, 452]
    assert [block.start for block in blocks] == [0, 1024, 2048]
    assert all(block.scored_from == 64 for block in blocks)
    assert np.concatenate([block.tokens for block in blocks]).tolist() == encode(text.text)


def test_every_window_starts_with_the_tokenizers_own_prefix() -> None:
    assert bos_prefix(marked) == [1]
    assert bos_prefix(encode) == []
    blocks = windows(random_documents(1, 2500), marked, [1], 1024, 10**6)
    assert all(block.tokens[0] == 1 for block in blocks)
    assert sum(len(block.tokens) - 1 for block in blocks) == 2500


def test_short_documents_are_gathered_with_the_separator_between() -> None:
    blocks = windows(random_documents(20, 100), encode, [], 512, 10**6, separator=9)
    assert all(len(block.tokens) <= 512 for block in blocks)
    assert (blocks[0].tokens == 9).sum() == 5


def test_ngrams_find_what_is_shared_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    calib = generator.integers(0, 1000, 500).astype(np.int32)
    other = generator.integers(0, 1000, 500).astype(np.int32)
    assert not np.isin(ngrams(other), seen_ngrams([calib])).any()
    other[100:113] = calib[200:213]
    assert np.isin(ngrams(other), seen_ngrams([calib])).sum() == 1
    assert len(ngrams(other[:12])) == 0


def test_shared_blocks_are_dropped_and_counted() -> None:
    documents = random_documents(40, 1200)
    quoted = "".join(d.text[:200] for d in documents)  # quotes every document, so every calib one too
    source = cut_text(
        [*documents, document(quoted, "quotes")],
        encode,
        trained=1024,
        seed=0,
        limits=Limits(calib=8192),
        separator=None,
    )
    clean = cut_text(documents, encode, trained=1024, seed=0, limits=Limits(calib=8192), separator=None)
    assert clean.dropped_blocks == 0
    assert source.dropped_blocks > 0
    kept = without_overlap(source.select, seen_ngrams(source.calib))
    assert kept == list(source.select)


def test_answers_to_one_prompt_stay_together_and_prompts_are_no_overlap() -> None:
    random = np.random.default_rng(3)
    system = random.integers(1, 500, 20).tolist()  # before every prompt, as a chat's template is
    documents = []
    for number in range(24):
        prompt = (*system, *random.integers(1, 500, 10).tolist())
        for answer in range(4):
            tokens = (*prompt, 7, *random.integers(1, 500, 200).tolist())  # all begin alike
            name = f"{number}.{answer}"
            documents.append(Document(source="own", name=name, text="", tokens=tokens, prompt_tokens=len(prompt)))
    limits = Limits(calib=4096)
    source = cut_text(documents, encode, trained=256, seed=0, limits=limits, separator=None)
    assert source.dropped_blocks == 0 and source.select and source.proof
    parts = assign(documents, limits)
    prompts = [{document.tokens[:30] for document in part} for part in parts.values()]
    assert all(prompts) and not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    plain = [dataclasses.replace(document, prompt_tokens=0) for document in documents]
    with_prompts = cut_text(plain, encode, trained=256, seed=0, limits=limits, separator=None)
    assert not with_prompts.select  # as any text would be that begins with 20 tokens of calibration


def test_too_little_text_is_exit_4() -> None:
    with pytest.raises(SnelloError) as error:
        cut_text(random_documents(2, 100), encode, trained=1024, seed=0, limits=Limits(), separator=None)
    assert error.value.exit_code == 4


def test_limits_hold() -> None:
    limits = Limits(calib=4096, select=5000, proof=6000)
    source = cut_text(random_documents(300, 1000), encode, trained=512, seed=0, limits=limits, separator=None)
    assert sum(map(len, source.calib)) <= 4096
    assert 5000 <= source.tokens("select") < 6000
    assert 6000 <= source.tokens("proof") < 7000


def test_examples_are_one_block_each() -> None:
    source = cut_examples(random_documents(100, 30), marked, longest=20, seed=0, limits=Limits(calib=100))
    assert all(len(block.tokens) == 20 and block.scored_from == 0 for block in source.select)
    assert len({block.cluster for block in source.proof}) == len(source.proof)


def test_the_second_text_of_a_pair_is_looked_at_too() -> None:
    """In tables of pairs one text often stands in several rows, on either side."""
    first = random_documents(60, 40)
    documents = [dataclasses.replace(one, other=first[number - 1].text) for number, one in enumerate(first)]
    source = cut_examples(documents, encode, longest=60, seed=0, limits=Limits(calib=400))
    seen = seen_ngrams(source.calib)
    assert source.dropped_blocks > 0
    assert not any(np.isin(ngrams(block.other), seen).any() for block in (*source.select, *source.proof))


def test_examples_that_share_text_with_calibration_are_dropped_and_counted() -> None:
    """Two examples that differ in one word at the end would be trained on and judged by."""
    documents = random_documents(60, 40)
    twins = [document(one.text + " other", f"twin {number}") for number, one in enumerate(documents)]
    source = cut_examples([*documents, *twins], encode, longest=60, seed=0, limits=Limits(calib=400))
    assert source.dropped_blocks > 0
    for blocks in (source.select, source.proof):
        assert without_overlap(blocks, seen_ngrams(source.calib)) == list(blocks)

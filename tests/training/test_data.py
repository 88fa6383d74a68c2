"""Data: every token is seen once a pass, any step can be asked for alone, masks hide what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from snello.errors import SnelloError
from snello.training.data import POOL, LikeLengths, MaskedRows, Rows, pack, padded


def test_packing_loses_only_the_end() -> None:
    documents = [np.arange(10 * i, 10 * i + 4 + i, dtype=np.int32) for i in range(1, 6)]
    rows = pack(documents, length=7, separator=0, seed=2)
    stream = np.concatenate(rows)
    assert {len(row) for row in rows} == {7} and len(stream) == (35 + 5) // 7 * 7
    pieces = [piece.tolist() for piece in np.split(stream, np.flatnonzero(stream == 0)) if len(piece)]
    assert sorted(p[1:] for p in pieces[:-1]) == sorted(
        d.tolist() for d in documents if d.tolist() in [p[1:] for p in pieces]
    )
    assert np.concatenate(pack(documents, length=7, separator=0, seed=2)).tolist() == stream.tolist()
    assert np.concatenate(pack(documents, length=7, separator=0, seed=3)).tolist() != stream.tolist()
    assert [row.tolist() for row in pack([[5, 6]], length=9, separator=None, seed=0)] == [[5, 6]]


@pytest.mark.parametrize("documents", [[], [[]]])
def test_no_text_is_an_error(documents: list[list[int]]) -> None:
    with pytest.raises(SnelloError, match="no text to train on"):
        pack(documents, length=4, separator=0, seed=0)
    with pytest.raises(SnelloError, match="no text to train on"):
        Rows([np.array(d, np.int32) for d in documents], batch=1)


def test_every_row_once_a_pass_and_any_step_alone() -> None:
    rows = Rows([np.full(3, i, np.int32) for i in range(5)], batch=2, seed=1)
    seen = [place for step in range(10) for place in rows.places(step)]
    for epoch in range(4):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:10]
    assert torch.equal(rows.at(7)["tokens"], Rows(rows.rows, batch=2, seed=1).at(7)["tokens"])
    assert rows.digest != Rows(rows.rows, batch=2, seed=2).digest != Rows(rows.rows[::-1], batch=2, seed=1).digest


def test_rows_that_differ_are_padded_and_masked() -> None:
    rows = Rows([np.array([1, 2, 3], np.int32), np.array([4], np.int32)], batch=2)
    batch = rows.at(0)
    assert batch["mask"].sum() == 4 and torch.equal(batch["tokens"] != 0, batch["mask"].bool())
    assert rows.tokens_per_step == 4


def test_masked_words() -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(5, 90, 200).astype(np.int32) for _ in range(40)]
    for text in texts:
        text[0], text[-1] = 1, 2
    rows = MaskedRows(texts, batch=40, mask_token=3, vocab_size=90, keep=frozenset({1, 2}))
    plain, batch = Rows(texts, batch=40).at(0), rows.at(0)
    chosen = batch["targets"] != -100
    assert 0.13 < chosen.float().mean() < 0.17
    assert torch.equal(batch["targets"][chosen], plain["tokens"][chosen])
    assert torch.equal(batch["tokens"][~chosen], plain["tokens"][~chosen])
    assert not chosen[:, [0, -1]].any()
    hidden = batch["tokens"][chosen]
    assert 0.75 < (hidden == 3).float().mean() < 0.85
    assert torch.equal(rows.at(3)["targets"], rows.at(3)["targets"])
    assert not torch.equal(rows.at(0)["targets"] != -100, rows.at(1)["targets"] != -100)


def test_batches_of_like_lengths_hold_every_row_once_and_pad_little() -> None:
    random = np.random.default_rng(0)
    rows = [np.full(random.integers(1, 40), place, np.int32) for place in range(500)]
    alike, plain = LikeLengths(rows, 8, seed=3), Rows(rows, 8, seed=3)
    a_pass = len(rows) // 8

    def padding(batches: Rows) -> int:
        shapes = [batches.at(step)["tokens"].shape.numel() for step in range(a_pass)]
        return sum(shapes) - sum(len(rows[place]) for step in range(a_pass) for place in batches.places(step))

    for number in range(2):
        seen = [place for step in range(a_pass) for place in alike.places(number * a_pass + step)]
        assert len(seen) == len(set(seen)) == a_pass * 8
    assert padding(alike) < padding(plain) / 5
    again = LikeLengths(rows, 8, seed=3)
    assert again.places(a_pass + 5) == alike.places(a_pass + 5) != alike.places(5)
    lengths = [len(rows[alike.places(step)[0]]) for step in range(a_pass)]
    assert lengths != sorted(lengths) and alike.digest not in (plain.digest, LikeLengths(rows, 8, seed=4).digest)


def test_a_run_too_short_for_a_batch_is_left_out() -> None:
    """One row more than the runs that are sorted together hold."""
    rows = [np.ones(1 + place % 7, np.int32) for place in range(2 * POOL + 1)]
    alike = LikeLengths(rows, 2, seed=1)
    for number in range(3):
        assert {len(alike.places(number * POOL + step)) for step in range(POOL)} == {2}


def test_fewer_rows_than_a_batch_of_like_lengths() -> None:
    rows = [np.arange(1, 3 + place, dtype=np.int32) for place in range(3)]
    assert sorted(LikeLengths(rows, 3).places(7)) == [0, 1, 2]
    assert padded(rows)["mask"].sum() == sum(map(len, rows))

"""Pairing two vocabularies: sums over pieces, nothing changed where nothing changed, distributions gathered."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from snello.engine.native import NativeExecutor
from snello.errors import Unsupported
from snello.measure.guards import divergence, kl
from snello.measure.quality import compare
from snello.measure.rulers import NextTokens
from snello.measure.text import Block
from snello.measure.translation import Gathered, Translated, translation
from snello.models import Model, load
from snello.models.spec import Deployment
from snello.optimize.workbench import NativeWorkbench
from snello.techniques.base import Context
from snello.techniques.trim import Trim
from tests.checkpoints import make_checkpoint

TEXT = "the sea is near here; the ship then rests in the shore sand and he has no rest"
SEEN = "the ship"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Model, Model]:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    window = np.array(source.tokenizer.encode(SEEN), np.int32)
    return source, Trim(keep=270).apply(source, Context(output=tmp_path / "result", windows=[window]))


def block(tokens: np.ndarray, cluster: int = 0) -> Block:
    return Block(source="s", document="d", cluster=cluster, start=0, tokens=tokens, scored_from=4)


def open_model(model: Model, context: int = 256) -> NativeExecutor:
    return NativeExecutor(model, Deployment(threads=1, context=context))


def test_pieces_are_the_same_bytes(pair: tuple[Model, Model]) -> None:
    source, result = pair
    rule = translation(source.tokenizer, result.tokenizer)
    assert rule is not None
    tokens = source.tokenizer.encode(TEXT)
    ids, ends = rule.translate(tokens)
    assert len(ids) > len(tokens) and ends[-1] == len(ids)
    for token, begin, end in zip(tokens, [0, *ends[:-1]], ends, strict=True):
        assert result.tokenizer.decode(ids[begin:end].tolist()) == source.tokenizer.decode([token])
        assert rule.back(int(ids[begin])) == (token if end - begin == 1 else rule.back(int(ids[begin])))
    assert rule.stretch([tokens]) == len(ids) / len(tokens)


def test_losses_are_sums_over_pieces_at_any_context(pair: tuple[Model, Model]) -> None:
    source, result = pair
    rule = translation(source.tokenizer, result.tokenizer)
    assert rule is not None
    tokens = np.array(source.tokenizer.encode(TEXT), np.int32)
    ids, ends = rule.translate(tokens)
    with open_model(result) as runner:
        alone = np.asarray(runner.score(ids).log_probabilities, np.float64)
        scores = Translated(runner, rule).score(tokens)
        wanted = [alone[begin - 1 : end - 1].sum() for begin, end in itertools.pairwise(ends)]
        np.testing.assert_allclose(scores.log_probabilities, wanted, rtol=1e-6)
        np.testing.assert_array_equal(
            Translated(runner, rule).logits(tokens, [3, 9]), runner.logits(ids, ends[[3, 9]] - 1)
        )
    with open_model(result, context=len(ids) - 5) as short:  # read on in a second window
        cut = Translated(short, rule).score(tokens)
        inside = ends[1:] <= short.context
        assert len(cut.log_probabilities) == len(wanted) and not inside.all()
        np.testing.assert_allclose(cut.log_probabilities[inside], np.array(wanted)[inside], rtol=1e-6)
        assert np.isfinite(cut.log_probabilities).all()


def test_where_no_token_left_nothing_changes_but_the_chance_of_what_left(pair: tuple[Model, Model]) -> None:
    """Fewer rows share the odds: every kept token can only gain, whatever the model."""
    source, result = pair
    tokens = np.array(source.tokenizer.encode(SEEN * 8), np.int32)
    rule = NativeWorkbench().translation(source, result)
    assert rule is not None and (rule.translate(tokens)[1] == np.arange(1, len(tokens) + 1)).all()
    ruler = NextTokens()
    blocks = [block(tokens, cluster) for cluster in range(8)]
    with open_model(source) as first, open_model(result) as second:
        original, lean = ruler.read(first, blocks), ruler.read(Translated(second, rule), blocks)
    assert all((b <= a + 1e-5).all() for a, b in zip(original.values, lean.values, strict=True))
    assert compare(ruler, original, lean, blocks, seed=0).loss.mid < 0


def test_divergence_is_of_the_next_piece(pair: tuple[Model, Model]) -> None:
    source, result = pair
    rule = translation(source.tokenizer, result.tokenizer)
    assert rule is not None
    tokens = np.array(source.tokenizer.encode(TEXT), np.int32)
    with open_model(source) as first, open_model(result) as second:
        gathered = Gathered(first, rule, result.spec.vocab_size)
        rows = gathered.logits(tokens, [5])
        odds = np.exp(first.logits(tokens, [5])[0].astype(np.float64))
        by_hand = np.zeros(result.spec.vocab_size)
        for token in range(source.spec.vocab_size):
            by_hand[rule.pieces(token)[0]] += odds[token]
        np.testing.assert_allclose(np.exp(rows[0]), by_hand, rtol=1e-5)
        found = divergence(gathered, Translated(second, rule), [block(tokens)], seed=0)
        assert np.isfinite(found.mean) and found.mean > 0
        assert kl(rows, rows)[0] == 0


def test_one_tokenizer_needs_no_translation(pair: tuple[Model, Model], tmp_path: Path) -> None:
    source, _ = pair
    again = load(make_checkpoint(tmp_path / "again", "llama", seed=1))
    assert translation(source.tokenizer, again.tokenizer) is None
    assert NativeWorkbench().translation(source, again) is None


def test_what_the_other_cannot_write_is_told(pair: tuple[Model, Model], tmp_path: Path) -> None:
    source, result = pair
    rule = translation(source.tokenizer, result.tokenizer)
    assert rule is not None
    with pytest.raises(Unsupported, match="token 5000 of the original has no text"):
        rule.pieces(5000)

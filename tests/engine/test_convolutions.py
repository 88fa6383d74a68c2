"""The state of convolutions where things go wrong: a step that fails and is run again, guesses taken back."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np
import pytest

from snello.engine.native import NativeExecutor
from snello.engine.sequence import Piece, Sequence, Step
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native.core import NotFinite
from tests.models.test_convolutions import convolving
from tests.twins import DictWeights

POISON = 5


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One of whose words is no number."""
    model = convolving(tmp_path_factory.mktemp("convolutions") / "model", kernel=4, variant="llama")
    weights = model.weights
    assert isinstance(weights, DictWeights)
    table = weights.arrays["embedding.tokens.weight"].copy()
    table[POISON] = np.nan
    arrays = weights.arrays | {"embedding.tokens.weight": table}
    return dataclasses.replace(model, weights=DictWeights(arrays))


def sequence(executor: NativeExecutor, tokens: list[int]) -> Sequence:
    made = Sequence(id=len(tokens), tokens=array("i", tokens), max_length=len(tokens))
    made.pages = array("i", [executor.pages.allocate() for _ in range(-(-len(tokens) // 128))])
    return made


def piece(of: Sequence, start: int, end: int) -> Piece:
    return Piece(sequence=of, start=start, tokens=of.tokens[start:end], num_outputs=end - start)


@pytest.mark.parametrize("start", [1, 3, 40, 110, 126, 128, 130])
@pytest.mark.parametrize("rows", [1, 12, 14, 16, 60])
def test_a_step_that_fails_leaves_the_state_of_others(poisoned: Model, start: int, rows: int) -> None:
    text = np.random.default_rng(1).integers(6, 307, 200).tolist()
    with NativeExecutor(poisoned, Deployment(context=256, streams=4)) as executor:
        truth = executor.logits(text)
        one, bad = sequence(executor, text), sequence(executor, [9, POISON, 11])
        executor.run(Step(pieces=[piece(one, 0, start)]))
        step = Step(pieces=[piece(one, start, start + rows), piece(bad, 0, 3)])
        with pytest.raises(NotFinite) as caught:
            executor.run(step)
        assert step.piece_of(caught.value.row).sequence is bad
        again = executor.run(step.without(step.pieces[1]))
    assert again.tobytes() == truth[start : start + rows].tobytes()


@pytest.mark.parametrize("start", [5, 60, 113, 127, 128, 129])
def test_guesses_are_taken_back(poisoned: Model, start: int) -> None:
    """As many wrong ones as may be made at once; one more would not be remembered."""
    text = np.random.default_rng(2).integers(6, 307, 220).tolist()
    wrong = np.random.default_rng(3).integers(6, 307, 220).tolist()
    with NativeExecutor(poisoned, Deployment(context=256, streams=4)) as executor:
        most = executor.retention.takes_back
        assert most == 13
        truth = executor.logits(text)
        one = sequence(executor, text)
        executor.run(Step(pieces=[piece(one, 0, start)]))
        guessed = Piece(sequence=one, start=start, tokens=array("i", [text[start], *wrong[:most]]), num_outputs=1)
        executor.run(Step(pieces=[guessed]))
        after = executor.run(Step(pieces=[piece(one, start + 1, start + 40)]))
    assert after.tobytes() == truth[start + 1 : start + 40].tobytes()

"""What prompts make a step take over its prediction: learned, and left room for."""

from __future__ import annotations

import random
from array import array

import pytest

from snello.engine.cost import MOST_OVERRUN, Overrun
from snello.engine.pages import PagePool, Retention
from snello.engine.plan import Limits
from snello.engine.scheduler import Scheduler
from snello.engine.sequence import Sequence
from tests.engine.world import cost


@pytest.mark.parametrize("spread", [0.05, 0.1, 0.2])
def test_one_step_of_twenty_takes_longer(spread: float) -> None:
    chance, overrun, over = random.Random(1), Overrun(), 0
    for number in range(6000):
        took = 30.0 * chance.lognormvariate(0.0, spread)
        over += number >= 1000 and took > 30.0 * overrun.ratio
        overrun.observe(30.0, took)
    assert 0.03 < over / 5000 < 0.07


def test_steps_as_predicted_keep_the_whole_budget_and_bad_ones_half_of_it() -> None:
    overrun = Overrun()
    for _ in range(200):
        overrun.observe(30.0, 29.0)
    assert overrun.ratio == 1.0
    for _ in range(200):
        overrun.observe(30.0, 300.0)
    assert overrun.ratio == MOST_OVERRUN


def test_a_prompt_gets_fewer_rows_where_steps_overrun() -> None:
    lengthened = []
    for overrun in (1.0, 1.25):
        scheduler = Scheduler(PagePool(64), Retention(), Limits(max_rows=512, max_num_seqs=8, step_ms=50.0))
        scheduler.add(Sequence(id=1, tokens=array("i", [1, 2, 3]), max_length=50))
        scheduler.advance(scheduler.schedule(cost), {1: [4]})
        scheduler.add(Sequence(id=2, tokens=array("i", range(2000)), max_length=2010))
        step = scheduler.schedule(cost, overrun)
        reads = sum(scheduler.retention.reads(piece.start, len(piece.tokens)) for piece in step.pieces)
        lengthened.append(cost(step.num_rows, reads) - cost(1, 4))
    assert 49 < lengthened[0] <= 50 and 39 < lengthened[1] <= 40

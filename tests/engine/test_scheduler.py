"""Scheduling: random worlds in which nothing may break, and the promises one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from snello.engine.pages import PagePool, Retention, pages_for
from snello.engine.plan import Limits
from snello.engine.prefix import PAGE
from snello.engine.scheduler import PATIENCE
from tests.engine.world import VOCABULARY, World, cost


def world(
    num_pages: int = 16,
    max_rows: int = 64,
    max_num_seqs: int = 8,
    step_ms: float = 50.0,
    retention: Retention | None = None,
    seed: int = 0,
) -> World:
    limits = Limits(max_rows=max_rows, max_num_seqs=max_num_seqs, step_ms=step_ms)
    return World(num_pages=num_pages, retention=retention or Retention(), limits=limits, seed=seed)


def text(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCABULARY) for _ in range(length)]


WORLDS = {
    "num_pages": st.integers(4, 14),
    "max_rows": st.sampled_from([1, 5, 16, 64, 256]),
    "max_num_seqs": st.integers(1, 12),
    "step_ms": st.sampled_from([1.0, 12.0, 50.0]),
    "window": st.sampled_from([None, None, 1, 40, 128, 300]),
    "sinks": st.sampled_from([0, 4, 130]),
    "takes_back": st.sampled_from([None, None, 14, 9]),
    "busy": st.floats(0.05, 0.9),
    "cancel": st.sampled_from([0.0, 0.0, 0.01]),
    "guess": st.sampled_from([0.0, 0.5]),
    "seed": st.integers(0, 10_000),
}
ONCE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow],
}


def live(
    num_pages: int,
    max_rows: int,
    max_num_seqs: int,
    step_ms: float,
    window: int | None,
    sinks: int,
    takes_back: int | None,
    busy: float,
    cancel: float,
    guess: float,
    seed: int,
) -> None:
    """Sixty steps of arrivals in one world, then until all is done."""
    if takes_back is not None and window is not None:
        window = max(window, 8)
    retention = Retention(window=window, sinks=sinks if window is not None else 0, takes_back=takes_back)
    w = world(num_pages, max_rows, min(max_num_seqs, max_rows), step_ms, retention, seed)
    bases = [text(4 * PAGE, number) for number in range(3)]
    for _ in range(60):
        if w.random.random() < busy:
            base = w.random.choice(bases)[: w.random.choice([0, 5, 60, 127, 128, 129, 200, 256, 380])]
            prompt = base + text(w.random.choice([1, 2, 30, 100]), w.random.randrange(4))
            answer = min(w.random.choice([1, 3, 20, 90, 300]), num_pages * PAGE - len(prompt))
            while len(prompt) + answer > num_pages * PAGE or answer < 1:
                prompt, answer = prompt[: len(prompt) // 2], 10
            w.add(prompt, answer=answer, priority=w.random.choice([0, 0, 0, 1, -1]), salt=w.random.choice("aab"))
        w.step(cancel=cancel, guess=guess)
    w.drain(cancel=cancel, guess=guess)


@given(**WORLDS)
@settings(max_examples=12, **ONCE)
def test_random_worlds(**options: Any) -> None:
    live(**options)


@pytest.mark.slow
@given(**WORLDS)
@settings(max_examples=250, **ONCE)
def test_many_random_worlds(**options: Any) -> None:
    live(**options)


def test_who_gives_way_may_be_back_in_the_same_step() -> None:
    """Its last page was wanted, and with a window what is known of it needs fewer than it held."""
    live(
        num_pages=5,
        max_rows=16,
        max_num_seqs=5,
        step_ms=50.0,
        window=40,
        sinks=0,
        takes_back=14,
        busy=0.09400685392147029,
        cancel=0.0,
        guess=0.0,
        seed=4,
    )


def test_a_long_run_comes_through_preemption_hits_and_guesses() -> None:
    """Thousands of steps in one world, which must really meet what it is for."""
    w = world(num_pages=10, max_rows=32, max_num_seqs=10, step_ms=20.0, seed=5)
    bases = [text(3 * PAGE, number) for number in range(2)]
    while w.steps < 3000:
        if w.random.random() < 0.06:
            base = w.random.choice(bases)[: w.random.randrange(3 * PAGE)]
            w.add(base + text(w.random.randrange(1, 90), w.steps), answer=w.random.choice([1, 5, 30, 300, 500]))
        w.step(cancel=0.0005, guess=0.3)
    w.drain(guess=0.3)
    counters = w.scheduler.counters
    assert len(w.answers) > 100
    assert counters.preemptions >= 10
    assert counters.cached_tokens > 0.2 * counters.prompt_tokens
    assert w.drafted > w.accepted > 500


def test_a_long_prompt_does_not_stall_the_others() -> None:
    w = world(num_pages=64, max_rows=512, step_ms=40.0)
    first = w.add(text(20, 1), answer=60)
    w.step()
    w.add(text(4000, 2), answer=1)
    while first not in w.finished:
        step = w.step()
        reads = sum(w.retention.reads(piece.start, len(piece.tokens)) for piece in step.pieces)
        assert {piece.sequence.id for piece in step.pieces} >= {first}
        assert cost(step.num_rows, reads) <= cost(1, w.retention.reads(step.pieces[0].start, 1)) + 40.0
    assert w.finished[first] == 60, "one token a step"
    w.drain()


def test_a_prompt_alone_takes_whole_steps() -> None:
    w = world(num_pages=64, max_rows=512, step_ms=1.0)
    w.add(text(2000), answer=1)
    assert [w.step().num_rows for _ in range(4)] == [512, 512, 512, 464]


def test_prompts_go_on_where_a_row_is_over_the_budget() -> None:
    w = world(num_pages=64, max_rows=64, step_ms=0.001)
    for seed in range(4):
        w.add(text(5, seed), answer=400)
    w.step()
    long = w.add(text(300, 9), answer=1)
    steps = 0
    while long not in w.finished:
        steps += 1
        rows = w.step().num_rows
        assert rows >= 5
    assert steps <= 300


def test_samples_of_one_prompt_share_its_pages() -> None:
    w = world(num_pages=24, max_num_seqs=8, max_rows=512)
    prompt = text(3 * PAGE + 50)
    samples = [w.add(prompt, answer=20) for _ in range(8)]
    first = w.step()
    assert [piece.sequence.id for piece in first.pieces] == samples[:1], "the others wait for the first"
    second = w.step()
    assert second.num_rows == 8, "one row each: all but the last token of the prompt is there"
    assert len(second.copies) == 7, "the unfinished page is copied, since each writes into it"
    assert w.pool.num_pages - w.pool.num_free == 3 + 8, "three shared pages, one own each"
    w.drain()


def test_a_common_beginning_is_computed_once() -> None:
    w = world(num_pages=64, max_rows=64, max_num_seqs=8)
    system = text(4 * PAGE + 17, 7)
    rows = 0
    for seed in range(6):
        w.add(system + text(20, 100 + seed), answer=1)
    while w.scheduler.has_work:
        rows += w.step().num_rows
    assert rows <= len(system) + 6 * 21 + 17, "once the beginning, then what differs; few tokens are not waited for"


def test_a_finished_prompt_is_found_again_to_the_last_token_but_one() -> None:
    for length in (1, 2, 127, 128, 129, 256, 300):
        w = world()
        prompt = text(length)
        w.add(prompt, answer=3)
        w.drain()
        w.add(prompt, answer=3)
        step = w.step()
        assert step.num_rows == 1, length
        w.drain()


def test_tenants_share_nothing() -> None:
    w = world()
    prompt = text(300)
    w.add(prompt, answer=1, salt="one")
    w.drain()
    id = w.add(prompt, answer=2, salt="two")
    w.step()
    assert w.scheduler.sequences[id].num_cached == 0
    w.drain()


def test_pages_run_out_and_the_newest_gives_way() -> None:
    w = world(num_pages=4, max_rows=256, max_num_seqs=4)
    ids = [w.add(text(100, seed), answer=380) for seed in range(4)]
    w.drain()
    assert sorted(w.finished, key=lambda id: w.finished[id]) == ids, "in order"
    assert w.scheduler.counters.preemptions == 2, "two hold two pages each, then the newer gives its own back; twice"


def test_a_preempted_sequence_computes_only_what_was_reused() -> None:
    w = world(num_pages=6, max_rows=256, max_num_seqs=2)
    w.add(text(3 * PAGE - 10, 1), answer=20)
    second = w.add(text(2 * PAGE + 100, 2), answer=20, priority=1)
    w.step()
    w.step()
    w.step()
    urgent = w.add(text(PAGE, 3), answer=2, priority=-1)
    w.step()
    assert not w.scheduler.sequences[second].running and w.scheduler.sequences[urgent].running
    while not w.scheduler.sequences[second].running:
        w.step()
    assert w.scheduler.sequences[second].num_computed >= PAGE, "its first pages were still there"
    w.drain()


def test_nobody_starves_behind_higher_priorities() -> None:
    w = world(num_pages=8, max_rows=32, max_num_seqs=2)
    patient = w.add(text(40, 1), answer=10, priority=1)
    while patient not in w.finished:
        assert w.steps < 2 * PATIENCE
        if len(w.scheduler.waiting) < 4:
            w.add(text(30, w.steps), answer=12, priority=0)
        w.step()
    assert w.finished[patient] > PATIENCE, "and it did wait"
    w.drain()


def test_out_of_the_window_is_free_and_sinks_stay() -> None:
    w = world(num_pages=20, max_rows=64, retention=Retention(window=200, sinks=4))
    id = w.add(text(5), answer=1200)
    most = 0
    while id not in w.finished:
        w.step()
        most = max(most, w.pool.num_held)
        if id in w.scheduler.sequences and w.steps > 2:
            assert w.scheduler.sequences[id].pages[0] >= 0
    assert most <= 1 + 3, "the sinks' page, and those that 200 positions touch"


def test_failed_sequences_leave_nothing_behind() -> None:
    w = world()
    id = w.add(text(50), answer=100)
    w.step()
    w.cancel(id, keep=False)
    assert w.pool.num_idle == 0 and len(w.scheduler.tree) == 0


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 500])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (33, 0), (128, 4), (200, 130)])
def test_retention_is_what_rows_can_see(length: int, window: int | None, sinks: int) -> None:
    retention = Retention(window=window, sinks=sinks)
    seen = {
        position // PAGE
        for position in range(length + 1)
        if window is None or position > length - window or position < sinks
    }
    assert set(retention.needed(length)) == {page for page in seen if page < pages_for(length)}
    assert retention.peak(length, 1) <= pages_for(length)


def test_a_pool_counts_holders() -> None:
    pool = PagePool(2)
    a, b = pool.allocate(), pool.allocate()
    assert (a, b) == (0, 1)
    pool.share(a)
    pool.free([a, b])
    assert pool.num_free == 1 and pool.holders(a) == 1
    forgotten: list[int] = []
    pool.remember(a, forgotten.append)
    pool.free([a])
    assert pool.num_idle == 1 and not forgotten
    assert (pool.allocate(), pool.allocate()) == (1, 0), "blank pages first"
    assert forgotten == [0]
    pool.check()
    with pytest.raises(AssertionError, match="twice"):
        pool.free([0, 0])

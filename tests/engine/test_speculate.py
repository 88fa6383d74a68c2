"""Guessing: what is found, whose it is, how many guesses pay, and that nothing is guessed on credit."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snello.engine.cost import LearnedCost, StepTimes
from snello.engine.draft_model import HOPE
from snello.engine.engine import Engine
from snello.engine.governor import RETRY_STEPS, SHARE, Governor, Load, Source
from snello.engine.llm import LLM
from snello.engine.lookup import DEPTH, Lookup, Text
from snello.engine.native import NativeExecutor
from snello.engine.request import SamplingParams
from snello.engine.speculate import Ask
from snello.errors import SnelloError
from snello.models import load
from snello.models.spec import Deployment
from tests.engine.test_engine import AllThatIsGuessed, collect, said

REPEATED = "def add(a, b):\n    return a + b\n\n" * 6
SOURCE = Source("test", 0.5)


def times(first: float, each: float) -> StepTimes:
    """Steps of `first` milliseconds and `each` more a row."""
    line = LearnedCost(first, each, 0.0)
    known = StepTimes(line)
    for rows in range(1, 33):
        known.observe(rows, 0, first + each * rows)
    return known


FLAT, STEEP, DEAR = times(10.0, 0.1), times(0.0, 10.0), times(8.0, 2.0)


def ask(tokens: list[int], *, id: int = 1, salt: str = "", most: int = 15) -> Ask:
    return Ask(id, array("i", tokens), salt, most, 100, frozenset(), lambda logits, ahead: int(np.argmax(logits)))


def governor() -> Governor:
    made = AllThatIsGuessed()
    made.begin(Load(1, 10, FLAT), dict.fromkeys(range(100), 100))
    return made


# ---- what is found --------------------------------------------------------------------------------------------------


def guesses(lookup: Lookup, tokens: list[int], **names: Any) -> list[int]:
    asked = ask(tokens, **names)
    return list(lookup.draft([asked], governor()).get(asked.id, ()))


def test_where_most_tokens_agree_is_continued() -> None:
    lookup = Lookup(past=False)
    text = [1, 2, 3, 7, 8, 9, 5, 2, 3, 6, 1, 2, 3]
    assert guesses(lookup, text, most=2) == [7, 8], "three agree, though two did later"
    assert guesses(lookup, [1, 2, 3, 4], id=2) == []
    assert guesses(lookup, [1], id=3) == []
    assert guesses(lookup, [5, 2, 3, 5, 3], id=4) == [], "one is not enough"


def test_of_equal_places_what_followed_most_often_and_then_the_latest() -> None:
    lookup = Lookup(past=False)
    assert guesses(lookup, [1, 2, 7, 0, 1, 2, 7, 0, 1, 2, 9, 0, 4, 1, 2], most=1) == [7]
    assert guesses(lookup, [5, 1, 2, 7, 6, 1, 2, 9, 8, 1, 2], id=2, most=2) == [9, 8]


def test_places_agree_with_a_plain_search() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        text = random.integers(0, 4, random.integers(2, 40)).tolist()
        known = Text()
        for end in range(1, len(text) + 1):
            known.catch_up(array("i", text[:end]))
        length, places = known.places(known.newest())
        assert (length if length >= 2 else 0, sorted(places.tolist())) == plain_search(text), text


def plain_search(text: list[int]) -> tuple[int, list[int]]:
    for length in range(min(DEPTH, len(text) - 1), 1, -1):
        tail = text[len(text) - length :]
        found = [end for end in range(length, len(text)) if text[end - length : end] == tail]
        if found:
            return length, [DEPTH + end - 1 for end in found][-32:]
    return 0, []


def test_past_answers_are_continued_and_their_own_text_comes_first() -> None:
    lookup = Lookup(past=True)
    lookup.finished(7, [9, 9, 1, 2, 3, 4, 5, 6, 7], 2, "")
    assert guesses(lookup, [30, 1, 2, 3], most=3) == [4, 5, 6]
    assert guesses(lookup, [2, 3, 8, 8, 40, 2, 3], id=2, most=1) == [8], "as many agree in its own"
    assert guesses(Lookup(past=False), [30, 1, 2, 3]) == []


def test_no_guess_goes_from_one_answer_into_the_next() -> None:
    lookup = Lookup(past=True)
    for number in range(3):
        lookup.finished(number, [100 * number + each for each in range(20)], 0, "")
    for id, tokens in enumerate(([7, 15, 16, 17], [7, 115, 116, 117], [7, 215, 216, 217]), 10):
        assert guesses(lookup, tokens, id=id) == [tokens[-1] + 1, tokens[-1] + 2]
    assert guesses(lookup, [7, 118, 119], id=20) == []


def test_an_answer_to_the_same_end_of_a_prompt_is_found_from_its_first_token() -> None:
    lookup = Lookup(past=True)
    lookup.finished(1, [*range(100), 500, 501, 502], 100, "")
    assert guesses(lookup, [7, 7, *range(90, 100)], id=2, most=3) == [500, 501, 502]


def test_what_another_salt_said_is_never_a_guess() -> None:
    lookup = Lookup(past=True)
    lookup.finished(1, list(range(50)), 0, "theirs")
    assert guesses(lookup, [90, 10, 11, 12], id=2, salt="ours") == []
    assert guesses(lookup, [90, 10, 11, 12], id=3) == []
    assert guesses(lookup, [90, 10, 11, 12], id=4, salt="theirs", most=2) == [13, 14]


def test_past_answers_have_a_bound_the_salt_used_longest_ago_goes_first() -> None:
    lookup = Lookup(past=True, capacity=200)
    for number, salt in enumerate(("a", "b", "a", "c")):
        lookup.finished(number, [1000 * number + each for each in range(60)], 0, salt)
    assert guesses(lookup, [1, 1010, 1011], id=10, salt="b") == [], "gone"
    assert guesses(lookup, [1, 2010, 2011], id=11, salt="a", most=1) == [2012]
    for number in range(4, 60):
        lookup.finished(number, [1000 * number + each for each in range(60)], 0, "a")
        assert lookup._num_past <= 200
    assert lookup.memory_bytes < 20_000
    assert guesses(lookup, [1, 59010, 59011], id=12, salt="a", most=1) == [59012]
    assert guesses(lookup, [1, 2010, 2011], id=13, salt="a") == [], "the oldest went"


def test_what_ended_is_forgotten() -> None:
    lookup = Lookup(past=False)
    guesses(lookup, list(range(50)))
    assert lookup.memory_bytes
    lookup.forget(1)
    lookup.forget(1)
    assert not lookup.memory_bytes


def test_salts_in_the_engine() -> None:
    """The second request is the first again; it is faster only under the same salt."""
    model = load("demo")
    params = SamplingParams(max_tokens=80, seed=5, ignore_eos=True)
    steps = {}
    for salt in ("theirs", "ours"):
        with NativeExecutor(model, Deployment(context=256)) as executor:
            engine = Engine(executor, model.tokenizer, drafter=Lookup(past=True))
            engine.governor = AllThatIsGuessed()
            prompt = model.tokenizer.encode("import os\n\n\nclass Thing:\n")
            first = said(list(engine.stream(prompt, params, salt="theirs")))
            before = engine.counters.steps
            assert said(list(engine.stream(prompt, params, salt=salt))) == first
            steps[salt] = engine.counters.steps - before
    assert steps["theirs"] < 0.4 * steps["ours"]


@given(st.lists(st.integers(0, 6), min_size=3, max_size=120), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_the_filter_of_pairs_never_hides_a_place(tokens: list[int], piece: int) -> None:
    """Whatever was appended at once, and after the oldest were dropped."""
    text = Text()
    for first in range(0, len(tokens), piece):
        text.append(array("i", tokens[first : first + piece]))
        length, places = text.places(text.newest())
        assert not (length >= 2 and len(places)) or text.may_have(text.newest_pair())
        if len(text) > 60:
            text.drop_oldest(30)


def test_a_pair_that_is_new_is_not_looked_for() -> None:
    text = Text()
    text.append(array("i", range(2000)))
    assert sum(text.may_have((first, 5000 + first)) for first in range(500)) < 100
    assert all(text.may_have((first, first + 1)) for first in range(1998)) and not text.may_have((1998, 1999))


# ---- how many pay ---------------------------------------------------------------------------------------------------


def chosen(governor: Governor, id: int, times: StepTimes, most: int = 8, **names: Any) -> int:
    governor.begin(Load(1, 100, times), {id: 1000})
    return governor.worth(id, SOURCE, most, **names)


def seen(governor: Governor, id: int, proposed: int, accepted: int, rounds: int) -> None:
    for _ in range(rounds):
        chosen(governor, id, FLAT)
        governor._asked[id] = SOURCE
        governor.observe(id, proposed, accepted)


def test_guesses_that_are_right_grow_and_wrong_ones_stop() -> None:
    governor = Governor()
    seen(governor, 1, 4, 4, 30)
    assert chosen(governor, 1, FLAT) == 8
    seen(governor, 2, 4, 0, 30)
    assert chosen(governor, 2, FLAT) <= 1
    assert governor.accepted == 120 and governor.proposed == 240
    assert governor.tallies[SOURCE].proposed == 240


def test_rows_that_cost_a_whole_step_are_tried_seldom_and_less_and_less() -> None:
    governor = Governor()
    tried = []
    for step in range(1500):
        if chosen(governor, 1, STEEP):
            tried.append(step)
            governor.observe(1, 1, 0)
    gaps = np.diff([0, *tried]).tolist()
    assert gaps[0] >= RETRY_STEPS and gaps[1] > 1.5 * gaps[0] and gaps[2] > 1.5 * gaps[1]


def test_the_jump_between_groups_of_rows_is_not_crossed_for_little() -> None:
    """Four rows cost what one does, a fifth as much again, and the next eleven nothing."""
    known = StepTimes(LearnedCost(1.0, 0.2, 0.0))
    for rows in range(1, 33):
        known.observe(rows, 0, 1.0 + 0.05 * rows + 1.2 * (rows > 4) + 2.0 * (rows > 16))
    governor = Governor()
    seen(governor, 1, 2, 1, 20)  # half of them
    assert chosen(governor, 1, known, 15) <= 3
    seen(governor, 2, 15, 15, 40)
    assert chosen(governor, 2, known, 15) == 15


def test_a_token_saved_in_a_batch_is_worth_its_row_unless_somebody_waits() -> None:
    governor = Governor()
    seen(governor, 1, 4, 3, 30)
    alone, beside, waited = Load(1, 0, FLAT), Load(4, 0, FLAT), Load(4, 0, FLAT, waiting=True)
    granted = []
    for each in (alone, beside, waited):
        governor.begin(each, {1: 1000})
        granted.append(governor.worth(1, SOURCE, 8))
    assert granted[0] == 8 and granted[1] == 0 and granted[2] >= 4
    found = [each.token_ms() for each in (alone, beside, waited)]
    assert found == pytest.approx([10.1, 0.1, 10.4 / 4], rel=1e-6)


def test_what_a_right_guess_earns_is_what_it_was_granted_for() -> None:
    """Beside others a right guess pays for its row and not for a draft, whatever was saved up before."""
    governor = Governor()
    seen(governor, 1, 1, 1, 40)
    for _ in range(1000):
        governor.begin(Load(4, 0, FLAT), {1: 1000})
        governor._asked[1] = SOURCE
        governor.ran(FLAT, 5, 0, 1, 0)
        governor.pay(0.5)
        governor.observe(1, 1, 1)
    assert not governor.begin(Load(4, 0, FLAT), {1: 1000}), "what drafting took was never earned"


def test_drafts_that_cost_time_must_be_worth_that_too() -> None:
    governor = Governor()
    seen(governor, 1, 3, 2, 20)
    assert chosen(governor, 1, FLAT) >= 2
    assert chosen(governor, 1, FLAT, price=9.0) == 0


def test_nothing_is_guessed_on_credit_and_losses_are_a_share_of_the_time() -> None:
    """A drafter that costs half a step and is never right."""
    governor, spent, total = Governor(), 0.0, 0.0
    for _ in range(4000):
        total += 10.0
        if governor.begin(Load(1, 0, FLAT), {1: 1000}):
            governor.pay(5.0)
            spent += 5.0
        governor.earn(10.0)
    assert spent > 20.0, "it is tried"
    assert spent < SHARE * total + 60.0


def test_past_luck_pays_for_no_long_loss() -> None:
    governor = Governor()
    seen(governor, 1, 8, 8, 2000)
    spent = 0.0
    while governor.begin(Load(1, 0, FLAT), {1: 1000}):
        governor.pay(5.0)
        spent += 5.0
    assert spent < 40 * FLAT(1, 0)


def test_one_answers_luck_does_not_pay_for_the_next_ones_losses() -> None:
    """Guesses are right for long, then an answer comes of which all are wrong."""
    governor = Governor()
    lost = {}
    for id, right in ((1, True), (2, False), (3, False)):
        lost[id] = 0.0
        for _ in range(128):
            governor.begin(Load(1, 0, DEAR), {id: 128} if governor.may_guess(id) else {})
            count = governor.worth(id, SOURCE, 15) if governor.may_guess(id) else 0
            if count:
                governor.observe(id, count, count if right else 0)
                governor.ran(DEAR, 1 + count, 0, count, 0)
                lost[id] += DEAR(1 + count, 0) - DEAR(1, 0)
            governor.earn(DEAR(1 + count, 0))
        governor.forget(id)
    assert lost[1] > 200 * DEAR(1, 0), "all of it is guessed"
    assert 0 < lost[2] < 12 * DEAR(1, 0), "past luck allows eight times what is allowed without"
    assert lost[3] < 4 * DEAR(1, 0) and lost[3] < lost[2]


@pytest.mark.parametrize("known", [FLAT, DEAR])
def test_a_draft_model_that_may_pay_is_tried_in_a_short_answer(known: StepTimes) -> None:
    """A twentieth of the step for a guess, two steps of its own for the prompt."""
    governor, price = Governor(), known(1, 0) / 20
    governor.begin(Load(1, 0, known), {1: 64})
    source = Source("draft model", HOPE)
    assert governor.worth(1, source, 15, price=price) >= 2
    assert governor.affords(1, source, 2 * known(1, 0), 64, price)
    assert not governor.affords(1, source, 40 * known(1, 0), 64, price)


def test_who_is_overdrawn_rests_until_there_is_a_step_to_spend() -> None:
    governor = Governor()
    governor.begin(Load(1, 0, FLAT), {1: 1000})
    governor.pay(5 * FLAT(1, 0))
    rested = 0
    while governor.overdrawn:
        governor.earn(FLAT(1, 0))
        rested += 1
    assert rested == pytest.approx((1 + 1) / SHARE, abs=2)
    governor.pay(0.5 * FLAT(1, 0))
    governor.earn(FLAT(1, 0))
    assert not governor.overdrawn, "half of it is left"


def test_an_investment_is_due_when_its_sequence_ends() -> None:
    governor = Governor()
    governor.begin(Load(1, 0, FLAT), {1: 1000, 2: 1000})
    assert governor.affords(1, SOURCE, 20.0, 1000, 0.1)
    governor.pay(300.0, 1)
    governor.pay(301.0)
    assert governor.begin(Load(1, 0, FLAT), {1: 1000}), "1 ms was drafting"
    assert not governor.affords(2, SOURCE, 30.0, 2, 0.1), "nothing left, and too few tokens to earn it back"
    governor.forget(1)
    assert not governor.begin(Load(1, 0, FLAT), {1: 1000})


def test_step_times_follow_what_was_seen_and_forget_outliers() -> None:
    known = StepTimes(LearnedCost(1.0, 0.1, 0.0))
    for _ in range(50):
        known.observe(1, 0, 5.0)
        known.observe(8, 0, 6.0)
    assert known(1, 0) == pytest.approx(5.0) and known(8, 0) == pytest.approx(6.0)
    assert 5.0 < known(4, 0) < 6.0
    known.observe(1, 0, 500.0)
    assert known(1, 0) < 6.0
    assert known.age(1) == 0 and known.age(3) == float("inf")
    assert known.more(1, 0, 3, 0) == pytest.approx([known(1 + count, 0) - known(1, 0) for count in (1, 2, 3)])
    assert known.more(60, 0, 9, 0)[-1] >= 0
    for took in (30.0, 40.0, 50.0):
        known.observe(12, 0, took)
    assert known._seen[12] == pytest.approx(40.0), "such rows may cost many times what a prompt's do"


# ---- in the product -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("way", ["prompt-lookup", "suffix"])
def test_answers_are_the_same_with_and_without(way: str, temperature: float) -> None:
    names: dict[str, Any] = {"max_tokens": 96, "temperature": temperature, "seed": 5, "logprobs": 2, "ignore_eos": True}
    with LLM("demo") as plain, LLM("demo", speculate=way) as guessing:
        guessing.engine.governor = AllThatIsGuessed()
        prompts = [REPEATED, "import os\n", REPEATED + "class A:\n", REPEATED]
        for _ in range(2):
            ours, theirs = plain.generate(prompts, **names), guessing.generate(prompts, **names)
            assert [each.outputs for each in ours] == [each.outputs for each in theirs]
        assert guessing.engine.governor.accepted > 50


def test_an_answer_that_was_cancelled_is_not_remembered() -> None:
    with LLM("demo", speculate="suffix") as llm:
        before = llm.drafter.memory_bytes if llm.drafter else None
        for chunk in llm.stream("import os\n", max_tokens=60, seed=1, ignore_eos=True):
            if chunk.token_id is not None:
                break
        assert before == 0 and llm.drafter is not None and llm.drafter.memory_bytes == 0
        llm.generate("import os\n", max_tokens=60, seed=1, ignore_eos=True)
        assert llm.drafter.memory_bytes > 0


def test_an_error_in_one_request_leaves_guesses_of_others_alone() -> None:
    with LLM("demo", speculate="suffix") as llm:
        llm.engine.governor = AllThatIsGuessed()
        ids = llm.encode(REPEATED)
        good = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        nothing = SamplingParams(logit_bias=dict.fromkeys(range(llm.model.spec.vocab_size), -np.inf), max_tokens=3)
        expected = said(collect(llm.engine, [(ids, good)])[0])
        failed, fine = collect(llm.engine, [(ids, nothing), (ids, good)])
        assert failed[-1].error is not None and said(fine) == expected


def test_an_unknown_way_to_guess_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="magic") as caught:
        LLM("demo", speculate="magic")
    assert "suffix" in (caught.value.hint or "")
    with pytest.raises(SnelloError):
        LLM("demo", speculate=str(tmp_path / "nowhere"))

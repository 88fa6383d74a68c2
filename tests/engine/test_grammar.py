"""Answers that follow a grammar: whatever runs beside them, whoever guesses, and in their own log-probabilities."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from snello.engine import grammar
from snello.engine.grammar import GrammarCompiler
from snello.engine.llm import LLM
from snello.errors import SnelloError

SCHEMA = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"enum": ["apple", "pear"]}, "minItems": 2, "maxItems": 4}},
    "required": ["items"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo") as llm:
        yield llm


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> GrammarCompiler:
    return GrammarCompiler(llm.tokenizer, llm.model.spec.vocab_size, llm.model.spec.eos_tokens)


def test_every_answer_is_one_of_the_grammar(llm: LLM, grammars: GrammarCompiler) -> None:
    schema = grammars.compile("json", SCHEMA)
    for output in llm.generate(["x", "def f", "{"], grammar=schema, n=3, seed=1, max_tokens=80):
        for answer in output.outputs:
            items = json.loads(answer.text)["items"]
            assert 2 <= len(items) <= 4 and set(items) <= {"apple", "pear"} and answer.finish_reason == "stop"
    assert llm.generate("x", grammar=grammars.compile("choice", ["ja", "nein", "né"])).text in ("ja", "nein", "né")
    assert llm.generate("x", grammar=grammars.compile("grammar", 'start: "a" /b+/ "c"'), max_tokens=4).text[:2] == "ab"


@pytest.mark.parametrize("speculate", ["prompt-lookup", "suffix", "demo"])
def test_guesses_and_neighbours_change_nothing(llm: LLM, grammars: GrammarCompiler, speculate: str) -> None:
    """The draft `demo` is the model itself: nearly all its guesses are right, under the grammar too."""
    schema = grammars.compile("json", SCHEMA)
    prompts = ['{"items": ["apple", "pear", "apple"]}\n' * 3, "x", "def f(x):"]
    alone = [llm.generate(prompt, grammar=schema, seed=3, max_tokens=60).token_ids for prompt in prompts]
    with LLM("demo", speculate=speculate) as other:
        together = other.generate(prompts, grammar=schema, seed=3, max_tokens=60)
    assert [output.token_ids for output in together] == alone


def test_log_probabilities_are_the_models_own(llm: LLM, grammars: GrammarCompiler) -> None:
    """Not those of what the grammar leaves: scoring the same tokens gives the same numbers."""
    output = llm.generate("def f", grammar=grammars.compile("regex", "[xyz]{6}"), logprobs=1, seed=2)
    answer = output.outputs[0]
    scores = llm.score([*output.prompt_token_ids, *answer.token_ids]).log_probabilities
    assert answer.logprobs is not None
    said = [entry.logprob for entry in answer.logprobs]
    assert said == pytest.approx([float(value) for value in scores[len(output.prompt_token_ids) - 1 :]], abs=1e-5)
    assert min(said) < -1.0, "the model alone would hardly have said this"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json", {"type": "object", "not": {}}),
        ("json", {"type": "array", "uniqueItems": True}),
        ("json", {"type": "nonsense"}),
        ("json", {"type": "object", "not": {}, "x-guidance": {"lenient": True}}),
        ("json", {"$ref": "https://example.com/schema.json"}),
        ("regex", "["),
        ("regex", r"[^\s\S]"),
        ("grammar", "start: missing"),
    ],
)
def test_what_cannot_be_held_is_an_error(grammars: GrammarCompiler, kind: str, value: object) -> None:
    with pytest.raises(SnelloError, match="cannot be used") as caught:
        grammars.compile(kind, value)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message


def test_answers_to_the_same_grammar_are_apart(llm: LLM, grammars: GrammarCompiler) -> None:
    one = grammars.compile("regex", "[ab]{4}")
    first, second = one.start(), one.start()
    first.accept(llm.tokenizer.encode("a")[0])
    logits = llm.executor.logits(llm.encode("x"))[0]
    assert second.masked(logits).tobytes() == one.start().masked(logits).tobytes()
    assert not second.finished


# ---- what takes long ------------------------------------------------------------------------------------------------


def everything_said(llm: LLM, grammars: GrammarCompiler, kind: Any, value: Any, most: int = 60) -> str:
    """What a model without any preference says."""
    source, matcher, tokens = random.Random(1), grammars.compile(kind, value).start(), list[int]()
    while not matcher.finished and len(tokens) < most:
        allowed = np.flatnonzero(np.isfinite(matcher.masked(np.zeros(llm.model.spec.vocab_size, np.float32))))
        if (token := int(source.choice(allowed))) in llm.model.spec.eos_tokens:
            break
        tokens.append(token)
        matcher.accept(token)
    return llm.tokenizer.decode(tokens)


REPEATED = "(a{1000}){1000}"
MET = "start: TEXT\nTEXT: " + " & ".join(f"/(.*[a-z]{{{length}}}.*)/" for length in range(1, 40))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", REPEATED),
        ("grammar", f"start: /{REPEATED}/"),
        ("json", {"type": "string", "pattern": f"^{REPEATED}$"}),
    ],
)
def test_what_would_hold_up_other_answers_is_refused_before_it_runs(
    grammars: GrammarCompiler, kind: Any, value: object
) -> None:
    """Its first mask took half a second, and all answers of the step waited for it."""
    with pytest.raises(SnelloError, match="cannot be used: it is too complex to be held token by token$") as caught:
        grammars.compile(kind, value)
    assert caught.value.hint == grammar.SIMPLER


def test_intersections_without_number_are_refused_before_they_are_made(grammars: GrammarCompiler) -> None:
    """These took five minutes; what only looks like one does not count."""
    with pytest.raises(SnelloError, match="more than 8 intersections"):
        grammars.compile("grammar", MET)
    texts = 'start: TEXT | "&&&&&&&&&&" // & " & & & &\nTEXT: /[&]&&&&&&\\/&&&&&/ & /(.|\\n)*/ # & & & & & " &\n'
    assert grammars.compile("grammar", texts)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json", {"enum": [f"value {number * 7919 % 100003}" for number in range(3000)]}),
        ("choice", [f"value {number * 7919 % 100003}" for number in range(3000)]),
        ("choice", ["a", "ab", "abc"]),
        ("regex", "(" + "|".join(f"word{number * 7919 % 100003}" for number in range(3000)) + ")"),
        ("json", {"type": "object", "properties": {f"p{n}": {"type": ["string", "null"]} for n in range(1000)},
                  "additionalProperties": False}),
        ("json", {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 4000} for n in range(500)},
                  "required": [f"p{n}" for n in range(500)], "additionalProperties": False}),
        ("json", {"type": "string", "minLength": 2000, "maxLength": 9000}),
        ("json", {"type": "array", "items": {"type": "string", "maxLength": 500}, "minItems": 100, "maxItems": 2000}),
        ("regex", r"[\w.+-]{1,64}@([\w-]{1,63}\.){1,8}[a-z]{2,24}"),
        ("regex", r"(\w+ ){1,300}\w+"),
    ],
)  # fmt: skip
def test_large_grammars_that_people_have_are_held(
    llm: LLM, grammars: GrammarCompiler, kind: Any, value: object
) -> None:
    assert everything_said(llm, grammars, kind, value)


def test_choices_that_begin_alike_can_all_be_said(llm: LLM, grammars: GrammarCompiler) -> None:
    matcher = grammars.compile("choice", ["a", "ab"]).start()
    matcher.accept(llm.tokenizer.encode("a")[0])
    left = np.isfinite(matcher.masked(np.zeros(llm.model.spec.vocab_size, np.float32)))
    ends = [token for token in np.flatnonzero(left).tolist() if token in llm.model.spec.eos_tokens]
    assert ends and left[llm.tokenizer.encode("b")[0]]


def test_what_an_answer_may_say_hangs_on_no_other(
    llm: LLM, grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side, one after the other, with guesses between and alone: some meet a limit, always the same ones."""
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 5200)
    pattern, logits = r"(\w{1,30} ){40}", np.zeros(llm.model.spec.vocab_size, np.float32)

    def steps(seed: int, matcher: grammar.TokenMatcher, guessing: bool) -> Iterator[int]:
        """What a model without any preference says, at most 150 tokens; -1 where the grammar cannot be followed."""
        source = random.Random(seed)
        for _ in range(150):
            try:
                token = int(source.choice(np.flatnonzero(np.isfinite(matcher.masked(logits)))))
                for other in np.flatnonzero(np.isfinite(matcher.guessed(logits, [])))[:8].tolist() * guessing:
                    matcher.guessed(logits, [other])
                matcher.accept(token)
            except SnelloError:
                token = -1
            yield token
            if token == -1 or token in llm.model.spec.eos_tokens:
                return

    one = grammars.compile("regex", pattern, 3)
    alone = [list(steps(seed, grammars.compile("regex", pattern).start(), False)) for seed in range(6)]
    after = [list(steps(seed, one.start(), False)) for seed in range(6)]
    guessing = [list(steps(seed, one.start(), True)) for seed in range(6)]
    beside = list(itertools.zip_longest(*(steps(seed, one.start(), False) for seed in range(6))))
    ended = [said[-1] for said in alone]
    assert -1 in ended and set(ended) != {-1}
    assert (
        after
        == guessing
        == [[token for token in said if token is not None] for said in zip(*beside, strict=True)]
        == alone
    )


def test_a_reason_does_not_repeat_the_schema(grammars: GrammarCompiler) -> None:
    with pytest.raises(SnelloError) as caught:
        grammars.compile("regex", "(" * 3000)
    assert len(caught.value.message) < 300

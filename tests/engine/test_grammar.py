"""Answers that follow a grammar: whatever runs beside them, whoever guesses, and in their own log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

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
        ("grammar", "start: missing"),
    ],
)
def test_what_cannot_be_held_is_an_error(grammars: GrammarCompiler, kind: str, value: object) -> None:
    with pytest.raises(SnelloError, match="cannot be used") as caught:
        grammars.compile(kind, value)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message


def test_the_same_grammar_is_compiled_once_and_its_answers_are_apart(llm: LLM, grammars: GrammarCompiler) -> None:
    one = grammars.compile("regex", "[ab]{4}")
    assert grammars.compile("regex", "[ab]{4}") is one and grammars.compile("regex", "[ab]{5}") is not one
    first, second = one.start(), one.start()
    first.accept(llm.tokenizer.encode("a")[0])
    logits = llm.executor.logits(llm.encode("x"))[0]
    assert second.masked(logits).tobytes() == one.start().masked(logits).tobytes()
    assert not second.finished

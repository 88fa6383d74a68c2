"""Many requests at once say what each says alone, to the bit, whatever else happens to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import snello
from snello.engine.engine import Engine, EngineOptions, retention_of
from snello.engine.governor import Governor, Source
from snello.engine.native import NativeExecutor
from snello.engine.pages import Retention
from snello.engine.request import Chunk, SamplingParams
from snello.engine.sequence import Step
from snello.engine.speculate import Ask
from snello.errors import SnelloError
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native.core import NotFinite
from tests.checkpoints import make_checkpoint

CONTEXT = 512
POISON = 13


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def model_of(name: str, folder: Path) -> Model:
    if name == "demo":
        return load("demo")
    variant, _, dtype = name.partition("/")
    path = folder / name.replace("/", "-")
    types = {"": torch.float32, "bf16": torch.bfloat16}
    return load(path if path.exists() else make_checkpoint(path, variant, dtype=types[dtype]))


class Recorder(NativeExecutor):
    """Keeps the bytes of the logits after every beginning; refuses rows that begin a poisoned prompt."""

    def __init__(self, model: Model, deployment: Deployment) -> None:
        super().__init__(model, deployment)
        self.seen: dict[tuple[int, ...], bytes] = {}
        self.rows = self.copies = 0

    def run(self, step: Step) -> np.ndarray:
        row = 0
        for piece in step.pieces:
            if piece.start == 0 and piece.tokens[0] == POISON:
                super().run(Step(copies=step.copies))
                raise NotFinite(row)
            row += len(piece.tokens)
        logits = super().run(step)
        self.copies += len(step.copies)
        self.rows += row
        at = 0
        for piece in step.pieces:
            for end in range(piece.end - piece.num_outputs + 1, piece.end + 1):
                key = tuple(piece.sequence.tokens[: piece.start]) + tuple(piece.tokens[: end - piece.start])
                assert self.seen.setdefault(key, logits[at].tobytes()) == logits[at].tobytes()
                at += 1
        return logits


def requests(vocabulary: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings, of lengths around pages, each with settings of its own."""
    source = np.random.default_rng(3)
    shared = source.integers(20, min(vocabulary, 300), 200).tolist()
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2, "repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 20, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "min_p": 0.05, "seed": 4, "logit_bias": {25: 2.0}},
    ]
    lengths = [(0, 5), (128, 3), (127, 1), (200, 60), (200, 1), (64, 70), (0, 250), (150, 150), (1, 1)]
    made = []
    for number, (common, own) in enumerate(lengths):
        prompt = shared[:common] + source.integers(20, min(vocabulary, 300), own).tolist()
        names: dict[str, Any] = settings[number % len(settings)]
        made.append((prompt, SamplingParams(max_tokens=20 + 25 * (number % 4), ignore_eos=True, **names)))
    return made


def collect(engine: Engine, wanted: Sequence[tuple[list[int], SamplingParams]]) -> list[list[Chunk]]:
    """All at once; chunks by request."""
    numbers = [engine.add(prompt, params) for prompt, params in wanted]
    chunks: dict[int, list[Chunk]] = {number: [] for number in numbers}
    while engine.has_work:
        for number, chunk in engine.step():
            chunks[number].append(chunk)
    return [chunks[number] for number in numbers]


def said(chunks: Sequence[Chunk]) -> list[object]:
    """All but times."""
    return [replace(chunk, usage=None) for chunk in chunks]


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen3/bf16", "demo"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[list[object]]]:
    """A model and what it says to each request when it is alone in a cache of its own."""
    model = model_of(request.param, tmp_path_factory.getbasetemp())
    answers = []
    with NativeExecutor(model, Deployment(context=CONTEXT, threads=1)) as executor:
        for prompt, params in requests(model.spec.vocab_size):
            engine = Engine(executor, model.tokenizer, EngineOptions(max_num_seqs=1))
            answers.append(said(list(engine.stream(prompt, params))))
            engine.clear_cache()
    return model, answers


@pytest.mark.parametrize(
    ("chunk_rows", "room", "max_num_seqs", "step_ms"),
    [(256, 9, 16, 50.0), (64, 1, 8, 50.0), (7, 1, 6, 0.001), (256, 2, 9, 5.0), (33, 1, 3, 50.0)],
)
def test_many_at_once_are_each_alone(
    alone: tuple[Model, list[list[object]]], chunk_rows: int, room: int, max_num_seqs: int, step_ms: float
) -> None:
    model, expected = alone
    wanted = requests(model.spec.vocab_size)
    deployment = Deployment(context=CONTEXT, streams=room, chunk_rows=chunk_rows, threads=2)
    with Recorder(model, deployment) as executor:
        engine = Engine(executor, model.tokenizer, EngineOptions(max_num_seqs=max_num_seqs, step_ms=step_ms))
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        again = [said(chunks) for chunks in collect(engine, wanted[::-1])][::-1]
        assert again == expected, "with what the first round left in the cache"
        assert engine.counters.cached_tokens > 0
        executor.pages.check()
        assert executor.pages.num_free == executor.pages.num_pages
        compare_logits(executor, expected, wanted)


def compare_logits(
    executor: Recorder, expected: list[list[object]], wanted: Sequence[tuple[list[int], SamplingParams]]
) -> None:
    """Every row of logits that a token was drawn from, with memcmp."""
    compared = 0
    for (prompt, _), chunks in zip(wanted, expected, strict=True):
        answer = [chunk.token_id for chunk in chunks if isinstance(chunk, Chunk) and chunk.token_id is not None]
        whole = executor.logits([*prompt, *answer])
        for end in range(len(prompt), len(prompt) + len(answer)):
            assert executor.seen[tuple([*prompt, *answer][:end])] == whole[end - 1].tobytes()
            compared += 1
    assert compared > 300


def test_a_small_cache_forces_preemption(alone: tuple[Model, list[list[object]]]) -> None:
    model, _ = alone
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=300, ignore_eos=True)
    wanted = [([30 + number] * 100, params) for number in range(4)]
    with Recorder(model, Deployment(context=CONTEXT, threads=1)) as executor:
        engine = Engine(executor, model.tokenizer)
        expected = []
        for prompt, params in wanted:
            expected.append(said(list(engine.stream(prompt, params))))
            engine.clear_cache()
        assert not engine.counters.preemptions
        assert [said(chunks) for chunks in collect(engine, wanted)] == expected
        assert engine.counters.preemptions or retention_of(model.spec).window is not None


class AllThatIsGuessed(Governor):
    """Does not look at the clock."""

    @property
    def overdrawn(self) -> bool:
        return False

    def may_guess(self, id: int) -> bool:
        return True

    def worth(self, id: int, source: Source, most: int, *, price: float = 0.0, trial: int = 1) -> int:
        super().worth(id, source, most, price=price)
        self._asked[id] = source
        return most

    def affords(self, id: int, source: Source, ms: float, remaining: int, price: float) -> bool:
        return True


class Oracle:
    """A drafter that knows the texts: the right tokens, but for every seventh."""

    name, memory_bytes = "oracle", 0

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def draft(self, asks: Sequence[Ask], governor: Governor) -> dict[int, list[int]]:
        return {ask.id: self._after(list(ask.tokens))[: governor.worth(ask.id, SOURCE, 5)] for ask in asks}

    def _after(self, tokens: list[int]) -> list[int]:
        for whole in self.texts:
            if tokens == whole[: len(tokens)]:
                right = whole[len(tokens) :][:5]
                return [token if (len(tokens) + at) % 7 else 1 for at, token in enumerate(right)]
        return []

    def finished(self, id: int, tokens: Sequence[int], num_prompt: int, salt: str) -> None: ...
    def forget(self, id: int) -> None: ...
    def close(self) -> None: ...


SOURCE = Source("oracle", 0.5)


def test_guesses_change_no_token(alone: tuple[Model, list[list[object]]]) -> None:
    model, expected = alone
    wanted = requests(model.spec.vocab_size)
    texts = [
        [*prompt, *(chunk.token_id for chunk in chunks if isinstance(chunk, Chunk) and chunk.token_id is not None)]
        for (prompt, _), chunks in zip(wanted, expected, strict=True)
    ]
    steps = []
    for guesser in (None, Oracle(texts)):
        with Recorder(model, Deployment(context=CONTEXT, streams=9)) as executor:
            engine = Engine(executor, model.tokenizer, EngineOptions(step_ms=1000), guesser)
            engine.governor = AllThatIsGuessed()
            assert [said(chunks) for chunks in collect(engine, wanted)] == expected
            steps.append(engine.counters.steps)
    assert steps[1] < 0.5 * steps[0], "and they save steps"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[snello.LLM]:
    with snello.LLM(model_of("llama", tmp_path_factory.getbasetemp()), context=CONTEXT) as model:
        yield model


def test_a_list_of_prompts_gives_what_each_gives(llm: snello.LLM) -> None:
    prompts = [f"Number {number}: the rain in Spain" for number in range(40)]
    names: dict[str, Any] = {"seed": 3, "max_tokens": 12, "stop": "e", "n": 2}
    together = llm.generate(prompts, **names)
    for prompt, output in zip(prompts, together, strict=True):
        assert output.outputs == llm.generate(prompt, **names).outputs
    assert llm.generate([]) == []


def test_streams_in_turn_run_together(llm: snello.LLM) -> None:
    alone = [[chunk.token_id for chunk in llm.stream(text, seed=1, max_tokens=30)] for text in ("One", "Two")]
    before = llm.engine.counters.steps
    pairs = list(zip(llm.stream("One", seed=1, max_tokens=30), llm.stream("Two", seed=1, max_tokens=30), strict=False))
    assert [pair[0].token_id for pair in pairs] == alone[0][: len(pairs)]
    assert [pair[1].token_id for pair in pairs] == alone[1][: len(pairs)]
    assert llm.engine.counters.steps - before < 40


def test_cancelling_frees_at_once_and_disturbs_nobody(llm: snello.LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True)
    ids = [llm.encode(f"{number} once upon a time") for number in range(4)]
    expected = [said(list(llm.engine.stream(prompt, params))) for prompt in ids]
    numbers = [llm.engine.add(prompt, params) for prompt in ids]
    chunks: dict[int, list[Chunk]] = {number: [] for number in numbers}
    for step in range(200):
        if step == 10:
            held = llm.executor.pages.num_held
            llm.engine.cancel(numbers[1])
            assert llm.executor.pages.num_held == held - 1
            llm.engine.cancel(numbers[1])
        for number, chunk in llm.engine.step():
            chunks[number].append(chunk)
    assert not llm.engine.has_work and llm.executor.pages.num_held == 0
    for index in (0, 2, 3):
        assert said(chunks[numbers[index]]) == expected[index]
    assert len(chunks[numbers[1]]) < 40


def test_the_next_turn_of_a_conversation_computes_what_is_new(llm: snello.LLM) -> None:
    llm.engine.clear_cache()
    first = llm.answer(list(range(20, 220)), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert first.usage.cached_tokens == 0
    turn = [*first.prompt_token_ids, *first.token_ids, 21, 22, 23]
    second = llm.answer(turn, SamplingParams(temperature=0, max_tokens=5))
    assert second.usage.cached_tokens == len(turn) - 4, "all but the new tokens and the one that was drawn last"


def test_samples_share_their_prompt(llm: snello.LLM) -> None:
    llm.engine.clear_cache()
    before = llm.engine.counters.cached_tokens
    llm.answer(list(range(20, 220)), SamplingParams(seed=1, n=4, max_tokens=5, ignore_eos=True))
    assert llm.engine.counters.cached_tokens - before == 3 * 199


def test_a_row_that_is_not_finite_ends_its_request_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = model_of("llama", tmp_path_factory.getbasetemp())
    params = SamplingParams(seed=5, max_tokens=10, ignore_eos=True)
    with Recorder(model, Deployment(context=CONTEXT, streams=4)) as executor:
        engine = Engine(executor, model.tokenizer)
        expected = said(list(engine.stream([40, 41], params)))
        poisoned, fine = collect(engine, [([POISON, 50], params), ([40, 41], params)])
        assert said(fine) == expected
        assert len(poisoned) == 1 and poisoned[0].finish_reason == "error"
        assert "not finite" in str(poisoned[0].error)
        with pytest.raises(NotFinite):
            list(engine.stream([POISON], params))
        with pytest.raises(SnelloError, match=r"prompt 1: .*not finite"):
            engine.gather([[40], [POISON], [41]], params)
        assert not engine.has_work and executor.pages.num_held == 0


def test_an_activation_that_is_infinite_ends_its_request_alone(tmp_path: Path) -> None:
    """One token's embedding is infinite; met in a prompt, and in the middle of an answer."""
    path = make_checkpoint(tmp_path / "loud", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON, 0] = torch.inf
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = load(path)
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True, logit_bias={POISON: -np.inf})
    later = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias={POISON: 1000.0})
    good = [([40 + each] * 50, params) for each in range(4)]
    with NativeExecutor(model, Deployment(context=CONTEXT, streams=8)) as executor:
        engine = Engine(executor, model.tokenizer)
        expected = [said(chunks) for chunks in collect(engine, good)]
        engine.clear_cache()
        loud = ([60] * 20 + [POISON], params)
        *fine, first, second = collect(engine, [*good, loud, ([61, 62], later)])
        assert [said(chunks) for chunks in fine] == expected
        assert [chunk.finish_reason for chunk in first] == ["error"] and "not finite" in str(first[0].error)
        assert [chunk.token_id for chunk in second] == [POISON, None] and second[-1].finish_reason == "error"
        assert executor.pages.num_held == 0
        assert [said(chunks) for chunks in collect(engine, good)] == expected, "and nothing of it stays known"


def test_settings_that_exclude_every_token_end_one_request(llm: snello.LLM) -> None:
    nothing = dict.fromkeys(range(llm.model.spec.vocab_size), -np.inf)
    bad = SamplingParams(logit_bias=nothing, max_tokens=3)
    good = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    failed, fine = collect(llm.engine, [([40, 41], bad), ([40, 41], good)])
    assert failed[-1].error is not None and failed[-1].error.hint
    assert fine[-1].finish_reason == "length"


def test_what_a_user_can_get_wrong(llm: snello.LLM) -> None:
    with pytest.raises(SnelloError, match="prompt 1: this text is 600 tokens"):
        llm.generate(["fine", "," * 600])
    with pytest.raises(SnelloError, match="no tokens"):
        llm.engine.add([], SamplingParams())
    with pytest.raises(SnelloError, match="max_num_seqs is 0"):
        EngineOptions(max_num_seqs=0)
    assert not llm.engine.has_work


def test_sessions_that_hold_the_cache_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = model_of("llama", tmp_path_factory.getbasetemp())
    with NativeExecutor(model, Deployment(context=CONTEXT)) as executor, executor.session() as session:
        session.feed(list(range(20, 20 + 250)))
        engine = Engine(executor, model.tokenizer)
        engine.add(list(range(20, 20 + 250)), SamplingParams(max_tokens=200, ignore_eos=True))
        with pytest.raises(SnelloError, match="sessions hold 2 of its pages") as caught:
            while engine.has_work:
                engine.step()
        assert caught.value.hint
        session.close()
        while engine.has_work:
            engine.step()


def test_windows_of_all_layers_decide_what_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert retention_of(model_of("mistral-window", folder).spec) == Retention(window=33)
    assert retention_of(model_of("llama", folder).spec) == Retention()

"""Adapters in one batch: each row's bytes as if it were alone, those without one as if there were none, near the merged
model; what is known of one adapter's prompts is never another's; wrong ones are refused before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from snello.engine.draft_model import DraftModel
from snello.engine.engine import Engine, EngineOptions
from snello.engine.llm import LLM
from snello.engine.lookup import Lookup
from snello.engine.native import NativeExecutor
from snello.engine.prefix_store import PrefixStoreOptions
from snello.engine.request import Chunk, SamplingParams
from snello.engine.sequence import Step
from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.adapter import Adapter, write_adapter
from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Deployment, linear_shape
from snello.native import core
from snello.techniques.adapt import Adapt
from snello.techniques.adapt.merge import merge
from snello.techniques.adapt.prompt import behind, ids_of
from snello.techniques.adapt.train import Answer
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import make_checkpoint
from tests.engine.test_engine import AllThatIsGuessed, Oracle, model_of

CONTEXT = 256
NAMES = (None, "one", "two", "three", "prompt")
VIRTUAL = 5  # rows of the last
Request = tuple[str | None, list[int], SamplingParams]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    core.select_isa(None)


def made(model: Model, *, rank: int, targets: str, seed: int, size: float = 0.3) -> Adapter:
    """An adapter that changes much: random, of about `size` of the weights' own."""
    random, factors = np.random.default_rng(seed), {}
    for linear in Adapt(targets=targets).linears(model.spec):
        outputs, inputs = linear_shape(model.spec, linear)
        a = random.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
        b = random.normal(0, size * rank**-0.5, (outputs, rank)).astype(np.float32)
        factors[linear] = (a, b)
    return Adapter(factors=factors, rank=rank, alpha=2.0 * rank, scale=2.0, base=model.digest)


def all_kinds(model: Model) -> dict[str, Adapter]:
    """Of several ranks, over and under a panel's rows, and for some linears only, the third in BF16; and a prompt."""
    last = made(model, rank=3, targets="q,down", seed=3)
    halves = {
        linear: tuple((half.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for half in pair)
        for linear, pair in last.factors.items()
    }
    return {
        "one": made(model, rank=4, targets="attention,ffn", seed=1),
        "two": made(model, rank=21, targets="attention", seed=2),
        "three": replace(last, factors=halves),
        "prompt": prompt_of(model, VIRTUAL, seed=4),
    }


def prompt_of(model: Model, count: int, seed: int) -> Adapter:
    """Rows of about the size of the model's own."""
    own = model.weights.values("embedding.tokens.weight").std() * model.spec.embedding.scale
    rows = np.random.default_rng(seed).normal(0, own, (count, model.spec.hidden_size))
    return Adapter(prompt=rows.astype(np.float32), base=model.digest)


class Recorder(NativeExecutor):
    """Keeps the bytes of the logits after every beginning, by adapter; no two may differ."""

    def __init__(self, model: Model, deployment: Deployment, adapters: Any) -> None:
        super().__init__(model, deployment, adapters=adapters)
        self.seen: dict[tuple[int, ...], bytes] = {}

    def run(self, step: Step) -> np.ndarray:
        logits, at = super().run(step), 0
        for piece in step.pieces:
            for end in range(piece.end - piece.num_outputs + 1, piece.end + 1):
                known = (*piece.sequence.tokens[: piece.start], *piece.tokens[: end - piece.start])
                row = logits[at].tobytes()
                assert self.seen.setdefault((piece.sequence.adapter, *known), row) == row
                at += 1
        return logits


def requests(vocabulary: int) -> list[Request]:
    """The same prompts to all, so that whatever mixes adapters up is seen; lengths around pages; settings that draw."""
    random, found = np.random.default_rng(5), list[Request]()
    for number, length in enumerate((1, 128, 150)):
        prompt = random.integers(20, min(vocabulary, 300), length).tolist()
        prompt = [*prompt, *prompt[: min(20, length)]]
        for name in NAMES:
            draw: dict[str, Any] = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "seed": number}
            found.append((name, prompt, SamplingParams(max_tokens=8 + 3 * number, ignore_eos=True, **draw)))
    return found


def collect(engine: Engine, wanted: Sequence[Request], *, urgent: bool = False) -> list[list[object]]:
    """All at once; what was said, by request. `urgent`: now and then somebody comes who goes first."""
    numbers = [engine.add(prompt, params, adapter=name) for name, prompt, params in wanted]
    chunks: dict[int, list[Chunk]] = {number: [] for number in numbers}
    steps = 0
    while engine.has_work:
        steps += 1
        if urgent and steps in (5, 15, 25, 35):
            first = SamplingParams(max_tokens=3, seed=9, ignore_eos=True)
            engine.add([22 + steps] * 150, first, priority=-1, adapter="two")
        for number, chunk in engine.step():
            if number in chunks:
                chunks[number].append(replace(chunk, usage=None))
    return [list(chunks[number]) for number in numbers]


class Truth(NamedTuple):
    model: Model
    adapters: dict[str, Adapter]
    answers: list[list[object]]
    texts: list[list[int]]
    seen: dict[tuple[int, ...], bytes]


FORMATS: dict[str, tuple[str, Quantize | None]] = {
    "int4, int8 cache": ("llama", Quantize(cache="int8")),
    "int8": ("mistral-window", Quantize(weights="int8")),
    "int3": ("qwen3", Quantize(weights="int3", method="hqq", group_size=32)),
    "bf16": ("qwen3/bf16", None),
    "fp32, norms on both sides": ("gemma3", None),
}


@pytest.fixture(scope="module", params=FORMATS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Each request alone, in one thread, with its adapter alone, and for those without one with no adapter at all."""
    variant, recipe = FORMATS[request.param]
    model = model_of(variant, tmp_path_factory.getbasetemp())
    if recipe:
        model = recipe.apply(model, Context(output=tmp_path_factory.mktemp("lean") / "lean"))
    adapters, answers, texts, seen = all_kinds(model), [], [], {}
    core.select_isa(None)
    for number, name in enumerate(NAMES):
        own = {} if name is None else {name: adapters[name]}
        with Recorder(model, Deployment(context=CONTEXT, threads=1), own) as executor:
            for wanted in [each for each in requests(model.spec.vocab_size) if each[0] == name]:
                engine = Engine(executor, model.tokenizer, EngineOptions(max_num_seqs=1))
                answers.append((requests(model.spec.vocab_size).index(wanted), collect(engine, [wanted])[0]))
                engine.clear_cache()
            seen |= {(number - 1 if key[0] >= 0 else -1, *key[1:]): row for key, row in executor.seen.items()}
    said = [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]
    for (_, prompt, _), answer in zip(requests(model.spec.vocab_size), said, strict=True):
        texts.append([*prompt, *[chunk.token_id for chunk in answer if chunk.token_id is not None]])  # type: ignore[attr-defined]
    return Truth(model, adapters, said, texts, seen)


def check(truth: Truth, deployment: Deployment, *, guesses: str = "none", mix: int = 16, pages: int = 0) -> Engine:
    """Everything at once: every byte as alone. `pages`: so few are free, and others go first."""
    wanted = requests(truth.model.spec.vocab_size)
    with Recorder(truth.model, deployment, truth.adapters) as executor:
        drafter: Any = {"none": None, "oracle": Oracle(truth.texts), "suffix": Lookup(past=True)}.get(guesses)
        if guesses == "model":
            drafter = DraftModel(truth.model, executor, max_num_seqs=mix)
        held = [executor.pages.allocate() for _ in range(executor.pages.num_free - pages)] if pages else []
        engine = Engine(executor, truth.model.tokenizer, EngineOptions(max_num_seqs=mix), drafter)
        engine.governor = AllThatIsGuessed()
        assert collect(engine, wanted, urgent=pages > 0) == truth.answers
        if guesses in ("none", "suffix"):  # and with what is known by now
            assert collect(engine, wanted[::-1])[::-1] == truth.answers
        compared = [row == truth.seen[key] for key, row in executor.seen.items() if key in truth.seen]
        assert all(compared) and len(compared) >= len(truth.seen) * 0.9
        executor.pages.free(held)
        assert executor.pages.num_held == 0
        if drafter is not None:
            assert engine.governor.accepted > 0
            drafter.close()
    return engine


def test_adapters_say_other_things(truth: Truth) -> None:
    """Else nothing below would prove anything."""
    vocabulary = truth.model.spec.vocab_size
    first = [key for key in truth.seen if sum(token < vocabulary for token in key[1:]) == 2]
    assert len({truth.seen[key] for key in first}) == len(first) == len(NAMES)


def test_each_in_a_mix_as_alone(truth: Truth) -> None:
    check(truth, Deployment(context=CONTEXT, streams=16, threads=1))
    check(truth, Deployment(context=CONTEXT, streams=16, chunk_rows=33, threads=2), mix=5)


@pytest.mark.parametrize("guesses", ["oracle", "suffix", "model"])
def test_guessed(truth: Truth, guesses: str) -> None:
    check(truth, Deployment(context=CONTEXT, streams=16, chunk_rows=64, threads=2), guesses=guesses)


def test_preempted(truth: Truth) -> None:
    engine = check(truth, Deployment(context=CONTEXT, streams=1, chunk_rows=48, threads=2), pages=3)
    assert engine.counters.preemptions > 0


@pytest.mark.parametrize("isa", core.available_isas())
def test_every_instruction_set(truth: Truth, isa: str) -> None:
    text, wanted = truth.texts[-1][:48], requests(truth.model.spec.vocab_size)[: len(NAMES)]
    try:
        with Recorder(truth.model, Deployment(context=CONTEXT, chunk_rows=32, isa=isa), truth.adapters) as executor:
            engine = Engine(executor, truth.model.tokenizer)
            assert collect(engine, wanted) == truth.answers[: len(NAMES)]
            found = [executor.logits(text, adapter=name).tobytes() for name in NAMES]
        core.select_isa(None)
        with NativeExecutor(truth.model, Deployment(context=CONTEXT, threads=1), adapters=truth.adapters) as executor:
            assert found == [executor.logits(text, adapter=name).tobytes() for name in NAMES]
    finally:
        core.select_isa(None)


def test_every_row_count(truth: Truth) -> None:
    """1 to 40 rows of an adapter between rows of others: prefixes of one text, scored in one batch or row by row."""
    text = truth.texts[-1][:41]
    with NativeExecutor(truth.model, Deployment(context=CONTEXT, threads=2), adapters=truth.adapters) as executor:
        for name in NAMES:
            whole = executor.logits(text, adapter=name)
            for rows in (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 25, 31, 33, 40):
                assert executor.logits(text[:rows], adapter=name).tobytes() == whole[:rows].tobytes(), (name, rows)


# ---- beside the merged model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "most"), [("llama", 2e-5), ("qwen3/bf16", 2e-5)])
def test_near_the_merged_model(tmp_path_factory: pytest.TempPathFactory, variant: str, most: float) -> None:
    """Of float models the same up to rounding: of sums in another order, and of the merged weights to BF16."""
    model = model_of(variant, tmp_path_factory.getbasetemp())
    adapter = made(model, rank=6, targets="attention,ffn", seed=9)
    text = np.random.default_rng(1).integers(20, 300, 60)
    merged = merge(model, adapter, tmp_path_factory.mktemp("merged") / "merged")
    with NativeExecutor(model, adapters={"it": adapter}) as beside, NativeExecutor(merged) as inside:
        expected, plain = inside.logits(text), beside.logits(text)
        found = beside.logits(text, adapter="it")
    scale = expected.std()
    rounded = 0.02 if variant.endswith("bf16") else most
    assert np.abs(found - expected).max() < rounded * 5 * scale
    assert np.abs(plain - expected).max() > 0.5 * scale


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "qwen3/bf16", "gemma3", "gpt2"])
def test_a_prompt_is_what_the_reference_reads(tmp_path_factory: pytest.TempPathFactory, variant: str) -> None:
    """Behind a family's own multiplier and before its positions; the logits, the losses and their beginnings."""
    model = model_of(variant, tmp_path_factory.getbasetemp())
    plain_inputs = dataclasses.replace(model.spec.default_format, activations="float")  # as the reference's
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, default_format=plain_inputs))
    adapter = prompt_of(model, 40, seed=2)
    assert adapter.prompt is not None
    module = Reference.from_model(model)
    module.embedding.prompt = torch.nn.Parameter(torch.from_numpy(adapter.prompt))
    text = np.random.default_rng(1).integers(20, 300, 60).astype(np.int32)
    (answer,) = behind(ids_of(model.spec, 40), [Answer(text, 1)])
    with torch.no_grad():
        expected = module(torch.from_numpy(answer.tokens.astype(np.int64))[None])[0, 40:].numpy()
    deployment = Deployment(chunk_rows=17)  # a chunk ends inside the prompt
    with NativeExecutor(model, deployment, adapters={"other": prompt_of(model, 3, seed=1), "it": adapter}) as executor:
        plain, found = executor.logits(text), executor.logits(text, adapter="it")
        few = executor.logits(text, rows=[0, 7], adapter="it")
        scores, top = executor.score(text, adapter="it"), executor.score_top(text, 1, adapter="it")
    most = 0.03 if variant.endswith("bf16") else 1e-4
    assert np.abs(found - expected).max() < most * expected.std()
    assert np.abs(plain - expected).max() > 0.3 * expected.std()
    assert few.tobytes() == found[[0, 7]].tobytes()
    assert scores.log_probabilities.tolist() == [one.logprob for one in top]
    whole = expected - np.log(np.exp(expected.astype(np.float64)).sum(1, keepdims=True))
    assert np.allclose(scores.log_probabilities, whole[np.arange(59), text[1:]], atol=most)


def test_what_a_prompt_takes_is_not_the_askers(llama: Model) -> None:
    """Its rows are not counted as theirs, but take room; and no id of them can be asked for."""
    given = {"prompt": prompt_of(llama, 20, seed=0)}
    greedy = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True, repetition_penalty=1.5, logprobs=1)
    with LLM(llama, context=CONTEXT, threads=1, adapters=given, speculate="suffix") as llm:
        text = list(range(30, 60))
        answer = llm.answer(text, greedy, adapter="prompt")
        assert answer.usage.prompt_tokens == 30 and answer.usage.completion_tokens == CONTEXT - 20 - 30
        assert answer.finish_reason == "length"
        most = CONTEXT - 20 - 1
        assert llm.answer([30] * most, greedy, adapter="prompt").usage.completion_tokens == 1
        with pytest.raises(SnelloError, match=f"this text is {CONTEXT:,} tokens"):
            llm.answer([30] * (most + 1), greedy, adapter="prompt")
        with pytest.raises(SnelloError, match="outside the vocabulary"):
            llm.answer([llama.spec.vocab_size], greedy, adapter="prompt")
        with pytest.raises(SnelloError, match="outside the vocabulary"):
            llm.score([30, llama.spec.vocab_size], adapter="prompt")


# ---- what is kept apart ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("own") / "llama", "llama"))


def test_prefixes_on_disk_are_kept_apart(llama: Model, tmp_path: Path) -> None:
    adapters = all_kinds(llama)
    prompt = np.random.default_rng(2).integers(20, 300, 200).tolist()
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    options = PrefixStoreOptions(folder=tmp_path / "prefixes", audit=0.0)

    def ask(adapter: str | None, given: dict[str, Adapter]) -> tuple[tuple[int, ...], int]:
        with LLM(llama, context=CONTEXT, threads=1, prefixes=options, adapters=given) as llm:
            assert llm.store is not None
            llm.store._ms_per_mb = 0.0  # reading always pays
            return llm.answer(prompt, greedy, adapter=adapter).token_ids, llm.store.counters.hit

    alone = {name: ask(name, {} if name is None else {name: adapters[name]}) for name in NAMES}
    assert all(hit == 0 for _, hit in alone.values()), "another adapter's pages were taken"
    renamed = {"other": adapters["two"], "one": adapters["one"]}
    assert ask("other", renamed) == (alone["two"][0], 128), "the same adapter under another name and number"
    assert ask(None, adapters) == (alone[None][0], 128)


def test_pages_in_memory_are_kept_apart(llama: Model) -> None:
    prompt = np.random.default_rng(3).integers(20, 300, 140).tolist()
    greedy = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    with LLM(llama, context=CONTEXT, threads=1, adapters=all_kinds(llama)) as llm:
        first = [llm.answer(prompt, greedy, adapter=name) for name in NAMES]
        again = [llm.answer(prompt, greedy, adapter=name) for name in NAMES]
    assert all(output.usage.cached_tokens == 0 for output in first)
    assert all(output.usage.cached_tokens >= 128 - VIRTUAL for output in again)
    assert [output.token_ids for output in again] == [output.token_ids for output in first]


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_unknown_adapter_fails_that_request_alone(llama: Model) -> None:
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(llama, context=CONTEXT, threads=1, adapters=all_kinds(llama)) as llm:
        running = llm.engine.add([30, 31], greedy, adapter="one")
        with pytest.raises(SnelloError, match="no adapter 'four'") as caught:
            llm.engine.add([30, 31], greedy, adapter="four")
        assert caught.value.hint == "there are: one, two, three, prompt"
        events = []
        while llm.engine.has_work:
            events += llm.engine.step()
        assert {event.request for event in events} == {running}
    with LLM(llama, context=CONTEXT, threads=1) as llm, pytest.raises(SnelloError, match="no adapter 'one'"):
        llm.generate("a", adapter="one")


def test_what_does_not_fit_is_refused_at_load(llama: Model, tmp_path: Path) -> None:
    other = load(make_checkpoint(tmp_path / "other", "llama", seed=5))
    write_adapter(tmp_path / "adapter", made(llama, rank=4, targets="q", seed=0), llama)
    with LLM(llama, context=CONTEXT, adapters={"fits": tmp_path / "adapter"}) as llm:
        assert llm.executor.adapters.num_bytes > 0
        assert llm.generate("a", adapter="fits", max_tokens=2).usage.completion_tokens > 0
    with pytest.raises(SnelloError, match="another base"):
        LLM(other, context=CONTEXT, adapters={"x": tmp_path / "adapter"})
    with pytest.raises(SnelloError, match="holds no adapter"):
        LLM(llama, context=CONTEXT, adapters={"x": tmp_path})
    with pytest.raises(SnelloError, match="has no name"):
        LLM(llama, context=CONTEXT, adapters={"": tmp_path / "adapter"})
    wrong = made(llama, rank=4, targets="q", seed=0)
    name, (a, b) = next(iter(wrong.factors.items()))
    with pytest.raises(SnelloError, match="not finite"):
        LLM(llama, context=CONTEXT, adapters={"x": replace(wrong, factors={name: (a * np.inf, b)})})
    rows = np.full((2, llama.spec.hidden_size), np.nan, np.float32)
    with pytest.raises(SnelloError, match="not finite"):
        LLM(llama, context=CONTEXT, adapters={"x": Adapter(prompt=rows, base=llama.digest)})
    with pytest.raises(Unsupported, match=r"changes layers\.0\.ffn\.experts"):
        LLM(llama, context=CONTEXT, adapters={"x": replace(wrong, factors={"layers.0.ffn.experts.0.up": (a, b)})})

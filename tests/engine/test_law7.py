"""The same bits every time: one matrix of everything that may happen to a request, compared with `memcmp`.

What each request says alone, in one thread, in whole chunks, into an empty cache, is the truth: its tokens, its
log-probabilities and the bytes of the logits behind each. Every cell of the matrix (who else runs, how prompts are cut,
what the cache knows, who guesses, how scarce pages are, threads, instruction set) must give them again. Prompts recall:
they say things twice, so that what was stored wrongly would be said; others are random. In the default run every
value of every dimension occurs; the slow run takes their product, with two sizes of mix and chunk.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

from snello.engine.draft_model import DraftModel
from snello.engine.engine import Engine, EngineOptions
from snello.engine.lookup import SHORTEST, Lookup
from snello.engine.native import NativeExecutor
from snello.engine.pages import pages_for
from snello.engine.request import Chunk, SamplingParams
from snello.engine.sequence import Piece, Step
from snello.engine.sequence import Sequence as Known
from snello.engine.speculate import Drafter
from snello.errors import SnelloError
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native import core
from snello.techniques.base import Context, Technique
from snello.techniques.convolution import Convolution
from snello.techniques.quantize import Quantize
from tests.engine.test_engine import AllThatIsGuessed, Oracle, Recorder, collect, model_of, said

CONTEXT = 512
ROW_COUNTS = range(1, 68)
URGENT_STEPS = (8, 20, 32, 44, 90)  # in which somebody comes who goes first
Wanted = list[tuple[list[int], SamplingParams]]


class Cell(NamedTuple):
    """One way to run the requests."""

    mix: int = 16  # sequences at once
    chunk: int = 256  # rows of a step
    cache: str = "empty"  # "warm": all asked before; "partial": another request began like each
    guesses: str = "none"
    scarce: bool = False  # three pages, and now and then somebody with priority: running ones give way
    threads: int = 1
    isa: str | None = None


VALUES: dict[str, tuple[Any, ...]] = {
    "mix": (1, 3, 16),
    "chunk": (7, 33, 64, 256),
    "cache": ("empty", "warm", "partial"),
    "guesses": ("none", "prompt-lookup", "suffix", "model", "oracle"),
    "scarce": (False, True),
    "threads": (1, 2),
    "isa": tuple(core.available_isas()),
}
QUICK = (
    Cell(guesses="oracle", threads=2),
    Cell(mix=3, chunk=33, cache="warm", guesses="suffix", scarce=True),
    Cell(mix=16, chunk=64, cache="partial", guesses="model", threads=2),
    Cell(mix=1, chunk=7, cache="partial", guesses="prompt-lookup", threads=2),
    Cell(mix=16, chunk=7, cache="warm", guesses="model", scarce=True),
    Cell(mix=3, chunk=256, cache="empty", guesses="model", scarce=True, threads=2),
    Cell(mix=16, chunk=33, cache="partial", guesses="oracle", scarce=True, threads=2),
    Cell(mix=3, chunk=64, cache="warm", guesses="none"),
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    core.select_isa(None)


# ---- requests -------------------------------------------------------------------------------------------------------


def wanted(vocabulary: int) -> Wanted:
    """Recalling and random prompts of lengths around pages, greedy and sampled, some in several samples."""
    random = np.random.default_rng(7)

    def some(count: int) -> list[int]:
        return random.integers(20, min(vocabulary, 300), count).tolist()

    passage, shared = some(45), some(170)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.8, "seed": 1, "n": 2},
        {"temperature": 1.0, "top_p": 0.9, "seed": 2, "repetition_penalty": 1.2, "logprobs": 0},
        {"temperature": 0.7, "top_k": 30, "seed": 3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "stop": "zz"},
    ]
    prompts = [
        passage * 3,  # says it a third time, and goes on
        [*shared[:128], *passage, *shared[:30]],
        [*shared[:127], 21],
        shared[:128],
        [*shared[:150], *some(60)],
        [*passage, *some(20), *passage[:30]],
        some(1),
        some(129),
    ]
    return [
        (prompt, SamplingParams(max_tokens=24 + 13 * (number % 3), ignore_eos=True, **settings[number % 4]))
        for number, prompt in enumerate(prompts)
    ]


class Truth(NamedTuple):
    """What the requests say, and the bytes of the logits after each beginning."""

    model: Model
    draft: Model
    answers: list[list[object]]
    texts: list[list[int]]
    logits: dict[tuple[int, ...], bytes]


FORMATS: dict[str, tuple[str, Technique | tuple[Technique, ...]]] = {
    "int4, int8 cache": ("llama", Quantize(cache="int8")),
    "int8": ("mistral-window", Quantize(weights="int8")),
    "int8, static": ("qwen3", Quantize(weights="int8", method="smoothquant", activations="int8-static")),
    "bf16": ("qwen3/bf16", ()),
    "int4, convolutions": ("llama", (Convolution(layers="0,2", kernel=3), Quantize(cache="int8"))),
    "int8, layers that differ": ("gemma3", Quantize(weights="int8")),
    "int3, experts": ("qwen3-moe", Quantize(weights="int3", method="hqq", group_size=32)),
}


@pytest.fixture(scope="module", params=FORMATS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    variant, steps = FORMATS[request.param]
    recipe = steps if isinstance(steps, tuple) else (steps,)
    original = model_of(variant, tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("law7")
    calib = [np.random.default_rng(0).integers(1, original.spec.vocab_size, 100).astype(np.int32)]
    model = original
    for number, step in enumerate(recipe):
        model = step.apply(model, Context(output=folder / f"lean-{number}", windows=calib))
    draft = original if recipe else Quantize().apply(original, Context(output=folder / "draft"))
    answers, texts = [], []
    core.select_isa(None)
    with Recorder(model, Deployment(context=CONTEXT, threads=1)) as executor:
        for prompt, params in wanted(model.spec.vocab_size):
            engine = Engine(executor, model.tokenizer, EngineOptions(max_num_seqs=1))
            [chunks] = collect(engine, [(prompt, params)])
            engine.clear_cache()
            answers.append(ordered(chunks))
            for index in range(params.n):
                said_here = [chunk.token_id for chunk in chunks if chunk.index == index and chunk.token_id is not None]
                texts.append([*prompt, *said_here])
        logits = {}
        for text in texts:
            whole = executor.logits(text)
            logits |= {tuple(text[: end + 1]): whole[end].tobytes() for end in range(len(text))}
        assert all(logits[key] == row for key, row in executor.seen.items() if key in logits)
    return Truth(model, draft, answers, texts, logits)


def ordered(chunks: Sequence[Chunk]) -> list[object]:
    """All but times, answer by answer."""
    return said(sorted(chunks, key=lambda chunk: chunk.index))


# ---- the matrix -----------------------------------------------------------------------------------------------------


def drafter_of(cell: Cell, truth: Truth, executor: NativeExecutor) -> Drafter | None:
    if cell.guesses == "none":
        return None
    if cell.guesses == "model":
        return DraftModel(truth.draft, executor, max_num_seqs=cell.mix)
    if cell.guesses == "oracle":
        return Oracle(truth.texts)
    return Lookup(past=cell.guesses == "suffix")


def says_again(truth: Truth) -> bool:
    """Whether an answer comes upon words that its own text had before: random weights need not."""
    lengths = [len(prompt) for prompt, params in wanted(truth.model.spec.vocab_size) for _ in range(params.n)]
    for text, length in zip(truth.texts, lengths, strict=True):
        runs = [tuple(text[end - SHORTEST : end]) for end in range(SHORTEST, len(text))]
        if any(run in runs[:place] for place, run in enumerate(runs) if place + SHORTEST > length):
            return True
    return False


def check(cell: Cell, truth: Truth) -> Engine:
    """Runs all requests in this way and compares every byte."""
    requests = wanted(truth.model.spec.vocab_size)
    context = 256 if cell.scarce else CONTEXT
    streams = 1 if cell.scarce else len(truth.texts)
    deployment = Deployment(
        context=context, streams=streams, chunk_rows=max(cell.chunk, 1), threads=cell.threads, isa=cell.isa
    )
    with Recorder(truth.model, deployment) as executor:
        drafter = drafter_of(cell, truth, executor)
        if cell.scarce:  # and some of the pages are taken
            taken = [executor.pages.allocate() for _ in range(max(0, executor.pages.num_free - 3))]
        engine = Engine(executor, truth.model.tokenizer, EngineOptions(max_num_seqs=cell.mix), drafter)
        engine.governor = AllThatIsGuessed()
        prepare(cell, engine, requests)
        run = disturbed if cell.scarce else collect
        assert [ordered(chunks) for chunks in run(engine, requests)] == truth.answers, cell
        compared = [logits == truth.logits[key] for key, logits in executor.seen.items() if key in truth.logits]
        assert all(compared) and len(compared) > 200, (cell, len(compared))
        if cell.scarce:
            assert engine.counters.preemptions > 0, cell
            executor.pages.free(taken)
        executor.pages.check()
        assert executor.pages.num_held == 0
        if drafter is not None:
            silent = cell.chunk <= cell.mix or (cell.guesses == "prompt-lookup" and not says_again(truth))
            assert engine.governor.proposed > 0 or silent, cell
            drafter.close()
    return engine


def prepare(cell: Cell, engine: Engine, requests: Wanted) -> None:
    """What the cache knows before."""
    if cell.cache == "warm":
        collect(engine, requests)
    elif cell.cache == "partial":
        once = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        collect(engine, [([*prompt[: max(1, len(prompt) - 9)], 299, 298], once) for prompt, _ in requests])


def disturbed(engine: Engine, requests: Wanted) -> list[list[Chunk]]:
    """As `collect`, while others come who go first."""
    numbers = [engine.add(prompt, params) for prompt, params in requests]
    chunks: dict[int, list[Chunk]] = {number: [] for number in numbers}
    urgent = SamplingParams(max_tokens=3, seed=9, ignore_eos=True)
    for step in itertools.count():
        if not engine.has_work:
            break
        if step in URGENT_STEPS:
            engine.add([22 + step] * 150, urgent, priority=-1)
        for number, chunk in engine.step():
            if number in chunks:
                chunks[number].append(chunk)
    return [chunks[number] for number in numbers]


@pytest.mark.parametrize("cell", QUICK, ids=lambda cell: " ".join(map(str, cell)))
def test_every_value_once(truth: Truth, cell: Cell) -> None:
    engine = check(cell, truth)
    if cell.cache != "empty" and not cell.scarce:
        whole_pages_only = engine._executor.retention.takes_back is not None
        assert engine.counters.cached_tokens > (core.PAGE_POSITIONS if whole_pages_only else 300)


def test_the_quick_cells_hold_every_value() -> None:
    for name, values in VALUES.items():
        if name != "isa":
            assert {getattr(cell, name) for cell in QUICK} == set(values), name


@pytest.mark.parametrize("isa", core.available_isas())
def test_every_instruction_set(truth: Truth, isa: str) -> None:
    try:
        check(Cell(mix=16, chunk=64, guesses="oracle", threads=2, isa=isa), truth)
    finally:
        core.select_isa(None)


@pytest.mark.slow
@pytest.mark.parametrize("isa", core.available_isas())
@pytest.mark.parametrize("guesses", VALUES["guesses"])
@pytest.mark.parametrize("cache", VALUES["cache"])
def test_the_matrix(truth: Truth, isa: str, guesses: str, cache: str) -> None:
    try:
        rest = ((1, 16), (7, 64), VALUES["scarce"], VALUES["threads"])
        for mix, chunk, scarce, threads in itertools.product(*rest):
            check(Cell(mix, chunk, cache, guesses, scarce, threads, isa), truth)
    finally:
        core.select_isa(None)


# ---- row counts -----------------------------------------------------------------------------------------------------


def rows_of_one(executor: NativeExecutor, text: Sequence[int], count: int, known: Known) -> np.ndarray:
    """Logits of `count` rows of one sequence, as when that many guesses are verified."""
    start = known.num_computed
    piece = Piece(sequence=known, start=start, tokens=array("i", text[start : start + count]), num_outputs=count)
    return executor.run(Step(pieces=[piece]))


def rows_of_many(executor: NativeExecutor, text: Sequence[int], known: Sequence[Known]) -> np.ndarray:
    """Logits of one row each of many sequences, which are at different places."""
    pieces = [
        Piece(sequence=each, start=each.num_computed, tokens=array("i", [text[each.num_computed]]), num_outputs=1)
        for each in known
    ]
    return executor.run(Step(pieces=pieces))


def read(executor: NativeExecutor, text: Sequence[int], length: int) -> Known:
    """A sequence of which `length` tokens are computed."""
    known = Known(id=length, tokens=array("i", text), max_length=len(text))
    known.pages = array("i", [executor.pages.allocate() for _ in range(pages_for(length + max(ROW_COUNTS)))])
    for start in range(0, length, 64):
        tokens = array("i", text[start : min(length, start + 64)])
        executor.run(Step(pieces=[Piece(sequence=known, start=start, tokens=tokens)]))
    known.num_computed = length
    return known


@pytest.mark.parametrize("threads", [1, 2])
def test_every_row_count(truth: Truth, threads: int) -> None:
    """1 to 67 rows, of one sequence and of as many sequences, at places on both sides of a page's end.

    Where a page keeps only its last rows, so many cannot be taken back: the sequence is read again.
    """
    text = truth.texts[1]
    assert len(text) > 110 + max(ROW_COUNTS)
    deployment = Deployment(context=CONTEXT, streams=40, chunk_rows=256, threads=threads)
    with NativeExecutor(truth.model, deployment) as executor:
        one = read(executor, text, 110)
        many = [read(executor, text, 60 + 2 * number) for number in range(max(ROW_COUNTS))]
        for count in ROW_COUNTS:
            if executor.retention.takes_back is not None and count > executor.retention.takes_back:
                executor.pages.free(one.pages)
                one = read(executor, text, 110)
            rows = rows_of_one(executor, text, count, one)
            for row, logits in enumerate(rows):
                assert logits.tobytes() == truth.logits[tuple(text[: 110 + row + 1])], (count, row)
            rows = rows_of_many(executor, text, many[:count])
            for known, logits in zip(many, rows, strict=False):
                assert logits.tobytes() == truth.logits[tuple(text[: known.num_computed + 1])], count


@pytest.mark.slow
@pytest.mark.parametrize("isa", core.available_isas())
def test_every_row_count_on_every_instruction_set(truth: Truth, isa: str) -> None:
    text = truth.texts[1]
    try:
        with NativeExecutor(truth.model, Deployment(context=CONTEXT, streams=4, isa=isa)) as executor:
            one = read(executor, text, 110)
            for count in ROW_COUNTS:
                if executor.retention.takes_back is not None:
                    executor.pages.free(one.pages)
                    one = read(executor, text, 110)
                for row, logits in enumerate(rows_of_one(executor, text, count, one)):
                    assert logits.tobytes() == truth.logits[tuple(text[: 110 + row + 1])], (count, row)
    finally:
        core.select_isa(None)


# ---- a busy machine -------------------------------------------------------------------------------------------------


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many others that never rest."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_twice_as_many_busy_as_cores(truth: Truth) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with busy(2 * cores):
        check(Cell(chunk=64, cache="partial", guesses="oracle", threads=min(4, 2 * cores)), truth)


# ---- what is wrong in one request -----------------------------------------------------------------------------------


def test_one_bad_request_among_good_ones_changes_no_bit(truth: Truth) -> None:
    """Too long, too much, impossible settings: each ends or is refused alone, while the others run."""
    requests = wanted(truth.model.spec.vocab_size)[:4]
    vocabulary = truth.model.spec.vocab_size
    nothing = SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(range(vocabulary), -np.inf))
    with Recorder(truth.model, Deployment(context=256, streams=4)) as executor:
        engine = Engine(executor, truth.model.tokenizer, drafter=Lookup(past=True))
        engine.governor = AllThatIsGuessed()
        numbers = [engine.add(prompt, params) for prompt, params in requests]
        chunks: dict[int, list[Chunk]] = {number: [] for number in numbers}
        bad = engine.add([40, 41, 42], nothing)
        chunks[bad] = []
        steps = 0
        while engine.has_work:
            steps += 1
            if steps == 3:
                for prompt in ([30] * 256, [30] * 5000, [vocabulary], []):
                    with pytest.raises(SnelloError):
                        engine.add(prompt, SamplingParams())
            for number, chunk in engine.step():
                chunks[number].append(chunk)
        assert chunks[bad][-1].error is not None
        assert [ordered(chunks[number]) for number in numbers] == truth.answers[:4]
        assert executor.pages.num_held == 0

"""One call per request, on the real engine: the same answer from wherever it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snello.engine.llm import LLM
from snello.engine.request import Chunk, SamplingParams
from snello.errors import SnelloError
from snello.serve.caches.embed import NgramEmbedder
from snello.serve.caches.exact import ExactAnswers
from snello.serve.caches.front import AnswerCaches
from snello.serve.caches.guard import Guard
from snello.serve.caches.identity import Asked, ModelIdentity
from snello.serve.caches.lookup import Lookups
from snello.serve.caches.similar import SimilarAnswers, SimilarOptions
from tests.serve.caches.test_similar import ALSO_PARIS, PARIS, certificate

GREEDY = SamplingParams(max_tokens=6, temperature=0)
IDENTITY = ModelIdentity(weights="w", runs="s", tokenizer="t", recipe="r", context=512)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with LLM("demo", threads=1, context=512) as llm:
            yield llm


class Engine:
    """The engine as a server drives it, and how often it was asked."""

    def __init__(self, llm: LLM, reason: str | None = None) -> None:
        self.llm, self.begun, self.reason = llm, 0, reason

    def begin(self, asked: Asked) -> Any:
        async def generation() -> AsyncIterator[Chunk]:
            self.begun += 1
            for chunk in self.llm.engine.stream(asked.tokens, asked.params):
                yield replace(chunk, finish_reason=self.reason or chunk.finish_reason) if chunk.usage else chunk  # type: ignore[arg-type]
                await asyncio.sleep(0)

        return generation


def ask(llm: LLM, text: str, params: SamplingParams = GREEDY, **names: Any) -> Asked:
    return Asked(tokens=llm.encode(text), params=params, **names)


async def hear(caches: AnswerCaches, engine: Engine, asked: Asked, **names: Any) -> tuple[str, list[Chunk]]:
    async with caches.answer(asked, engine.begin(asked), **names) as reply:
        return reply.source, [replace(chunk, usage=None) async for chunk in reply.chunks]


def test_computed_then_joined_then_kept(llm: LLM, tmp_path: Path) -> None:
    async def scenario() -> None:
        caches, engine = AnswerCaches(IDENTITY, ExactAnswers(tmp_path)), Engine(llm)
        asked = ask(llm, "def main():")
        replies = await asyncio.gather(*(hear(caches, engine, asked) for _ in range(3)))
        assert [source for source, _ in replies] == ["computed", "flight", "flight"]
        source, chunks = await hear(caches, engine, asked)
        assert source == "exact" and all(said == chunks for _, said in replies) and engine.begun == 1
        caches.close()
        again = AnswerCaches(IDENTITY, ExactAnswers(tmp_path))
        assert await hear(again, engine, asked) == ("exact", chunks)
        other = AnswerCaches(replace(IDENTITY, weights="v"), ExactAnswers(tmp_path))
        assert (await hear(other, engine, asked))[0] == "computed"
        assert again.counters()["exact_hits"] == 1 and again.counters()["flight_begun"] == 0
        again.close()
        other.close()

    asyncio.run(scenario())


def test_what_may_differ_is_never_shared(llm: LLM, tmp_path: Path) -> None:
    async def scenario() -> None:
        caches, engine = AnswerCaches(IDENTITY, ExactAnswers(tmp_path)), Engine(llm)
        drawn = ask(llm, "x", SamplingParams(max_tokens=3))
        replies = await asyncio.gather(*(hear(caches, engine, drawn) for _ in range(2)))
        assert [source for source, _ in replies] == ["computed"] * 2 and engine.begun == 2
        seeded = ask(llm, "x", SamplingParams(max_tokens=3, seed=1))
        await asyncio.gather(hear(caches, engine, seeded), hear(caches, engine, replace(seeded, salt="other")))
        assert engine.begun == 4
        caches.close()

    asyncio.run(scenario())


def test_a_client_that_wants_nothing_kept_or_nothing_old(llm: LLM, tmp_path: Path) -> None:
    async def scenario() -> None:
        caches, engine = AnswerCaches(IDENTITY, ExactAnswers(tmp_path)), Engine(llm)
        asked = ask(llm, "def main():")
        await hear(caches, engine, asked, keep=False)
        assert (await hear(caches, engine, asked))[0] == "computed"
        assert (await hear(caches, engine, asked, read=False))[0] == "computed"
        assert (await hear(caches, engine, asked, keep=False))[0] == "exact" and engine.begun == 3
        caches.close()

    asyncio.run(scenario())


def test_half_an_answer_and_a_failed_one_are_not_kept(llm: LLM, tmp_path: Path) -> None:
    async def scenario() -> None:
        caches, engine = AnswerCaches(IDENTITY, ExactAnswers(tmp_path)), Engine(llm)
        asked = ask(llm, "def main():")
        async with caches.answer(asked, engine.begin(asked)) as reply:
            async for _ in reply.chunks:
                break
        assert not llm.engine.has_work, "who leaves alone ends the generation"

        async def broken() -> AsyncIterator[Chunk]:
            yield Chunk(text="half")
            raise SnelloError("it broke", "mend it")

        with pytest.raises(SnelloError, match="it broke"):
            async with caches.answer(asked, broken) as reply:
                _ = [chunk async for chunk in reply.chunks]
        assert (await hear(caches, engine, asked))[0] == "computed"
        caches.close()

    asyncio.run(scenario())


def test_a_similar_question(llm: LLM, tmp_path: Path) -> None:
    async def scenario(audit: float) -> None:
        embedder = NgramEmbedder()
        proof = certificate(embedder.digest)
        similar = SimilarAnswers(embedder, Guard(), proof, SimilarOptions(audit=audit), seed=1)
        lookups = Lookups(similar, seconds=20)
        caches = AnswerCaches(IDENTITY, ExactAnswers(tmp_path / str(audit)), lookups)
        engine = Engine(llm, reason="stop")

        async def chat(question: str, **names: Any) -> tuple[str, list[Chunk]]:
            messages = [{"role": "user", "content": question}]
            return await hear(caches, engine, ask(llm, question, **names), messages=messages)

        first = await chat(PARIS)
        assert first[0] == "computed"
        source, chunks = await chat(ALSO_PARIS)
        assert source.startswith("similar; source=") and chunks == first[1], "audited or not, it is given at once"
        while caches._audits:
            await asyncio.sleep(0.01)
        await lookups.find(b"n", "has all been done?")
        assert similar.counters.audited == audit and similar.serves
        assert (await chat(PARIS))[0] == "exact"
        assert (await chat(ALSO_PARIS, salt="somebody else"))[0] == "computed"
        assert (await chat("What is the capital of Spain?"))[0] == "computed"
        caches.exact.clear()  # type: ignore[union-attr]
        assert (await chat(ALSO_PARIS))[0] == "computed", "an answer that is gone is not given"
        caches.close()
        lookups.close()

    asyncio.run(scenario(0.0))
    asyncio.run(scenario(1.0))


def test_cancelled_in_every_phase(llm: LLM, tmp_path: Path) -> None:
    async def scenario() -> None:
        caches, engine = AnswerCaches(IDENTITY, ExactAnswers(tmp_path)), Engine(llm)
        asked = ask(llm, "def main():", SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        for turns in range(40):
            tasks = [asyncio.create_task(hear(caches, engine, asked, read=turns % 2 == 0)) for _ in range(2)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not llm.engine.has_work and llm.executor.pages.num_held == 0 and not len(caches.flights)
        assert len((await hear(caches, engine, asked))[1]) == 13
        caches.close()

    asyncio.run(scenario())

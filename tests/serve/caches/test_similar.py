"""The cache of similar questions: silent until proved, gated, and silent again when it is found to be wrong."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.engine.llm import LLM
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.serve.caches.certify import Certificate
from snello.serve.caches.embed import EncoderEmbedder, NgramEmbedder, Vectors, minilm_folder
from snello.serve.caches.guard import Guard
from snello.serve.caches.identity import Asked, ModelIdentity
from snello.serve.caches.similar import SimilarAnswers, SimilarOptions, namespace_of, question_of, same_answer
from tests.serve.caches.test_guard import COUNTED, NAMED, TURNED

SPACE = b"n" * 32
PARIS, ALSO_PARIS = "What is the capital of France?", "What's the capital of France?"


class Everything:
    """An embedder to which all questions are the same: what is refused then, is refused by the other gates."""

    dimension = 2
    digest = "everything"

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.tile(np.array([1, 0], np.float32), (len(texts), 1))


def certificate(embedder: str, threshold: float = 0.5, guard: str = Guard().digest) -> Certificate:
    return Certificate(
        threshold=threshold,
        epsilon=0.05,
        confidence=0.95,
        hits=100,
        wrong=0,
        questions=200,
        embedder=embedder,
        guard=guard,
    )


def cache(certified: bool = True, embedder: Any = None, **names: Any) -> SimilarAnswers:
    embedder = embedder or NgramEmbedder()
    options = names.pop("options", SimilarOptions(audit=0.0))
    proof = certificate(embedder.digest, names.pop("threshold", 0.5)) if certified else None
    return SimilarAnswers(embedder, Guard(), proof, options, seed=1, **names)


def test_a_similar_question_is_found_and_says_where_its_answer_comes_from() -> None:
    similar = cache()
    assert similar.find(SPACE, PARIS) is None
    assert similar.keep(SPACE, PARIS, b"k" * 32, finish_reason="stop")
    found = similar.find(SPACE, ALSO_PARIS)
    assert found is not None and found.key == b"k" * 32 and found.question == PARIS and not found.audit
    assert found.header.startswith("similar; source=6b6b6b6b6b6b6b6b; similarity=0.") and "<=0.05" in found.header
    assert "France" not in found.header
    assert (similar.counters.asked, similar.counters.hits, similar.counters.empty) == (2, 1, 1)


def test_nothing_is_served_without_a_proof() -> None:
    similar = cache(certified=False)
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    assert similar.find(SPACE, PARIS) is None and similar.counters.silent == 1 and not similar.serves


def test_a_proof_of_something_else_is_refused() -> None:
    for wrong in (certificate("another"), certificate(NgramEmbedder().digest, guard="another")):
        with pytest.raises(SnelloError, match="another embedder"):
            SimilarAnswers(NgramEmbedder(), Guard(), wrong)


@pytest.mark.parametrize(("one", "other"), [*TURNED, *COUNTED, *NAMED])
def test_another_question_gets_no_answer_however_near_it_is(one: str, other: str) -> None:
    """Polarity flips (GPTCache's issue 694), changed numbers and names, with an embedder that sees no difference."""
    similar = cache(embedder=Everything())
    assert similar.keep(SPACE, one, b"k", finish_reason="stop")
    assert similar.find(SPACE, one) is not None
    assert similar.find(SPACE, other) is None and similar.counters.guarded == 1


def test_below_the_threshold_is_no_hit() -> None:
    similar = cache(threshold=0.99)
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    assert similar.find(SPACE, ALSO_PARIS) is None and similar.counters.far == 1


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        *((PARIS, reason) for reason in ("length", "error", "tool_calls", None)),
        *((question, "stop") for question in ("", "  ", "x" * 3000, "What is the weather?")),
    ],
)
def test_what_is_not_admitted(question: str, reason: str | None) -> None:
    similar = cache()
    assert not similar.keep(SPACE, question, b"k", finish_reason=reason)
    assert len(similar) == 0 and similar.counters.refused == 1


# ---- namespaces -----------------------------------------------------------------------------------------------------

IDENTITY = ModelIdentity(weights="w", runs="s", tokenizer="t", recipe="r", context=512)
SAY: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
ASKED = Asked(tokens=(1, 2), params=SamplingParams(temperature=0), url="chat")


def test_a_namespace_is_everything_but_the_question() -> None:
    def space(asked: Asked = ASKED, identity: ModelIdentity = IDENTITY, history: Any = SAY) -> bytes | None:
        return namespace_of(identity, asked, history)

    same = space(dataclasses.replace(ASKED, tokens=(9, 9, 9)))
    others = [
        space(dataclasses.replace(ASKED, salt="tenant")),
        space(dataclasses.replace(ASKED, url="completions")),
        space(dataclasses.replace(ASKED, params=SamplingParams(temperature=0, max_tokens=9))),
        space(identity=dataclasses.replace(IDENTITY, adapter="a")),
        space(history=[]),
        space(history=[*SAY, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]),
    ]
    assert same == space() and None not in others and len({space(), *others}) == len(others) + 1


def test_some_requests_have_no_namespace() -> None:
    for params in (SamplingParams(), SamplingParams(seed=1, n=2), SamplingParams(seed=1, logprobs=0)):
        assert namespace_of(IDENTITY, dataclasses.replace(ASKED, params=params), SAY) is None
    for fields in ({"tools": [{}]}, {"response_format": {"type": "json_object"}}):
        assert namespace_of(IDENTITY, dataclasses.replace(ASKED, fields=fields), SAY) is None
    assert namespace_of(IDENTITY, dataclasses.replace(ASKED, fields={"tools": []}), SAY) is not None


def test_the_question_is_the_last_message_of_the_user() -> None:
    ask = {"role": "user", "content": "why?"}
    assert question_of([*SAY, ask]) == (SAY, "why?")
    for messages in ([], SAY, [ask, *SAY], [{"role": "user", "content": ["x"]}], [{**ask, "name": "me"}]):
        assert question_of(messages) is None


def test_namespaces_share_nothing() -> None:
    similar = cache(embedder=Everything())
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    assert similar.find(b"other", PARIS) is None and similar.counters.empty == 1


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go() -> None:
    similar = cache(options=SimilarOptions(max_entries=50, audit=0))
    questions = [f"What does word{number}x mean?" for number in range(200)]
    for number, question in enumerate(questions):
        similar.keep(SPACE if number % 2 else b"m", question, str(number).encode(), finish_reason="stop")
        first = similar.find(b"m", questions[0])
        assert first is not None and first.key == b"0", "what is used stays"
    assert len(similar) == 50 and similar.counters.evicted == 150
    for number in range(151, 200):
        found = similar.find(SPACE if number % 2 else b"m", questions[number])
        assert found is not None and found.key == str(number).encode()


def test_what_is_old_is_forgotten() -> None:
    now = [0.0]
    similar = cache(options=SimilarOptions(ttl_seconds=10, audit=0), clock=lambda: now[0])
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    now[0] = 9
    assert similar.find(SPACE, PARIS)
    now[0] = 11
    assert similar.find(SPACE, PARIS) is None and similar.counters.expired == 1 and len(similar) == 0


def test_asked_again_replaces_and_forgotten_is_gone() -> None:
    similar = cache()
    for key in (b"old", b"new"):
        similar.keep(SPACE, PARIS, key, finish_reason="stop")
    found = similar.find(SPACE, PARIS)
    assert found is not None and found.key == b"new" and len(similar) == 1
    similar.forget(SPACE, PARIS)
    similar.forget(SPACE, PARIS)
    assert similar.find(SPACE, PARIS) is None
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    similar.clear()
    assert len(similar) == 0 and similar.find(SPACE, PARIS) is None


def test_threads_may_share_it() -> None:
    similar = cache(options=SimilarOptions(max_entries=20, audit=0.5))

    def work(number: int) -> None:
        for turn in range(60):
            question = f"What does word{(number * 7 + turn) % 40}x mean?"
            similar.keep(SPACE, question, question.encode(), finish_reason="stop")
            found = similar.find(SPACE, question)
            assert found is None or found.key == found.question.encode()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(similar) <= 20 and similar.counters.hits > 100


def test_options_that_make_no_sense() -> None:
    for wrong in ({"max_entries": 0}, {"ttl_seconds": 0}, {"audit": 2}):
        with pytest.raises(SnelloError, match="max_entries"):
            SimilarOptions(**wrong)


# ---- the audit ------------------------------------------------------------------------------------------------------


def test_a_share_of_hits_is_audited() -> None:
    similar = cache(options=SimilarOptions(audit=0.25))
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    audits = sum(bool(found and found.audit) for found in (similar.find(SPACE, PARIS) for _ in range(200)))
    assert 30 <= audits <= 70


def test_wrong_audits_demote_it_for_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "certificate.json"
    similar = cache(path=path)
    similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
    similar.judged(right=True)
    for _ in range(20):
        similar.judged(right=False)
    assert not similar.serves and similar.find(SPACE, PARIS) is None and "not served any more" in caplog.text
    saved = Certificate.load(path)
    assert saved.revoked and "hits were wrong" in saved.revoked
    again = SimilarAnswers(NgramEmbedder(), Guard(), saved, path=path)
    again.keep(SPACE, PARIS, b"k", finish_reason="stop")
    assert again.find(SPACE, PARIS) is None, "a restart changes nothing"
    again.judged(right=True)


def test_right_audits_change_nothing() -> None:
    similar = cache()
    for _ in range(500):
        similar.judged(right=True)
    assert similar.serves and similar.counters.audited == 500


def test_the_strict_judge() -> None:
    assert same_answer("It is  Paris.", "it is paris.") and not same_answer("Paris", "London")


# ---- embedders ------------------------------------------------------------------------------------------------------


def test_pieces_of_words() -> None:
    embedder = NgramEmbedder()
    one, same, near, far = embedder.embed([PARIS, PARIS.upper(), ALSO_PARIS, "How do I bake bread?"])
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-6) and (one == same).all()
    assert one @ near > 0.8 > 0.4 > one @ far
    assert embedder.embed(["", "\ud800", "日本"]).shape == (3, 1024) and embedder.embed([]).shape == (0, 1024)
    assert (embedder.embed([PARIS, "x"])[0] == embedder.embed(["y", PARIS])[1]).all()
    with pytest.raises(SnelloError, match="dimension"):
        NgramEmbedder(0)


def test_an_encoder_on_our_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models.test_loading import sentence_folder  # imports torch

    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path / "cache"))
    with LLM(sentence_folder(tmp_path / "bert"), threads=1) as llm:
        embedder = EncoderEmbedder(llm)
        vectors = embedder.embed(["abc abc", "xyz", "abc abc"])
        assert vectors.shape == (3, embedder.dimension) and (vectors[0] == vectors[2]).all()
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        assert embedder.embed([]).shape == (0, embedder.dimension) and embedder.digest != llm.model.digest
        similar = cache(embedder=embedder)
        similar.keep(SPACE, PARIS, b"k", finish_reason="stop")
        assert similar.find(SPACE, PARIS) is not None
        longer = "abc " * llm.executor.context
        assert not embedder.embed([longer + "yes", longer + "no"]).any(), "they differ where the encoder does not look"
        monkeypatch.setattr(llm, "encode", lambda text: [])
        assert not embedder.embed([""]).any()


def test_the_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SnelloError) as caught:
        minilm_folder()
    assert "snello[similar]" in str(caught.value.hint)

"""Exact answers: another key for everything that may change one, and never a wrong byte from the file."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from snello.engine.grammar import TokenGrammar
from snello.engine.llm import LLM
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.serve.caches import exact
from snello.serve.caches.exact import NAME, ExactAnswers, complete, from_bytes, to_bytes
from snello.serve.caches.identity import Asked, ModelIdentity, _plain, key_of, plain_params, tokenizer_digest
from snello.serve.openai import CHAT, read_request, settings
from snello.serve.openai import ChatRequest as Chat

IDENTITY = ModelIdentity(weights="w", runs="s", tokenizer="t", recipe="r", context=512)
PARAMS = SamplingParams(temperature=0.0)
ASKED = Asked(tokens=(1, 2, 3), params=PARAMS, url=CHAT, fields={"tools": [{"name": "f"}], "echo": False})


# ---- keys -----------------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "logit_bias": {3: 1.0},
    "seed": 7,
    "stop": ("x",),
    "stop_token_ids": (4,),
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "logprobs": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "min_p": 0.1,
    "top_k": 3,
    "n": 2,
    "max_tokens": 9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "grammar": TokenGrammar("regex a+", lambda: None, ()),  # never started
}


def test_every_setting_changes_the_key() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert sorted(OTHER) == sorted(names), "a new setting needs a value here"
    keys = {key_of(IDENTITY, ASKED)}
    for name in names:
        params = dataclasses.replace(PARAMS, **{name: OTHER[name]})
        keys.add(key_of(IDENTITY, dataclasses.replace(ASKED, params=params)))
    assert len(keys) == len(names) + 1


def test_everything_else_that_is_asked_changes_the_key() -> None:
    others: list[dict[str, Any]] = [
        {"tokens": (1, 2, 4)}, {"tokens": (1, 2)}, {"url": "/v1/completions"}, {"salt": "tenant"}, {"fields": None},
        {"fields": {**ASKED.fields, "echo": True}}, {"fields": {**ASKED.fields, "tools": [{"name": "g"}]}},
        {"fields": {**ASKED.fields, "response_format": {"type": "json_object"}}},
        {"fields": {**ASKED.fields, "tool_choice": "required"}},
    ]  # fmt: skip
    assert len({key_of(IDENTITY, dataclasses.replace(ASKED, **other)) for other in [{}, *others]}) == len(others) + 1


def test_everything_about_the_model_changes_the_key() -> None:
    names = [field.name for field in dataclasses.fields(ModelIdentity)]
    keys = {key_of(IDENTITY, ASKED)}
    for name in names:
        value = getattr(IDENTITY, name)
        other = value + 1 if isinstance(value, int) else value + "x"
        keys.add(key_of(dataclasses.replace(IDENTITY, **{name: other}), ASKED))
    assert len(keys) == len(names) + 1


def shuffled(value: Any, source: random.Random) -> Any:
    """The same JSON, its tables in another order."""
    if isinstance(value, list):
        return [shuffled(item, source) for item in value]
    if not isinstance(value, dict):
        return value
    items = list(value.items())
    source.shuffle(items)
    return {name: shuffled(item, source) for name, item in items}


BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "top_p": 1, "max_tokens": 9, "seed": 3,
    "logit_bias": {"5": 2, "3": -1}, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2, "n": 2,
}  # fmt: skip


def key_of_body(body: Mapping[str, Any]) -> bytes:
    request = read_request(CHAT, body)
    assert isinstance(request, Chat)
    return key_of(
        IDENTITY, Asked(tokens=(1,), params=settings(request.sampling, {}), url=CHAT, fields={"tools": TOOLS})
    )


TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"]}}}]


def test_the_order_of_json_and_the_spelling_of_numbers_do_not_change_the_key() -> None:
    source = random.Random(1)
    key = key_of_body(BODY)
    for _ in range(20):
        assert key_of_body(shuffled(BODY, source)) == key
    assert key_of_body({**BODY, "temperature": 0.0, "top_p": 1.0, "logit_bias": {"3": -1.0, "5": 2.0}}) == key
    same = [dataclasses.replace(ASKED, fields=shuffled({"tools": TOOLS, "echo": True}, source)) for _ in range(20)]
    assert len({key_of(IDENTITY, each) for each in same}) == 1


def test_a_default_that_is_spelt_out_is_the_same_request() -> None:
    short = {"messages": BODY["messages"], "seed": 1}
    spelt = {**short, "temperature": 1, "top_p": 1.0, "n": 1, "presence_penalty": 0, "logit_bias": {}, "stop": []}
    assert key_of_body(short) == key_of_body(spelt)


def test_only_what_would_be_said_again_is_deterministic() -> None:
    for names, wanted in (({}, False), ({"seed": 0}, True), ({"temperature": 0}, True), ({"top_k": 1}, False)):
        assert Asked(tokens=(1,), params=SamplingParams(**names)).deterministic is wanted


def test_a_key_survives_any_text() -> None:
    odd = dataclasses.replace(ASKED, salt="\ud800 ü \x00", fields={"x": "\udfff"})
    assert key_of(IDENTITY, odd) != key_of(IDENTITY, ASKED)
    assert json.dumps(plain_params(PARAMS))


def test_an_identity_is_of_a_model_and_its_tokenizer(llm: LLM) -> None:
    identity = ModelIdentity.of(llm.executor)
    assert identity.weights == llm.model.digest and identity.context == 512
    other = dataclasses.replace(llm.tokenizer, chat_templates={"default": "{{ messages }}"})
    assert tokenizer_digest(other) != identity.tokenizer == tokenizer_digest(llm.tokenizer)


def test_a_setting_that_is_an_object_is_known_by_its_source() -> None:
    class Rule:
        def __init__(self, source: str) -> None:
            self.source = source

    one, same, other = (_plain(Rule(source)) for source in ("a", "a", "b"))
    assert one == same != other
    with pytest.raises(AttributeError):
        _plain(object())


# ---- answers as bytes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with LLM("demo", threads=1, context=512) as llm:
            yield llm


def test_an_answer_comes_back_as_it_was_said(llm: LLM, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=12, seed=4, n=2, logprobs=3, stop=("zzz",))
    chunks = list(llm.engine.stream(llm.encode("def main():"), params))
    answers = ExactAnswers(tmp_path)
    key = key_of(ModelIdentity.of(llm.executor), Asked(tokens=llm.encode("def main():"), params=params))
    assert answers.get(key) is None and complete(chunks, 2)
    answers.put(key, to_bytes(chunks))
    answers.close()
    found = ExactAnswers(tmp_path).get(key)
    assert found is not None
    again = from_bytes(found)
    strip = [dataclasses.replace(chunk, usage=None) for chunk in chunks]
    assert [dataclasses.replace(chunk, usage=None) for chunk in again] == strip
    counts = [(c.usage.prompt_tokens, c.usage.completion_tokens) for c in again if c.usage]
    assert (
        counts == [(c.usage.prompt_tokens, c.usage.completion_tokens) for c in chunks if c.usage] and len(counts) == 2
    )
    assert next(iter(llm.engine.stream(llm.encode("def main():"), params))).text == again[0].text


def test_half_an_answer_is_not_one(llm: LLM) -> None:
    chunks = list(llm.engine.stream(llm.encode("x"), SamplingParams(max_tokens=3, seed=1, n=2, ignore_eos=True)))
    assert complete(chunks, 2) and not complete(chunks[:-1], 2) and not complete([], 1)
    failed = [*chunks[:-1], dataclasses.replace(chunks[-1], finish_reason="error")]
    assert not complete(failed, 2)


# ---- the file -------------------------------------------------------------------------------------------------------


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def answer(number: int, size: int = 400) -> bytes:
    return random.Random(number).randbytes(size)


def test_answers_outlast_the_process_and_the_least_used_go(tmp_path: Path) -> None:
    answers = ExactAnswers(tmp_path, limit_bytes=60_000)
    for number in range(300):
        answers.put(key(number), answer(number))
        assert answers.get(key(0)) == answer(0), "what is used stays"
        assert answers.counters.bytes <= 60_000
    assert answers.counters.evicted > 150 and answers.get(key(1)) is None
    answers.close()
    again = ExactAnswers(tmp_path, limit_bytes=60_000)
    assert again.get(key(0)) == answer(0) and again.get(key(299)) == answer(299)
    assert again.counters.bytes == answers.counters.bytes
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 60_000 * 3
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}
    again.close()


def test_an_answer_out_of_proportion_is_not_kept(tmp_path: Path) -> None:
    answers = ExactAnswers(tmp_path, limit_bytes=10_000)
    answers.put(key(1), b"x" * 5_000)
    assert answers.get(key(1)) is None and answers.counters.too_large == 1


def test_replaced_forgotten_cleared(tmp_path: Path) -> None:
    answers = ExactAnswers(tmp_path)
    answers.put(key(1), b"old")
    answers.put(key(1), b"newer")
    assert answers.get(key(1)) == b"newer" and answers.counters.bytes == 5 + exact.ROW_BYTES
    answers.forget(key(1))
    assert answers.get(key(1)) is None and answers.counters.bytes == 0
    answers.put(key(2), b"x")
    answers.clear()
    assert answers.get(key(2)) is None
    answers.close()
    answers.close()
    answers.put(key(1), b"x")
    assert answers.get(key(1)) is None, "after its end it knows nothing, and harms nobody"


def test_a_row_that_was_changed_is_not_given(tmp_path: Path) -> None:
    answers = ExactAnswers(tmp_path)
    for number in range(3):
        answers.put(key(number), answer(number))
    other = sqlite3.connect(tmp_path / NAME)
    other.execute("UPDATE answers SET answer = ? WHERE key = ?", (answer(9), key(0)))
    row = other.execute("SELECT answer, checksum FROM answers WHERE key = ?", (key(2),)).fetchone()
    other.execute("UPDATE answers SET answer = ?, checksum = ? WHERE key = ?", (*row, key(1)))  # somebody else's answer
    other.commit()
    other.close()
    assert answers.get(key(0)) is None and answers.get(key(1)) is None and answers.get(key(2)) == answer(2)
    assert answers.counters.damaged == 2
    answers.close()


def test_a_flipped_bit_anywhere_is_never_a_wrong_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = ExactAnswers(tmp_path / "whole")
    for number in range(40):
        whole.put(key(number), answer(number))
    whole.close()
    content = (tmp_path / "whole" / NAME).read_bytes()
    source, found, aside = random.Random(3), 0, 0
    places = [*range(0, 100, 3), *(source.randrange(len(content)) for _ in range(150))]
    folder = tmp_path / "damaged"
    folder.mkdir()
    for place in places:
        for path in folder.iterdir():
            path.unlink()
        damaged = bytearray(content)
        damaged[place] ^= 1 << source.randrange(8)
        (folder / NAME).write_bytes(damaged)
        answers = ExactAnswers(folder)
        for number in range(40):
            got = answers.get(key(number))
            assert got in (None, answer(number)), place
            found += got is not None
        answers.put(key(99), b"new")
        assert answers.get(key(99)) in (b"new", None)
        aside += answers.counters.set_aside
        answers.close()
    assert found > 2000 and aside > 10 and "was damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 99, b"SQLite format 3\x00", os.urandom(5000)])
def test_a_file_that_is_none_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    answers = ExactAnswers(tmp_path)
    answers.put(key(1), b"x")
    assert answers.get(key(1)) == b"x"
    assert answers.counters.set_aside == (1 if content else 0)
    assert not content or (tmp_path / f"{NAME}.damaged").read_bytes() == content
    answers.close()


def test_another_programs_database_is_set_aside_whole(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / NAME)
    other.execute("CREATE TABLE precious (x)")
    other.execute("INSERT INTO precious VALUES (1)")
    other.commit()
    other.close()
    ExactAnswers(tmp_path).close()
    kept = sqlite3.connect(tmp_path / f"{NAME}.damaged")
    assert kept.execute("SELECT x FROM precious").fetchall() == [(1,)]
    kept.close()


def test_a_disk_that_refuses_costs_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ExactAnswers(tmp_path)
    answers.put(key(1), b"x")
    blocker = sqlite3.connect(tmp_path / NAME, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    answers.put(key(2), b"y")
    assert answers.counters.failed == 1 and answers.get(key(1)) == b"x"
    blocker.execute("ROLLBACK")
    blocker.close()
    answers.put(key(2), b"y")
    assert answers.get(key(2)) == b"y"
    answers._database.execute("PRAGMA max_page_count = 1")  # type: ignore[union-attr]  # as small as it is now: full
    for number in range(3, 200):
        answers.put(key(number), answer(number, 4000))
    assert answers.counters.failed > 1 and answers.get(key(1)) == b"x"
    answers.close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SnelloError, match="cannot hold answers"):
        ExactAnswers(tmp_path / "file")
    with pytest.raises(SnelloError, match="limit_bytes"):
        ExactAnswers(tmp_path, limit_bytes=0)


def _write_for_ever(folder: Path) -> None:
    answers = ExactAnswers(folder, limit_bytes=100_000)
    for number in range(10**9):
        answers.put(key(number), answer(number))


def test_killed_at_any_moment(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for turn in range(2):
        process = context.Process(target=_write_for_ever, args=(tmp_path,))
        process.start()
        until = time.monotonic() + 20
        while time.monotonic() < until and not _rows(tmp_path / NAME) > turn * 20:
            time.sleep(0.02)
        time.sleep(0.1 + turn / 17)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        answers = ExactAnswers(tmp_path, limit_bytes=100_000)
        rows = [row[0] for row in answers._database.execute("SELECT key FROM answers")]  # type: ignore[union-attr]
        assert len(rows) > 5 and answers.counters.set_aside == 0
        assert all(answers.get(each) == answer(int.from_bytes(each, "big")) for each in rows)
        answers.close()


def _rows(path: Path) -> int:
    try:
        database = sqlite3.connect(path)
        count = database.execute("SELECT count(*) FROM answers").fetchone()[0]
        database.close()
    except sqlite3.Error:
        return -1
    return int(count)

"""Files of requests: order, resuming to the same bytes wherever a call was killed, bad lines among good ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.cli import main
from snello.engine.llm import LLM
from snello.engine.native import NativeExecutor
from snello.engine.sequence import Step
from snello.errors import SnelloError
from snello.native.core import NotFinite
from snello.serve import batch
from snello.serve.batch import BatchOptions, Progress, answer_file
from snello.serve.batch_file import read_line
from tests.checkpoints import make_checkpoint
from tests.serve.world import make_encoder

ROOT = Path(__file__).resolve().parents[2]
DEMO = BatchOptions(model="demo", max_num_seqs=4)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


def request(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Mapping[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def many(count: int = 12) -> list[dict[str, Any]]:
    """Answers of very different lengths, so that they finish out of order; the first is the longest."""
    lengths = [60 if place == 0 else 3 + 7 * place % 23 for place in range(count)]
    return [
        request(f"r{place}", prompt=f"def f{place}(x):\n", max_tokens=length, ignore_eos=True)
        for place, length in enumerate(lengths)
    ]


def answer(source: Path, output: Path, options: BatchOptions = DEMO) -> Progress:
    *_, last = answer_file(source, output, options)
    return last


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def text(line: Mapping[str, Any], index: int = 0) -> str:
    choice = line["response"]["body"]["choices"][index]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def failure(line: Mapping[str, Any]) -> tuple[int, str]:
    """Status and message; a line that says that it failed says so in both places."""
    said = line["response"]["body"]["error"]
    assert line["error"]["code"] == said["code"] and said["message"] in line["error"]["message"]
    return line["response"]["status_code"], said["message"]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_stand_in_the_order_of_the_requests_and_are_those_of_the_engine(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line | {"body": line["body"] | {"seed": 7}} for line in many()), "")
    last = answer(source, tmp_path / "out")
    lines = read(tmp_path / "out")
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in many()]
    with LLM("demo") as llm:
        for asked, line in zip(many(), lines, strict=True):
            body = asked["body"]
            alone = llm.generate(body["prompt"], max_tokens=body["max_tokens"], ignore_eos=True, seed=7)
            assert text(line) == alone.text and line["error"] is None and line["response"]["status_code"] == 200
            usage = line["response"]["body"]["usage"]
            assert usage["completion_tokens"] == body["max_tokens"] and usage["prompt_tokens"] == len(
                alone.prompt_token_ids
            )
    assert (last.requests, last.done, last.failed, last.known) == (12, 12, 0, 0)
    assert last.completion_tokens == last.tokens == sum(line["body"]["max_tokens"] for line in many())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_engine_never_holds_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    step = batch.Engine.step

    def watched(engine: batch.Engine) -> Any:
        held.append(engine.num_running + engine.num_waiting)
        return step(engine)

    monkeypatch.setattr(batch.Engine, "step", watched)
    source = write(tmp_path / "in", *many(40))
    answer(source, tmp_path / "out", dataclasses.replace(DEMO, max_num_seqs=2))
    assert max(held) == 2 * batch.AHEAD
    assert len(read(tmp_path / "out")) == 40


def test_the_same_bytes_for_any_way_to_run(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *many())
    answer(source, tmp_path / "one")
    answer(source, tmp_path / "other", dataclasses.replace(DEMO, threads=1, max_num_seqs=9, speculate="prompt-lookup"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_a_deployment_forgets_is_forgotten_for_every_line(tmp_path: Path) -> None:
    prompt = "".join(f"def f{place}(x):\n    return x + {place}\n" for place in range(12))
    body = {"max_tokens": 24, "seed": 3, "ignore_eos": True}
    lines = [request(f"r{n}", prompt=prompt + "\n" * n, **body) for n in range(3)]
    source = write(tmp_path / "in", *lines)
    answer(source, tmp_path / "all")
    answer(source, tmp_path / "out", dataclasses.replace(DEMO, keep_first=2, keep_last=6))
    with LLM("demo", keep_first=2, keep_last=6) as llm:
        alone = [llm.generate(line["body"]["prompt"], max_tokens=24, seed=3, ignore_eos=True) for line in lines]
    assert [text(line) for line in read(tmp_path / "out")] == [each.text for each in alone]
    assert (tmp_path / "out").read_bytes() != (tmp_path / "all").read_bytes()


def test_samples_prompts_echo_and_stop(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        request("n", prompt=["a = ", "b = "], n=3, max_tokens=5, seed=1),
        request("last", prompt="b = ", max_tokens=5, seed=1 + 5),
        request("echo", prompt="a = ", echo=True, max_tokens=5, seed=1),
        request("stop", prompt="def f(x):\n    return", stop="\n", temperature=0),
        request("logprobs", prompt="a = ", logprobs=2, max_tokens=3, temperature=0),
    )
    answer(source, tmp_path / "out")
    several, last, echo, stop, scored = read(tmp_path / "out")
    choices = several["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) > 1
    assert choices[5]["text"] == text(last), "the i-th answer is drawn with seed + i"
    assert text(echo) == "a = " + choices[0]["text"]
    assert stop["response"]["body"]["choices"][0]["finish_reason"] == "stop" and "\n" not in text(stop)
    listed = scored["response"]["body"]["choices"][0]["logprobs"]
    assert "".join(listed["tokens"]) == text(scored)
    assert all(
        value == max(top.values()) for value, top in zip(listed["token_logprobs"], listed["top_logprobs"], strict=True)
    )


def test_a_request_without_a_seed_is_drawn_by_its_name(tmp_path: Path) -> None:
    for name in ("one", "other"):
        lines = [request("a", prompt="x = ", max_tokens=30), request("b", prompt="x = ", max_tokens=30)]
        lines = lines if name == "one" else [request("new", prompt="y", max_tokens=2), *lines]
        answer(write(tmp_path / f"{name}.in", *lines), tmp_path / name)
    one, other = read(tmp_path / "one"), read(tmp_path / "other")
    assert [text(line) for line in one] == [text(line) for line in other[1:]]
    assert text(one[0]) != text(one[1])


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "chatty", "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def test_a_chat_goes_through_the_template(tmp_path: Path, chatty: Path) -> None:
    chat = request("chat", CHAT, messages=[{"role": "user", "content": "hi"}], max_tokens=9, seed=3, model=str(chatty))
    chat["body"] |= {"logprobs": True, "top_logprobs": 1}
    plain = request("plain", prompt="[user]hi[assistant]", max_tokens=9, seed=3, model=str(chatty))
    source = write(tmp_path / "in", chat, plain)
    answer(source, tmp_path / "out", BatchOptions())
    said, same = read(tmp_path / "out")
    body = said["response"]["body"]
    assert text(said) == text(same) and body["object"] == "chat.completion" and body["model"] == "chatty"
    assert len(body["choices"][0]["logprobs"]["content"]) >= 8


def test_an_encoder_gives_vectors(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert")
    source = write(
        tmp_path / "in",
        request("a", EMBEDDINGS, input=["the rain", "here"]),
        request("b", EMBEDDINGS, input="x" * 500),
        request("c", prompt="the rain"),
    )
    answer(source, tmp_path / "out", BatchOptions(model=str(folder)))
    vectors, long, wrong = read(tmp_path / "out")
    with LLM(folder) as llm:
        expected = llm.embed(["the rain", "here"])
    data = vectors["response"]["body"]["data"]
    assert np.array_equal(np.array([row["embedding"] for row in data], np.float32), expected)
    assert "the context here is 128" in failure(long)[1]
    assert "bert cannot answer /v1/completions: it answers /v1/embeddings" in failure(wrong)[1]


# ---- bad lines ------------------------------------------------------------------------------------------------------


def test_bad_lines_among_good_ones_have_their_own_errors(tmp_path: Path) -> None:
    good = request("good", prompt="def f(x):", max_tokens=8)
    bad: list[tuple[Any, str]] = [
        ("{not json", "the line is not JSON"),
        ("[1]", "not a JSON table"),
        ('{"custom_id": "nan", "body": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"custom_id": "large", "body": {"metadata": 1e999}}', "1e999 is too large a number"),
        (request("", prompt="a"), "custom_id must be a string"),
        (request("good", prompt="a"), "custom_id 'good' stands on an earlier line too"),
        (request("url", "/v1/images", prompt="a"), "there is no url"),
        (request("method", prompt="a") | {"method": "GET"}, 'method must be "POST"'),
        (request("more", prompt="a") | {"priority": 1}, "there is no field 'priority'"),
        (request("body") | {"body": "a"}, "body must be a table"),
        (request("field", prompt="a", temprature=1), "did you mean temperature?"),
        (request("stream", prompt="a", stream=True), "a file is not streamed"),
        (request("chat", CHAT, messages=[{"role": "user", "content": "a"}]), "it has no chat template"),
        (request("long", prompt="a b " * 2000), "the context here is 1,024"),
        (request("token", prompt=[10**6]), "outside the vocabulary"),
        (request("bias", prompt="a", logit_bias={"999999": 1}), "logit_bias names token 999999"),
    ]
    lines = [good, *(line for line, _ in bad), good | {"custom_id": "end"}]
    last = answer(write(tmp_path / "in", *lines), tmp_path / "out")
    alone = write(tmp_path / "alone.in", good, *["{}"] * len(bad), good | {"custom_id": "end"})
    answer(alone, tmp_path / "alone")
    found, undisturbed = read(tmp_path / "out"), read(tmp_path / "alone")
    assert found[0] == undisturbed[0] and found[-1] == undisturbed[-1] and found[0]["error"] is None
    for line, (given, said) in zip(found[1:-1], bad, strict=True):
        status, message = failure(line)
        assert status == 400 and said in message
        assert line["custom_id"] == (given.get("custom_id") or None if isinstance(given, dict) else line["custom_id"])
    assert found[3]["custom_id"] is None and "line 4: " in found[3]["error"]["message"]
    assert last.failed == len(bad)


def test_a_line_of_any_depth_is_answered_or_refused() -> None:
    """Some depths can be read and not be written again."""
    for depth in range(800, 1000):
        body = f'{{"prompt": "a", "metadata": {"[" * depth}{"]" * depth}}}'
        line = f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}'
        error = read_line(line.encode(), place=0, line=1).error
        assert error is None or "nested too deeply" in error.message


def test_a_line_that_is_not_utf8_is_an_error_of_its_own(tmp_path: Path) -> None:
    good = json.dumps(request("good", prompt="a", max_tokens=2)).encode()
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n\xff\xfe\n")
    answer(tmp_path / "in", tmp_path / "out")
    first, second = read(tmp_path / "out")
    assert first["error"] is None
    assert failure(second) == (400, "the line is not UTF-8") and "line 3: " in second["error"]["message"]


def test_activations_that_are_not_finite_end_their_own_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", *many(6))
    answer(source, tmp_path / "clean")
    run, begun = NativeExecutor.run, many(6)[2]["body"]["prompt"]
    with LLM("demo") as llm:
        poison = llm.encode(begun)

    def poisoned(executor: NativeExecutor, step: Step) -> np.ndarray:
        row = 0
        for piece in step.pieces:
            sequence = list(piece.sequence.tokens)
            if sequence[: len(poison)] == poison and len(sequence) >= len(poison) + 2:
                raise NotFinite(row)
            row += len(piece.tokens)
        logits: np.ndarray = run(executor, step)
        return logits

    monkeypatch.setattr(NativeExecutor, "run", poisoned)
    last = answer(source, tmp_path / "out")
    clean, found = read(tmp_path / "clean"), read(tmp_path / "out")
    status, message = failure(found[2])
    assert status == 500 and "not finite" in message and "row" not in message
    assert found[:2] + found[3:] == clean[:2] + clean[3:] and last.failed == 1


@pytest.mark.parametrize(
    ("content", "model", "said", "hint"),
    [
        (None, "demo", "does not exist", "requests"),
        (b"", "demo", "is empty", "custom_id"),
        (b"\n\n", "demo", "is empty", "custom_id"),
        (b"PK\x03\x04\0\0\0", "demo", "is not text", "custom_id"),
        (b"hello\n", "demo", "has no good line; line 1: the line is not JSON", "custom_id"),
        (json.dumps(request("a", prompt="a")).encode(), None, "line 1 of", "give --model"),
        (json.dumps(request("a", prompt="a", model="/nowhere/x")).encode(), None, "/nowhere/x does not exist", ""),
        (json.dumps(request("a", EMBEDDINGS, input="a")).encode(), "demo", "cannot answer /v1/embeddings", "--model"),
        (
            json.dumps(request("a", prompt="a", model="demo")).encode()
            + b"\n"
            + json.dumps(request("b", prompt="a", model="other")).encode(),
            None,
            "names two models: demo (line 1) and other (line 2)",
            "--model",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_error(
    tmp_path: Path, content: bytes | None, model: str | None, said: str, hint: str
) -> None:
    if content is not None:
        (tmp_path / "in").write_bytes(content)
    with pytest.raises(SnelloError) as caught:
        answer(tmp_path / "in", tmp_path / "out", BatchOptions(model=model))
    assert said in caught.value.message and hint in (caught.value.hint or "")
    assert not [path for path in tmp_path.iterdir() if path.name != "in"]


# ---- stopped and continued ------------------------------------------------------------------------------------------

KILLS = {
    "before anything is kept": ("before", 0),
    "after the first": ("after", 1),
    "within a line": ("within", 3),
    "after some": ("after", 7),
    "after the last": ("after", 13),
    "before the rename": ("rename", 0),
    "after the rename": ("unlink", 0),
}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from snello.cli import main
from snello.serve import journal

when, place = sys.argv[1], int(sys.argv[2])
keep, format = journal.Journal.keep, journal._format

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(self, result):
    if when == "before" and self.totals.done == place:
        die()
    if when == "within" and self.totals.done == place:
        line = format(result)
        os.write(self._file, line[: len(line) // 2])
        die()
    keep(self, result)
    if when == "after" and self.totals.done == place:
        die()

journal.Journal.keep = dying
if when == "rename":
    journal.os.replace = die
if when == "unlink":
    Path.unlink = die
sys.exit(main(sys.argv[3:]))
"""


def command(source: Path, output: Path, *more: str) -> list[str]:
    return ["batch", str(source), "--model", "demo", "-o", str(output), "--max-num-seqs", "4", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of requests, and what an undisturbed call answers."""
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "in", *many(), "broken")
    answer(source, folder / "out")
    return source, (folder / "out").read_bytes()


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_call_goes_on_to_the_same_bytes(when: str, whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    output = tmp_path / "out"
    words = [sys.executable, "-c", SCRIPT, *map(str, KILLS[when]), *command(source, output)]
    killed = subprocess.run(words, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = (tmp_path / "out.partial").read_bytes()
    last = answer(source, output)
    assert output.read_bytes() == expected
    assert last.known == max(0, kept.count(b"\n") - 1), "what was finished was not answered again"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stopped(source: Path, output: Path, after: int, options: BatchOptions = DEMO) -> None:
    """A call that was stopped after some results."""
    for progress in answer_file(source, output, options):
        if progress.done == after:
            break
    assert output.with_name(output.name + ".partial").exists() and not output.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data + b"\0" * 600,
        lambda data: data + b"00000000 1 0 1 1 0 {}\n",
        lambda data: data[:-30] + b"#" + data[-29:],
        lambda data: data[:40],
        lambda data: b"",
    ],
    ids=["torn", "zeros", "wrong checksum", "changed", "torn head", "empty"],
)
def test_a_damaged_end_is_dropped(damage: Callable[[bytes], bytes], whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    stopped(source, tmp_path / "out", 5)
    journal = tmp_path / "out.partial"
    journal.write_bytes(damage(journal.read_bytes()))
    answer(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


def test_what_is_finished_needs_no_model(
    whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole
    stopped(source, tmp_path / "out", 13)
    monkeypatch.setattr(batch, "LLM", None)
    last = answer(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected and last.known == 13 and last.tokens == 0


def test_a_journal_of_something_else_is_never_mixed_in(
    whole: tuple[Path, bytes], tmp_path: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole
    output = tmp_path / "out"
    stopped(source, output, 5)
    kept = (tmp_path / "out.partial").read_bytes()
    other = write(tmp_path / "other", *many(3))
    for wrong, options, said in (
        (other, DEMO, "begun with other requests"),
        (source, dataclasses.replace(DEMO, model=str(chatty)), "another model, a model of another name, another token"),
        (source, dataclasses.replace(DEMO, context=256), "begun with --context 1024"),
        (source, dataclasses.replace(DEMO, keep_last=20), "begun with other --keep-first or --keep-last"),
    ):
        with pytest.raises(SnelloError, match=said) as caught:
            answer(wrong, output, options)
        assert "--fresh" in (caught.value.hint or "")
        assert (tmp_path / "out.partial").read_bytes() == kept and not output.exists()
    monkeypatch.setattr("snello.__version__", "0.0.9")
    with pytest.raises(SnelloError, match="another version of snello"):
        answer(source, output)
    monkeypatch.undo()
    assert answer(source, output, dataclasses.replace(DEMO, context=1024)).known == 5
    assert output.read_bytes() == expected


def test_fresh_begins_again(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    stopped(write(tmp_path / "other", *many(3)), tmp_path / "out", 2)
    assert answer(source, tmp_path / "out", dataclasses.replace(DEMO, fresh=True)).known == 0
    assert (tmp_path / "out").read_bytes() == expected
    (tmp_path / "next.partial").write_text("my own notes\n")
    with pytest.raises(SnelloError, match="is not the journal of a batch"):
        answer(source, tmp_path / "next")
    assert (tmp_path / "next.partial").read_text() == "my own notes\n"


def test_the_context_that_a_call_was_begun_with_stays(tmp_path: Path) -> None:
    """Without the option it is chosen from free memory, which changes."""
    lines = [request(f"r{place}", prompt="def f(x):\n", max_tokens=1000, ignore_eos=True) for place in range(4)]
    source = write(tmp_path / "in", *lines)
    narrow = dataclasses.replace(DEMO, context=64)
    answer(source, tmp_path / "whole", narrow)
    stopped(source, tmp_path / "out", 1, narrow)
    answer(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_output_that_is_there_stays_unless_it_may_go(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    output = tmp_path / "out"
    output.write_text("mine")
    for options in (DEMO, dataclasses.replace(DEMO, fresh=True)):
        with pytest.raises(SnelloError, match="exists already") as caught:
            answer(source, output, options)
        assert "--overwrite" in (caught.value.hint or "") and output.read_text() == "mine"
    may = dataclasses.replace(DEMO, overwrite=True)
    for progress in answer_file(source, output, may):
        if progress.done == 4:
            break
    assert output.read_text() == "mine", "it is replaced when the new one is whole"
    assert answer(source, output).known == 4, "that it may go was said when the call was begun"
    assert output.read_bytes() == expected


def test_answers_do_not_replace_requests(whole: tuple[Path, bytes]) -> None:
    source, _ = whole
    with pytest.raises(SnelloError, match="would replace the requests"):
        answer(source, source, dataclasses.replace(DEMO, overwrite=True))
    with pytest.raises(SnelloError, match="is not a file"):
        answer(source, Path("/dev/null"), dataclasses.replace(DEMO, overwrite=True))
    with pytest.raises(SnelloError, match="folder of .* does not exist"):
        answer(source, Path("/nowhere/at/all/out"))


def test_two_calls_do_not_share_a_journal(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, _ = whole
    first = answer_file(source, tmp_path / "out", DEMO)
    next(first)
    with pytest.raises(SnelloError, match="another call is at work"):
        answer(source, tmp_path / "out")
    first.close()


def test_requests_that_change_meanwhile_are_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *many(4))
    run = answer_file(source, tmp_path / "out", DEMO)
    next(run)
    write(source, *many(3), request("r3", prompt="something else", max_tokens=3))
    with pytest.raises(SnelloError, match="was changed while it was answered"):
        list(run)
    assert not (tmp_path / "out").exists()


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_says_what_became_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple[Path, bytes]
) -> None:
    source, expected = whole
    output = tmp_path / "out"
    assert main(command(source, output)) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n" and output.read_bytes() == expected
    assert err.startswith("13 requests; 1 failed (their lines say why); prompts ") and "tokens/s" in err
    assert main(command(source, output, "--json")) == 1
    assert main(command(source, output, "--json", "--overwrite")) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["requests"] == 13 and document["answered"] == 12 and document["failed"] == 1
    assert document["completion_tokens"] == sum(line["body"]["max_tokens"] for line in many())
    assert document["cached_tokens"] >= 0 and document["seconds"] > 0 and document["tokens_per_second"] > 0


def test_where_no_request_was_answered_the_exit_code_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a", prompt="a b " * 2000))
    assert main(command(source, tmp_path / "out", "-q")) == 1
    assert failure(read(tmp_path / "out")[0])[0] == 400


def test_a_full_disk_and_an_interrupt_say_that_the_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole
    output, append = tmp_path / "out", os.write

    def failing(error: BaseException) -> Callable[[int, bytes], int]:
        def write(file: int, data: bytes) -> int:
            if os.fstat(file).st_size > 3000 and b"batch_req" in data:
                append(file, data[:20])
                raise error
            return append(file, data)

        return write

    monkeypatch.setattr("snello.serve.journal.os.write", failing(OSError(errno.ENOSPC, "No space left on device")))
    assert main(command(source, output)) == 1
    err = capsys.readouterr().err
    assert f"error: the disk is full: {output} could not be written\nhint:  free some space; the same command" in err
    monkeypatch.setattr("snello.serve.journal.os.write", failing(KeyboardInterrupt()))
    assert main(command(source, output)) == 130
    err = capsys.readouterr().err
    assert "error: interrupted\nhint:  " in err and "of 13 requests are kept; the same command continues" in err
    monkeypatch.undo()
    assert main(command(source, output)) == 0
    assert "continuing: " in capsys.readouterr().err and output.read_bytes() == expected


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    tmp_path: Path, whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("snello.serve.journal.os.replace", full)
    with pytest.raises(SnelloError, match="the disk is full"):
        answer(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    assert answer(source, tmp_path / "out").known == 13
    assert (tmp_path / "out").read_bytes() == expected


def test_a_batch_imports_no_torch(tmp_path: Path, whole: tuple[Path, bytes]) -> None:
    code = (
        "import sys; from snello.cli import main; code = main(sys.argv[1:]); print(sorted(sys.modules)); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, *command(whole[0], tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'numpy'" in done.stdout and "'torch'" not in done.stdout and "'transformers'" not in done.stdout


def test_results_of_a_journal_are_those_that_were_kept(tmp_path: Path, whole: tuple[Path, bytes]) -> None:
    """Every count of the whole comes through the journal."""
    source, _ = whole
    at_once = answer(source, tmp_path / "one")
    stopped(source, tmp_path / "two", 6)
    later = answer(source, tmp_path / "two")
    for name in ("requests", "done", "failed", "prompt_tokens", "completion_tokens"):
        assert getattr(at_once, name) == getattr(later, name), name
    assert 0 < later.tokens < at_once.tokens

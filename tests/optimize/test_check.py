"""One verdict for whatever was made elsewhere: a folder, a GGUF file, a server. Strangers are refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import snello
from snello.cli import main
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.measure.interval import Interval
from snello.measure.judged import gguf as gguf_module
from snello.measure.judged import server as server_module
from snello.measure.judged.gguf import Gguf
from snello.measure.judged.server import Served
from snello.measure.peers.contenders import INSIDE
from snello.measure.peers.environments import LLAMACPP
from snello.measure.rulers import NextTokens, Reading
from snello.measure.text import Block
from snello.models import load
from snello.models.demo.held_out import HELD_OUT, read_source, stdlib_directory
from snello.models.spec import Deployment
from snello.optimize.check import Check, check
from snello.optimize.workbench import NativeWorkbench
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.trim import Trim
from tests.checkpoints import make_checkpoint, write_tokenizer
from tests.serve.world import ServeOptions, make_encoder, serving

TOKENS = 10_000


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    files = [read_source(stdlib_directory() / name) for name in HELD_OUT]
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in files))
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lean") / "int8"
    Quantize(weights="int8").apply(load("demo"), Context(output=path))
    return path


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_good_version_is_within_the_budget_and_a_bad_one_is_not(text: Path, int8: Path, tmp_path: Path) -> None:
    good = snello.check("demo", int8, text=text, max_loss="4%", tokens=TOKENS)
    assert (good.outcome, good.exit_code, good.reason) == ("within", 0, "")
    assert good.loss is not None and -0.01 < good.loss.mid < good.loss.high < 0.04
    assert good.again == Interval.exact(0.0) and good.fault.mid == pytest.approx(0.044, rel=1e-6)
    assert good.guards is not None and good.guards.top1_agreement is not None and good.guards.top1_agreement > 0.9
    assert good.guards.mean_divergence is not None and 0 < good.guards.mean_divergence < 0.05
    assert good.tokens >= TOKENS and good.perplexity is not None and good.sentence.startswith("within 4%; at most ")

    Quantize(weights="int3", method="rtn").apply(load("demo"), Context(output=tmp_path / "int3"))
    bad = check("demo", tmp_path / "int3", text=[text], max_loss=0.04, tokens=TOKENS)
    assert (bad.outcome, bad.exit_code) == ("over", 3)
    assert bad.loss is not None and bad.loss.mid > 0.04 and bad.sentence.startswith("not within 4%: over 4%; ")
    assert bad.worst and bad.worst[0].difference > 1


def test_the_original_itself_loses_exactly_nothing(text: Path) -> None:
    found = check("demo", "demo", text=text, max_loss="4%", tokens=TOKENS)
    assert found.loss == Interval.exact(0.0) and found.exit_code == 0
    assert found.guards is not None and found.guards.mean_divergence == 0 and found.guards.failed == ()


def test_a_trimmed_vocabulary_is_told_the_originals_words(text: Path, tmp_path: Path) -> None:
    encode = load("demo").tokenizer.encode
    windows = [np.array(encode(read_source(stdlib_directory() / name)), np.int32)[:1024] for name in HELD_OUT]
    Trim(keep=0.7).apply(load("demo"), Context(output=tmp_path / "trimmed", windows=windows))
    found = check("demo", tmp_path / "trimmed", text=text, max_loss="20%", tokens=TOKENS)
    assert found.loss is not None and 0 < found.loss.mid < 0.5
    assert found.guards is not None and found.guards.mean_divergence is not None


def test_a_version_that_reads_less_at_once_is_asked_no_more(text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(load("demo").path, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    found = check("demo", short, text=text, max_loss="4%", tokens=TOKENS)
    assert found.loss is not None and found.loss.mid == 0 and found.exit_code == 0
    assert found.guards is not None and found.guards.looping is not None
    assert found.guards.looping[0] == found.guards.looping[1]


def test_a_text_too_short_gives_no_verdict_and_the_other_is_not_read(text: Path, int8: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(read_source(stdlib_directory() / "bisect.py"))
    found = check("demo", int8, text=short, max_loss="1%")
    assert (found.outcome, found.exit_code, found.loss) == ("cannot tell", 4, None)
    assert "you asked for 1%" in found.sentence
    cut = check("demo", int8, text=text, max_loss="0.1%", tokens=8_000)
    assert cut.exit_code == 4 and "--tokens" in cut.sentence  # the text goes on where the limit ended it


def test_an_original_that_differs_from_itself_gives_no_verdict(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = NextTokens.read, iter(range(9))

    def drifting(ruler: NextTokens, *arguments: Any) -> Reading:
        found, drift = read(ruler, *arguments), np.float32(1e-3 * next(calls))
        return Reading(tuple(values + drift for values in found.values), found.choices)

    monkeypatch.setattr(NextTokens, "read", drifting)
    found = check("demo", "demo", text=text, max_loss="4%", tokens=TOKENS)
    assert (found.outcome, found.exit_code, found.loss) == ("cannot tell", 4, None)
    assert "the original gave other numbers" in found.sentence


def test_guards_decide_where_they_are_asked(text: Path, tmp_path: Path) -> None:
    Quantize(weights="int3", method="rtn").apply(load("demo"), Context(output=tmp_path / "int3"))
    loose = check("demo", tmp_path / "int3", text=text, max_loss="60%", tokens=TOKENS)
    assert loose.exit_code == 0 and loose.guards is not None and loose.guards.failed
    strict = check("demo", tmp_path / "int3", text=text, max_loss="60%", tokens=TOKENS, strict=True)
    assert strict.exit_code == 3 and strict.reason.startswith("strict: ")


def test_an_encoder_is_judged_by_its_vectors(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder")
    write_tokenizer(folder, 307)
    Quantize(weights="int8").apply(load(folder), Context(output=tmp_path / "int8"))
    lines = tmp_path / "lines.txt"
    draw = np.random.default_rng(0)
    words = [f"word{number}" for number in range(50)]
    lines.write_text("".join(" ".join(draw.choice(words, 12)) + "\n" for _ in range(200)))
    found = check(folder, tmp_path / "int8", text=lines, max_loss="1%")
    assert found.measure == "1 - cosine" and found.exit_code == 0 and found.guards is not None
    assert found.guards.mean_cosine is not None and found.guards.mean_cosine > 0.99
    with pytest.raises(Unsupported, match="a server is asked for next words"):
        check(folder, "http://127.0.0.1:9", text=lines)


@pytest.mark.parametrize(
    ("variant", "measure"), [("mistral-window", "loss"), ("mixtral", "loss"), ("bert-classify", "accuracy points")]
)
def test_other_kinds_of_model_are_judged(tmp_path: Path, variant: str, measure: str) -> None:
    """A sliding window, experts, a classifier: INT8 is seen to differ, and the model itself differs in nothing."""
    folder, draw = make_checkpoint(tmp_path / variant, variant), np.random.default_rng(0)
    write_tokenizer(folder, 307)
    Quantize(weights="int8").apply(load(folder), Context(output=tmp_path / "int8"))
    lines = [" ".join(draw.choice([f"word{number}" for number in range(50)], 12)) for _ in range(500)]
    text = tmp_path / ("text.tsv" if measure == "accuracy points" else "text.txt")
    if text.suffix == ".tsv":
        lines = ["sentence\tlabel", *(f"{line}\t{number % 2}" for number, line in enumerate(lines))]
    text.write_text("\n".join(lines) + "\n")
    found, same = (check(folder, other, text=text, max_loss="10%") for other in (tmp_path / "int8", folder))
    assert (found.outcome, found.exit_code, found.measure) == ("within", 0, measure)
    assert found.loss is not None and found.loss.low != found.loss.high
    assert same.loss == Interval.exact(0.0) and found.guards is not None
    assert found.guards.top1_agreement is not None and 0.8 < found.guards.top1_agreement < 1


def test_strangers_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger, encoder = (make_checkpoint(tmp_path / name, name) for name in ("llama", "bert-mlm"))
    for folder in (stranger, encoder):
        write_tokenizer(folder, 307)
    opened: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(NativeWorkbench, "open", lambda bench, model, context: opened.append(model))
        with pytest.raises(Unsupported, match="has another tokenizer"):
            check("demo", stranger, text=text)
    assert opened == []  # nothing is left open
    with pytest.raises(Unsupported, match="is made for"):
        check("demo", encoder, text=text)
    with pytest.raises(SnelloError, match="a served model needs a server"):
        check("demo", "demo", text=text, served_model="demo")
    with pytest.raises(SnelloError, match="does not exist"):
        check("demo", tmp_path / "nothing.gguf", text=text)


def test_the_same_words_under_other_merges_are_refused(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "merges"
    shutil.copytree(load("demo").path, other)
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(Unsupported, match="merges cuts held_out.jsonl.* into other tokens than demo"):
        check("demo", other, text=text, tokens=TOKENS)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_exit_code_and_document(text: Path, int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "demo", str(int8), "--text", str(text), "--max-loss", "4%", "--tokens", str(TOKENS)]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "int8, run by Snello, beside demo; loss (at most, 95%)"
    assert printed[-1].startswith("within 4%; at most ")
    assert any("held_out.jsonl" in line for line in printed) and any("worst 1: " in line for line in printed)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["outcome"] == "within" and found["loss"]["high"] < 0.04 and found["exit"] == 0


# ---- servers --------------------------------------------------------------------------------------------------------


def test_a_server_is_read_to_the_last_digit_and_judged(text: Path, int8: Path) -> None:
    ids = load("demo").tokenizer.encode(read_source(stdlib_directory() / "queue.py"))[:600]
    with serving(ServeOptions(models=(f"lean={int8}",))) as here:
        read = Served(here.address, load("demo")).log_probabilities(ids)
        found = check("demo", here.address, text=text, max_loss="4%", tokens=TOKENS)
    runner = NativeExecutor(load(int8), Deployment(context=1024))
    np.testing.assert_allclose(read, runner.score(np.array(ids, np.int32)).log_probabilities, atol=1e-6)
    runner.close()
    assert found.other == {"kind": "behind a server", "name": "lean", "url": f"{here.address}/v1"}
    assert found.exit_code == 0 and found.guards is not None and found.guards.looping is not None
    assert found.guards.top1_agreement is None and found.guards.mean_divergence is None


Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextlib.contextmanager
def faking(answer: Answer) -> Iterator[str]:
    """A server that answers as it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            status, content = answer(self.path, body)
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def listed(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name} for name in names]}


def echoed(tokens: list[int], values: list[float | None], spell: Callable[[int], str]) -> dict[str, Any]:
    return {"choices": [{"text": "", "logprobs": {"token_logprobs": values, "tokens": [spell(t) for t in tokens]}}]}


def demo_word(token: int) -> str:
    return load("demo").tokenizer.decode([token], skip_special=False)


IDS = load("demo").tokenizer.encode("def area(radius): return radius * radius")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"choices": [{"text": "hello"}]}), f"gave 0 log-probabilities for a prompt of {len(IDS)} tokens"),
        ((200, {"choices": []}), "gave no choices"),
        ((200, b"<html>"), "did not answer with a JSON object"),
        ((400, {"error": {"message": "echo is not supported"}}), "refused with 400: echo is not supported"),
        ((401, {"error": "who are you"}), "refused with 401: who are you"),
        ((500, b""), "refused with 500: Internal Server Error"),
        ((200, {"choices": [{"logprobs": [1.0, 2.0]}]}), "gave 0 log-probabilities"),
        ((200, {"choices": [{"logprobs": {"token_logprobs": 5}}]}), "gave 0 log-probabilities"),
        (
            (200, echoed(IDS, [None, *[0.5] * (len(IDS) - 1)], demo_word)),
            "gave a log-probability of 0.5: none is over 0",
        ),
        ((200, echoed(IDS, [None, *[math.nan] * (len(IDS) - 1)], demo_word)), "gave a log-probability of nan"),
        ((200, echoed(IDS, [None, *[10**400] * (len(IDS) - 1)], demo_word)), "gave a log-probability of inf"),
        ((200, echoed(IDS, [None] * len(IDS), demo_word)), "left out log-probabilities of the prompt"),
        ((200, echoed(IDS, [None, *[-1.0] * (len(IDS) - 1)], lambda token: f"w{token}")), "its tokenizer is another"),
    ],
)
def test_a_server_that_cannot_be_judged_is_refused(answer: tuple[int, Any], message: str) -> None:
    with faking(lambda path, body: (200, listed("one")) if path == "/v1/models" else answer) as url:
        served = Served(url, load("demo"))
        with pytest.raises(SnelloError, match=message.replace("(", r"\(")) as caught:
            served.log_probabilities(IDS)
    assert caught.value.hint


def test_a_server_that_refuses_a_window_is_told_what_it_takes() -> None:
    """Which of them it lacks is in its own words, ahead of the hint."""
    refusal = {"error": {"message": "this model's context is 8 tokens"}}
    with faking(lambda path, body: (400, refusal)) as url, pytest.raises(SnelloError, match="is 8 tokens") as caught:
        Served(url, load("demo"), model="one").log_probabilities(IDS)
    assert "echoes" in str(caught.value.hint) and f"at least {len(IDS) + 1} tokens" in str(caught.value.hint)


@pytest.mark.parametrize("words", ["== + ()", "你好 世界"])
def test_another_tokenizer_is_seen_in_the_first_window_that_has_words(words: str) -> None:
    spelled = [*words, *"abcd"]
    original = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, skip_special: spelled[ids[0]]), name="one")
    first, second = list(range(len(words))), list(range(len(words), len(spelled)))

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, echoed(body["prompt"], [None, *[-1.0] * (len(body["prompt"]) - 1)], lambda token: "?")

    blocks = [Block(source="a", document="a", cluster=0, start=0, tokens=np.array(first), scored_from=1)]
    with faking(answer) as url:
        served = Served(url, original, model="one")
        with pytest.raises(Unsupported, match="its tokenizer is another|nothing that has letters or digits"):
            served.read(NextTokens(), blocks, lambda done, total: None)
        with pytest.raises(Unsupported, match="its tokenizer is another"):
            served.log_probabilities(second)


def test_a_busy_server_is_asked_again_and_its_own_token_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.time, "sleep", lambda seconds: None)
    seen: list[dict[str, Any]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, listed("one")
        seen.append(body)
        values = [None, *(-0.25 * i for i in range(1, len(IDS))), -9.0]
        return (429, {}) if len(seen) < 3 else (200, echoed([*IDS, 5], values, demo_word))

    with faking(answer) as url:
        found = Served(url, load("demo")).log_probabilities(IDS)
    np.testing.assert_array_equal(found, np.float32([-0.25 * i for i in range(1, len(IDS))]))
    assert len(seen) == 3 and seen[0]["prompt"] == IDS and seen[0]["echo"] is True and seen[0]["model"] == "one"


def test_one_of_several_models_must_be_named() -> None:
    with faking(lambda path, body: (200, listed("one", "two"))) as url:
        with pytest.raises(SnelloError, match="has 2 models: one, two") as caught:
            Served(url, load("demo"))
        assert caught.value.hint == "--served-model one"
        assert Served(url, load("demo"), model="two").name == "two"
    with pytest.raises(SnelloError, match="did not answer"):
        Served(url, load("demo"))
    for wrong in ("http://", "http://a:x", "http://a/?b=1", "http://[::1:9/"):
        with pytest.raises(SnelloError, match="is no address of a server"):
            Served(wrong, load("demo"))
    with pytest.raises(SnelloError, match=r"http://\.a/v1/models did not answer"):
        Served("http://.a", load("demo"))
    with faking(lambda path, body: (200, {"data": 5})) as url, pytest.raises(SnelloError, match="has 0 models"):
        Served(url.replace("http", "HTTP"), load("demo"))


def test_a_key_goes_into_a_header_and_into_nothing_that_is_said() -> None:
    with faking(lambda path, body: (200, listed("one"))) as url:
        assert Served(url, load("demo"), key="key\n").name == "one"
        for key in ("two\nlines", "schlüssel"):
            with pytest.raises(SnelloError, match="is not one line of ASCII") as caught:
                Served(url, load("demo"), key=key)
            assert key not in str(caught.value)
        with pytest.raises(SnelloError, match="holds no name and password") as caught:
            Served(url.replace("://", "://me:secret@"), load("demo"))
        assert "secret" not in str(caught.value)


# ---- GGUF -----------------------------------------------------------------------------------------------------------

READER = """
import argparse, json, sys
from pathlib import Path
import numpy as np
from snello.measure.guards import greedy
from snello.models import load
from snello.models.spec import Deployment
from snello.engine.native import NativeExecutor

parser = argparse.ArgumentParser()
parser.add_argument("model")
for name in ("positions", "threads"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--vocabulary", type=Path)
asked = parser.parse_args()
if Path(asked.model).read_bytes() == b"GGUF broken":
    sys.exit("it is broken")
model = load("demo")
pieces = sorted(model.tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
strange = b"strange" in Path(asked.model).read_bytes()
asked.vocabulary.write_text(json.dumps([piece + "x" * strange for piece, _ in pieces]))
runner = NativeExecutor(model, Deployment(context=asked.positions))
print(json.dumps({"version": "fake 1", "settings": {}}), flush=True)
for line in sys.stdin:
    request, answer = json.loads(line), {}
    tokens = np.array(request["tokens"], np.int32)
    if "scores" in request:
        scores = runner.score(tokens)
        np.savez(request["scores"], log_probabilities=scores.log_probabilities, top1=scores.top1)
    elif "logits" in request:
        np.save(request["logits"], runner.logits(tokens, np.array(request["rows"])))
    else:
        answer = {"answer": greedy(runner, request["tokens"], request["most"], set(request["ends"]))}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In llama.cpp's place: a program that speaks its protocol with our own engine; the folder of its files."""
    (tmp_path / "read_llamacpp.py").write_text(READER)
    monkeypatch.setattr(gguf_module, "INSIDE", tmp_path)
    made = SimpleNamespace(python=Path(sys.executable), is_made=lambda: True)
    monkeypatch.setattr(gguf_module, "LLAMACPP", made)
    return tmp_path


def test_a_gguf_file_is_known_by_its_first_bytes_and_judged(reader: Path, text: Path) -> None:
    (reader / "model.bin").write_bytes(b"GGUF fine")
    found = check("demo", reader / "model.bin", text=text, max_loss="4%", tokens=TOKENS)
    assert found.loss == Interval(0.0, 0.0, 0.0) and found.exit_code == 0
    assert found.other["kind"] == "run by llama.cpp" and found.other["version"] == "fake 1"
    assert found.guards is not None and found.guards.top1_agreement == 1 and found.guards.mean_divergence == 0
    assert found.guards.looping is not None and found.guards.looping[0] == found.guards.looping[1]


def test_a_gguf_file_that_is_broken_or_strange_is_refused(reader: Path, text: Path) -> None:
    (reader / "broken.gguf").write_bytes(b"GGUF broken")
    with pytest.raises(SnelloError, match="llama.cpp cannot read .*broken.gguf") as caught:
        check("demo", reader / "broken.gguf", text=text)
    assert caught.value.hint == "it said: it is broken"
    (reader / "strange.gguf").write_bytes(b"GGUF strange")
    with pytest.raises(Unsupported, match="has another tokenizer"):
        check("demo", reader / "strange.gguf", text=text)


def test_a_gguf_file_in_parts_is_weighed_whole_and_opened_by_its_first(reader: Path, text: Path) -> None:
    first, second = (reader / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"GGUF first")
    with pytest.raises(SnelloError, match="is one of 2 files, and m-00002-of-00002.gguf is not there"):
        check("demo", first, text=text)
    second.write_bytes(b"GGUF the second")
    with pytest.raises(SnelloError, match="is part 2 of 2") as caught:
        check("demo", second, text=text)
    assert caught.value.hint == f"give the first: {first}"
    judged = Gguf(first, load("demo"), positions=64, threads=1)
    judged.close()
    assert judged.facts()["file_bytes"] == 25


def test_added_tokens_of_a_gguf_file_may_be_spelled_otherwise_but_must_be_there() -> None:
    words = {"a": 0, "▁▁": 1, "<end>": 2}
    backend = SimpleNamespace(
        get_vocab=lambda with_added_tokens: words if with_added_tokens else {"a": 0, "▁▁": 1},
        get_added_tokens_decoder=lambda: {1: "▁▁", 2: "<end>"},
    )
    judged = Gguf.__new__(Gguf)
    judged.path = Path("one.gguf")
    original = SimpleNamespace(tokenizer=SimpleNamespace(backend=backend))
    judged._check_vocabulary(["a", "  ", "<end>", "[PAD3]"], original)
    for strange in (["a", "  "], ["b", "  ", "<end>"]):
        with pytest.raises(Unsupported, match=r"\(1 of 3 tokens are others\)"):
            judged._check_vocabulary(strange, original)


def test_without_llamacpp_the_command_that_installs_it_is_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNELLO_PEERS", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SnelloError, match="is not installed here") as caught:
        check("demo", tmp_path / "model.gguf", text=text)
    assert caught.value.hint == "snello bench --install-peers llama.cpp"


@pytest.mark.slow
@pytest.mark.skipif(not LLAMACPP.is_made(), reason="llama.cpp is not installed: snello bench --install-peers llama.cpp")
def test_llamacpp_itself_is_judged(tmp_path: Path, text: Path) -> None:
    program, path = INSIDE / "convert_llamacpp.py", tmp_path / "demo.gguf"
    subprocess.run([LLAMACPP.python, program, load("demo").path, "q8_0", path], check=True)
    found: Check = check("demo", path, text=text, max_loss="4%")
    assert found.exit_code == 0 and found.loss is not None and abs(found.loss.mid) < 0.002
    assert found.guards is not None and found.guards.mean_divergence is not None
    assert found.guards.mean_divergence < 0.002 and found.guards.top1_agreement is not None
    assert found.guards.top1_agreement > 0.97

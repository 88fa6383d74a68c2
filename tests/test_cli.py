"""The command line: streams, exit codes, errors with hints, encodings, the ladder; every verb in a pipe."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from snello.cli import VERBS, main, parser_for
from snello.cli.ladder import Ladder, row_line, time_left
from snello.cli.options import Parser, add_options, build, duration, option_rows, percent, target
from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.models.shapes import spec_of_shape
from snello.optimize import events
from snello.techniques.table import TECHNIQUES
from snello.terminal import Terminal, bar, table
from tests.report import samples

ROOT = Path(__file__).resolve().parents[1]


def snello(*words: str, cwd: Path = ROOT, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "snello", *words]
    return subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True, env=environment, check=False)


def last_document(out: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert document["event"] == "result" and document["schema"] == 1
    return document


# ---- help -----------------------------------------------------------------------------------------------------------


def test_without_arguments_there_is_help_of_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 25
    assert all(f"  {verb}" in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"snello {verb}" in text and "--json" in text and "%%" not in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_is_understood(verb: str) -> None:
    for example in importlib.import_module(f"snello.cli.{verb}").EXAMPLES:
        command = re.split(r" {2,}| >+ ", example.split("| ")[-1])[0]  # without pipes, and what is said of it
        words = shlex.split(command)
        assert words[0] == "snello" and words[1] == verb, example
        parser, rest = parser_for(words[1:])
        if "--help" not in rest:
            parser.parse(rest)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_explain_ends_with_a_command_that_can_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options that a technique cannot do without, on a model that it takes."""
    assert main(["explain", name]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("alone"))
    parser, rest = parser_for(shlex.split(command)[2:])
    arguments = parser.parse(rest)
    spec = spec_of_shape("qwen3-0.6b")
    if name == "skip":
        assert arguments.model == "lean/demo-int8"
        spec = TECHNIQUES["quantize"](weights="int8").plan(spec)
    step = build(TECHNIQUES[name], arguments)
    assert name != "distill" or step.teacher != step.student == "given"
    step.plan(spec)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    import snello as package

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"snello {package.__version__}\n"
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stated == package.__version__


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["optimise"], 2, "did you mean snello optimize"),
        (["run"], 2, "required: MODEL"),
        (["run", "demo", "x", "--temprature", "1"], 2, "did you mean --temperature"),
        (["bench"], 2, "needs a MODEL or a --shape"),
        (["bench", "demo", "--keep-first", "9"], 2, "--keep-first goes with --keep-last"),
        (["bench", "demo", "--keep-last", "9", "--against", "openvino"], 2, "--keep-last does not go with --against"),
        (["run", "demo", "x", "--keep-last", "0"], 2, "a whole number of at least 1"),
        (["run", "demo", "x", "--keep-first", "9"], 2, "--keep-first goes with --keep-last"),
        (["serve", "demo", "--keep-first", "9"], 2, "--keep-first goes with --keep-last"),
        (["batch", "in.jsonl", "-o", "out.jsonl", "--keep-first", "9"], 2, "--keep-first goes with --keep-last"),
        (["apply"], 2, "which technique"),
        (["apply", "quantise", "demo", "-o", "x"], 2, "did you mean quantize"),
        (["apply", "quantize", "demo", "-o", "x", "--weights", "int5"], 2, "did you mean int"),
        (["apply", "sparsify", "demo", "-o", "x", "--sparsity", "1.5"], 1, "not between 0 and 1"),
        (["apply", "quantize", "demo", "-o", "x", "--threads", "0"], 2, "a whole number of at least 1"),
        (["apply", "quantize", "demo", "-o", "x", "--seed", "-1"], 2, "a whole number of at least 0"),
        (["adapt", "demo", "--data", "x", "-o", "x", "--threads", "0"], 2, "a whole number of at least 1"),
        (["adapt", "demo", "--data", "x", "-o", "x", "--seed", "-1"], 2, "a whole number of at least 0"),
        (["adapt", "demo", "--data", "x", "-o", "x", "--text", "x"], 2, "--merge --quantize int8"),
        (["explain", "prayer"], 2, "there are: attention, convolution, distill, prune, quantize, skip, sparsify, trim"),
        (["optimize", "demo", "--max-loss", "lots"], 2, "write 1% or 0.01"),
        (["optimize", "demo", "--max-loss", "900%"], 2, "'900%' is not more than 0% and less than 100%"),
        (["optimize", "demo", "--max-loss", "-1"], 2, "write 1% or 0.01"),
        (["optimize", "demo", "--time-budget", "0"], 2, "a time above zero"),
        (["optimize", "demo", "--target", "0.5"], 2, "at least 1x"),
        (["optimize", "demo", "--seed", "-1"], 2, "a whole number of at least 0"),
        (["optimize"], 2, "no model was given"),
        (["export", "demo", "--to", "hf", "-o", "x", "--shard-size", "-1"], 2, "gigabytes of at least 0.001"),
        (["doctor", "--threads", "0"], 2, "a whole number of at least 1"),
        (["doctor", "--threads", "70000"], 2, "--threads: '70000' is more than 256"),
        (["bench", "nowhere", "--streams", "70000"], 2, "--streams: '70000' is more than 65,536"),
        (["run", "nowhere", "x", "--context", "-1"], 2, "a whole number of at least 1"),
        (["run", "nowhere", "x", "--keep-last", "9999999999"], 2, "is more than 2,147,483,647"),
        (["report", "/nowhere/at/all"], 1, "no receipts"),
        (["run", "/nowhere/at/all", "x"], 1, "does not exist"),
    ],
)
def test_a_users_error_is_two_lines_and_an_exit_code(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "\nhint:  " in err and said in err
    assert "Traceback" not in err


def test_errors_are_documents_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "/nowhere/at/all", "--json"]) == 1
    document = last_document(capsys.readouterr().out)
    assert document["exit"] == 1 and document["error"] and document["hint"]


def test_a_bug_is_one_line_and_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("snello.report.write.write_report", fail)
    assert main(["report", "."]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: one" in err and "two" not in err.splitlines()[0]
    log = Path(next(word for word in err.split() if word.endswith(".log")))
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_the_log_of_a_bug_holds_any_argument() -> None:
    from snello.cli import write_log

    log = Path(write_log(["run", "caf\udce9"]))
    assert r"snello run caf\udce9" in log.read_text()
    log.unlink()


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "lean/report.html")

    monkeypatch.setattr("snello.report.write.write_report", fail)
    assert main(["report", "."]) == 1
    err = capsys.readouterr().err
    assert "error: the disk is full: lean/report.html could not be written\nhint:  free" in err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snello.report.write.write_report", fail)
    assert main(["report", ".", "--json"]) == 130
    assert last_document(capsys.readouterr().out)["exit"] == 130


def test_optimize_without_torch_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("snello.cli.techniques.importlib.util.find_spec", lambda name: None)
    assert main(["optimize", "demo"]) == 1
    assert "pip install 'snello[optimize]'" in capsys.readouterr().err


def test_a_torch_that_does_not_load_is_told_before_work(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1: no such file')")
    done = snello("optimize", "demo", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    assert "needs torch, which does not load: libgomp.so.1: no such file" in done.stderr
    assert "pip install 'snello[optimize]'" in done.stderr and not (tmp_path / "lean").exists()


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_report_prints_under_any_encoding(tmp_path: Path, encoding: str) -> None:
    samples.write(tmp_path)
    done = snello("report", str(tmp_path), "--to", "md", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "# Qwen3-0.6B" in done.stdout


def test_stdout_is_the_product_alone(tmp_path: Path) -> None:
    samples.write(tmp_path)
    done = snello("report", str(tmp_path), NO_COLOR="1", COLUMNS="60")
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    quiet = snello("report", str(tmp_path), "-q")
    assert quiet.stderr == ""


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    samples.write(tmp_path)
    command = f"{sys.executable} -m snello report {tmp_path} --to md | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("# Qwen3") and "Error" not in done.stderr


@pytest.mark.parametrize("end", ["| true", "> /dev/full", ">&-", "<&-", "2>&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [("--help", 0), ("explain --help", 0), ("explain prune", 0), ("explain prune --json", 0), ("explain x --json", 2)],
)
def test_where_nobody_can_read_there_is_an_exit_code_and_no_traceback(words: str, code: int, end: str) -> None:
    command = f"(sleep 0.2; {sys.executable} -m snello {words}; echo $? >&3) 3>&2 {end}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "bug" not in done.stderr and "ignored" not in done.stderr
    assert done.stderr.split()[-1] == str(code or int("full" in end))


def test_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples.write(tmp_path)
    assert main(["report", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert last_document(out)["html"] == str(tmp_path / "report.html")


# ---- options of a dataclass -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    kind: Literal["good", "better"] = dataclasses.field(default="good", metadata={"help": "How good: 100% or so."})
    size: Literal[32, 64] = 64
    share: float | None = None
    fast: bool = True
    cache: Literal["int8"] | None = None


def parse(*words: str) -> Sample:
    parser = Parser(prog="x", allow_abbrev=False)
    add_options(parser, Sample, "options")
    assert parser.format_help()
    sample: Sample = build(Sample, parser.parse_args(words))
    return sample


def test_flags_come_from_the_dataclass() -> None:
    assert parse() == Sample()
    given = parse("--kind", "better", "--size", "32", "--share", "0.5", "--no-fast", "--cache", "int8")
    assert given == Sample(kind="better", size=32, share=0.5, fast=False, cache="int8")
    assert parse("--share", "none") == Sample()
    assert [row[0] for row in option_rows(Sample)] == ["--kind", "--size", "--share", "--fast", "--cache"]
    assert [row[1] for row in option_rows(Sample) if row[0] == "--fast"] == ["or --no-fast"]  # no word follows it


@pytest.mark.parametrize(
    "words", [("--kind", "god"), ("--size", "33"), ("--size", "x"), ("--knd", "good"), ("--ki", "good")]
)
def test_what_is_not_an_option_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SnelloError) as caught:
        parse(*words)
    assert caught.value.exit_code == 2


def test_units() -> None:
    assert (percent("1%"), percent("0.01"), duration("30m"), duration("90s")) == (0.01, 0.01, 1800, 90)
    assert [str(target(text)) for text in ("2x", "1.5", " 300MB")] == ["2x", "1.5x", "300MB"]
    for wrong in ("", "x", "-2x", "2y", "MB", "0.5x"):
        with pytest.raises(argparse.ArgumentTypeError):
            target(wrong)
    with pytest.raises(argparse.ArgumentTypeError):
        percent("-1%")


# ---- the terminal and the ladder ------------------------------------------------------------------------------------


class Screen(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def play(tty: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(tty)
    ladder = Ladder(Terminal(err=screen, out=Screen(False)), "latency")
    row = samples.rows()[3]
    result = events.Result(exit_code=0, sentence="3x faster.", path=Path("lean/x"))
    for event in (
        events.ModelLoaded(
            model="demo", path=Path("."), num_parameters=10**7, weights="bf16", weights_bytes=2 * 10**7, digest="x"
        ),
        events.StageStarted(index=4, stage="quantize int8", predicted_seconds=3),
        events.Progress(stage="quantize int8", activity="score", done=1, total=4, unit="window", used_seconds=2),
        events.StageJudged(row=row, used_seconds=5, time_budget_seconds=60, best_speedup=1.86),
        events.Warned(message="a thing", hint="do that"),
        events.Finished(result=result),
    ):
        ladder.show(event)
    return screen.getvalue()


def test_the_ladder_on_a_terminal_redraws_its_footer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = play(True, monkeypatch)
    assert "\x1b[" in text
    assert text.count("0.050%") == 1 or text.count("0.05%") == 1
    assert text.rstrip().splitlines()[-1].startswith("  try it: snello run lean/x")


def test_the_ladder_in_a_log_has_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = play(False, monkeypatch)
    assert "\x1b" not in text and "[#" not in text
    assert "kept" in text and "note: a thing" in text
    text.encode("ascii")


@pytest.mark.parametrize(
    ("task", "hint"),
    [("causal-lm", "snello run x"), ("embedding", 'snello embed x "a text"'), ("masked-lm", "snello bench x")],
)
def test_what_to_try_fits_the_model(task: str, hint: str) -> None:
    screen = Screen(False)
    ladder = Ladder(Terminal(err=screen, out=Screen(False)), "latency")
    ladder.show(
        events.ModelLoaded(
            model="m", path=Path("."), num_parameters=1, weights="bf16", weights_bytes=2, digest="x", task=task
        )
    )
    ladder.show(events.Finished(result=events.Result(exit_code=0, sentence="3x faster.", path=Path("x"))))
    assert screen.getvalue().endswith(f"  try it: {hint}\n")


@pytest.mark.parametrize(("smallest", "said"), [(0.004, True), (float("inf"), False), (float("nan"), False)])
def test_what_a_text_can_prove_is_a_number_or_not_said(smallest: float, said: bool) -> None:
    source = events.TextSource(name="t", documents=3, calib_tokens=1, select_tokens=1, proof_tokens=1, dropped_blocks=0)
    screen = Screen(False)
    Ladder(Terminal(err=screen, out=Screen(False)), "latency").show(
        events.TextRead(
            sources=(source,), self_written=False, smallest_provable=smallest, max_loss=0.01, measure="loss"
        )
    )
    assert ("can prove 0.40% or more" in screen.getvalue()) == said
    assert "nan" not in screen.getvalue() and "no bound" not in screen.getvalue()


def test_rows_say_the_verdict_in_words() -> None:
    lines = [row_line(row) for row in samples.rows()]
    assert "23 of 24 possible" in lines[0]
    assert "dropped: over 1%" in lines[4]
    assert lines[5].endswith("not run: cannot pay at 640 tokens")


def test_time_left_is_a_range_at_first() -> None:
    assert time_left(0.0, 10) == ""
    assert "-" in time_left(0.05, 10)
    assert time_left(0.5, 100) == "1:40 left"


def test_small_drawings() -> None:
    assert bar(0.5, 4) == "[##..]"
    assert bar(7, 4) == "[####]"
    assert table([("a", "1"), ("bbb", "22")], right=(1,)) == ["a     1", "bbb  22"]


def test_marks_stand_out_without_colours() -> None:
    terminal = Terminal(err=Screen(False), out=Screen(False))
    assert terminal.mark("x") == "[x]"


def test_intervals_round_trip() -> None:
    assert Interval.from_json(Interval(1, 2, 3).to_json()) == Interval(1, 2, 3)

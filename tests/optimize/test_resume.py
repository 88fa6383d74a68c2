"""Killed at any unit boundary, a run goes on: nothing finished is done again, and the end is the same to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snello.errors import SnelloError
from snello.optimize import receipts
from snello.optimize.events import Finished, ModelLoaded, StageJudged, Warned
from snello.optimize.files import sha256_file
from snello.optimize.journal import Journal
from snello.optimize.run import optimize
from tests.optimize import fakes
from tests.optimize.conftest import Bed

SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from snello.optimize import files, journal
from snello.optimize.run import optimize
from tests.optimize import fakes

limit = int(sys.argv[1])
fakes.install()
count = 0
real_replace, real_rename = os.replace, os.rename

def counted(real):
    def wrapper(*arguments, **options):
        global count
        count += 1
        if count == limit:
            os._exit(9)
        result = real(*arguments, **options)
        if count == -limit:
            os._exit(9)
        return result
    return wrapper

os.replace, os.rename = counted(real_replace), counted(real_rename)
folder = Path({folder!r})
bench = fakes.FakeWorkbench(folder)
kept = ("int8", "int4 rtn", "int4 gptq", "int4 awq", "mixed gptq", "int3 gptq")
bench.effects = {{name: bench.effects[name] for name in kept}}
events = list(optimize("fake", text=Path({text!r}), max_loss="4%", output=folder / "out", workbench=bench,
                       recipe=Path({recipe!r})))
print(json.dumps({{"applied": bench.applied, "renames": count, **events[-1].to_json()}}))
"""

RECIPE = """
[[steps]]
use = "quantize"
weights = "int8"

[[steps]]
use = "quantize"
weights = "int4"

[[steps]]
use = "quantize"
weights = "int4"
method = "gptq"
"""


def start(folder: Path, text: Path, limit: int) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(RECIPE)
    script = SCRIPT.format(root=root, folder=str(folder), text=str(text), recipe=str(recipe))
    return subprocess.run([sys.executable, "-c", script, str(limit)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_killed_before_and_after_every_rename_it_goes_on(tmp_path: Path) -> None:
    """Every file that a run leaves appears by a rename, so these are all its boundaries."""
    text = fakes.write_text(tmp_path / "text.txt", words=30_000)
    clean = tmp_path / "clean"
    clean.mkdir()
    done = start(clean, text, 0)
    assert done.returncode == 0, done.stderr
    import json

    facts = json.loads(done.stdout)
    expected = sha256_file(clean / "out" / "model.safetensors")
    assert facts["renames"] > 25
    for limit in [*range(1, facts["renames"] + 1, 4), -facts["renames"], 1 - facts["renames"]]:
        folder = tmp_path / f"killed{limit}"
        folder.mkdir()
        killed = start(folder, text, limit)
        assert killed.returncode == 9, (limit, killed.stderr)
        out = folder / "out"
        if out.exists():
            assert receipts.read(out).proof is not None  # whole
        again = start(folder, text, 0)
        assert again.returncode == 0, (limit, again.stderr)
        assert sha256_file(out / "model.safetensors") == expected
        assert not (folder / "out.work").exists()
        assert receipts.read(out).proof is not None


@pytest.mark.parametrize("after", [1, 4, 9, 16, 24, 40])
def test_killed_after_a_unit_nothing_is_done_again(
    make_bed: Callable[[str], Bed], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class Killed(BaseException):
        pass

    bed = make_bed("killed")
    bed.bench.effects["int4 rtn"] = (0.015, 0.33)  # kept, then replaced by one of equal cost
    kept: list[str] = []
    real = Journal.keep

    def keep(self: Journal, key: str, unit: object) -> None:
        assert key not in kept, "done again"
        real(self, key, unit)  # type: ignore[arg-type]
        kept.append(key)
        if len(kept) == after:
            raise Killed

    monkeypatch.setattr(Journal, "keep", keep)
    with pytest.raises(Killed):
        bed.run()
    assert not bed.output.exists()
    result = bed.run()
    monkeypatch.undo()
    fakes.install()
    other = make_bed("clean")
    other.bench.effects["int4 rtn"] = (0.015, 0.33)
    clean = other.run()
    assert result.exit_code == clean.exit_code == 0
    assert result.artifact_sha256 == clean.artifact_sha256
    assert isinstance(bed.events[0], ModelLoaded) and bed.events[0].resumed
    assert [row.verdict for row in result.ladder] == [row.verdict for row in clean.ladder]
    assert [row.replaces for row in result.ladder] == [row.replaces for row in clean.ladder]
    assert [row.loss for row in result.ladder] == [row.loss for row in clean.ladder]
    assert len(bed.bench.applied) == len(set(bed.bench.applied)) + 1  # the int8 cache applies gptq once more


def test_judged_stages_come_from_the_journal(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    events = optimize("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench)
    for event in events:
        if isinstance(event, StageJudged) and event.row.name == "quantize int4, rtn":
            break
    events.close()  # type: ignore[attr-defined]
    before = list(bed.bench.applied)
    result = bed.run()
    resumed = [e.row.name for e in bed.events if isinstance(e, StageJudged) and e.resumed]
    assert resumed == ["quantize int8", "quantize int4, rtn"]
    assert bed.bench.applied[: len(before)] == before
    assert bed.bench.applied.count("int8 rtn") == bed.bench.applied.count("int4 rtn") == 1
    assert result.exit_code == 0


def test_ctrl_c_ends_between_units_and_is_resumable(bed: Bed) -> None:
    events, before = [], signal.getsignal(signal.SIGINT)
    for event in optimize("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench):
        events.append(event)
        if isinstance(event, StageJudged) and event.row.kind == "fault":
            os.kill(os.getpid(), signal.SIGINT)
    last = events[-1]
    assert isinstance(last, Finished) and last.result.exit_code == 130
    assert "goes on from here" in last.result.sentence
    assert not bed.output.exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert bed.run().exit_code == 0


def test_the_first_ctrl_c_within_a_unit_is_answered_at_once(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bed.bench.apply

    def apply(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        return real(*arguments)

    monkeypatch.setattr(bed.bench, "apply", apply)
    result = bed.run()
    assert result.exit_code == 130
    said = [event.message for event in bed.events if isinstance(event, Warned)]
    assert said[-1].startswith("stopping: what is under way is finished")
    assert len(bed.bench.applied) == 1
    monkeypatch.undo()
    fakes.install()
    assert bed.run().exit_code == 0
    assert bed.bench.applied.count("int8 rtn") == 1  # it was finished and written down


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_a_demand_stops_within_a_unit_and_is_resumable(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, ...]
) -> None:
    real, left = bed.bench.apply, threading.Event()

    def apply(step: Any, model: Any, context: Any) -> Any:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.4)
        try:
            while True:
                context.progress("working", 0.5)
                time.sleep(0.01)
        finally:
            left.set()

    monkeypatch.setattr(bed.bench, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        bed.run()
    assert left.is_set()  # no thread goes on behind the run's back
    monkeypatch.setattr(bed.bench, "apply", real)
    assert bed.run().exit_code == 0
    assert isinstance(bed.events[0], ModelLoaded) and bed.events[0].resumed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_killed_run_left_half_written_is_swept(bed: Bed) -> None:
    work = bed.output.with_name("out.work")
    for folder in (".a.1.partial", "a.state"):
        (work / "artifacts" / folder).mkdir(parents=True)
    (work / "units").mkdir()
    (work / "units" / "b.json.1.partial").write_text("{")
    events = optimize("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench)
    next(events)
    # a state is whole: the step that left it goes on from it
    assert [path.name for path in (work / "artifacts").iterdir()] == ["a.state"] and not list(
        (work / "units").glob("*.partial")
    )
    events.close()  # type: ignore[attr-defined]


def test_resume_false_starts_anew(bed: Bed) -> None:
    for event in optimize("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench):
        if isinstance(event, StageJudged) and event.row.name == "quantize int8":
            break
    bed.run(resume=False)
    assert bed.bench.applied.count("int8 rtn") == 2


def test_an_interrupted_write_leaves_nothing_readable(tmp_path: Path) -> None:
    import numpy as np

    from snello.optimize.journal import Unit, unit_key

    journal = Journal(tmp_path)
    key = unit_key("score", {"a": 1})
    journal.keep(key, Unit("score", {"x": 1.5}, 2.0, {"v": np.arange(3)}))
    found = journal.recall(key)
    assert found is not None and found.value == {"x": 1.5} and found.arrays["v"].tolist() == [0, 1, 2]
    arrays = tmp_path / "units" / f"{key}.npz"
    for half in (b"half", arrays.read_bytes()[:100], b""):
        arrays.write_bytes(half)
        assert journal.recall(key) is None
    (tmp_path / "units" / f"{key}.json").write_text('{"name": "sc')
    assert journal.recall(key) is None
    assert unit_key("score", {"a": 2}) != key
    journal.close()


def test_a_full_disk_leaves_the_old_output(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.run()
    before = sha256_file(bed.output / "model.safetensors")
    from snello.optimize import publish

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "link_folder", full)
    with pytest.raises(SnelloError, match="the disk is full") as error:
        bed.run(overwrite=True, max_loss="5%")
    assert error.value.hint is not None and "goes on from here" in error.value.hint
    assert sha256_file(bed.output / "model.safetensors") == before

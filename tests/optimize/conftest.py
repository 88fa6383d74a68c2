"""Counted time and a fake workbench for every test of this folder that asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snello.optimize.events import Event, Finished, Result
from snello.optimize.run import optimize
from tests.optimize import fakes


@pytest.fixture
def fake_time() -> Iterator[type[fakes.FakeTime]]:
    import time

    fakes.install()
    yield fakes.FakeTime
    fakes.install(time)


@dataclass
class Bed:
    """One fake model, one text, one output folder."""

    bench: fakes.FakeWorkbench
    text: Path
    output: Path
    events: list[Event]

    def run(self, **options: Any) -> Result:
        wishes = {"text": self.text, "max_loss": "4%", "output": self.output, "workbench": self.bench, **options}
        self.events = list(optimize("fake", **wishes))
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last.result

    def verdicts(self, result: Result) -> dict[str, str]:
        return {row.name: row.verdict for row in result.ladder}


@pytest.fixture
def bed(tmp_path: Path, fake_time: Any) -> Bed:
    text = fakes.write_text(tmp_path / "text.txt", words=36_000)
    return Bed(fakes.FakeWorkbench(tmp_path), text, tmp_path / "out", [])


@pytest.fixture
def make_bed(tmp_path: Path, fake_time: Any) -> Callable[[str], Bed]:
    def make(name: str) -> Bed:
        folder = tmp_path / name
        folder.mkdir()
        text = tmp_path / "shared.txt"
        if not text.exists():
            fakes.write_text(text, words=36_000)
        return Bed(fakes.FakeWorkbench(folder), text, folder / "out", [])

    return make

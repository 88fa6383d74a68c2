"""The user's own score: a command per model, a JSON list, a paired verdict, and errors that say what to mend."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from snello.errors import SnelloError, Unsupported
from snello.measure import metric


def command(tmp_path: Path, body: str) -> str:
    script = tmp_path / "score.py"
    script.write_text("import sys\n" + body)
    return f"{sys.executable} {script} {{model}}"


def test_scores_are_the_last_line(tmp_path: Path) -> None:
    found = metric.run(command(tmp_path, "print('hello', sys.argv[1])\nprint([1, 0.5] * 4)"), Path("m"))
    assert found.tolist() == [1.0, 0.5] * 4


def test_url_is_unsupported_and_no_model_is_an_error() -> None:
    with pytest.raises(Unsupported, match="needs a server"):
        metric.check_command("python score.py {url}")
    with pytest.raises(SnelloError, match="names no"):
        metric.check_command("python score.py")


@pytest.mark.parametrize(
    "output", ["", "no numbers", "[1]", '["a", "b"]', f"[{7 * 'NaN, '}1]", "[[1, 2]]", "[1, 1, 1, 1, 1, 1, 1]"]
)
def test_bad_output(output: str) -> None:
    """Seven scores bound nothing, so that with them every stage would be dropped."""
    with pytest.raises(SnelloError, match="the metric printed"):
        metric.parse(output)


def test_failures_carry_the_last_line_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="exited with 3: no data") as error:
        metric.run(command(tmp_path, "print('no data', file=sys.stderr); sys.exit(3)"), Path("m"))
    assert error.value.hint is not None and "score.py m" in error.value.hint


def test_drop_is_a_share_with_bounds() -> None:
    generator = np.random.default_rng(0)
    original = (generator.random(2000) < 0.8).astype(float)
    same = metric.drop(original, original, seed=0)
    assert (same.low, same.mid, same.high) == (0.0, 0.0, 0.0)
    worse = original.copy()
    worse[np.flatnonzero(original)[:32]] = 0.0
    found = metric.drop(original, worse, seed=0)
    assert found.mid == pytest.approx(32 / original.sum())
    assert found.low < found.mid < found.high
    with pytest.raises(SnelloError, match="2000 scores for the original and 3"):
        metric.drop(original, np.ones(3), seed=0)

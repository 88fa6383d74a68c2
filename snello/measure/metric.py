"""The user's own score: a command that prints one number per example, higher is better, gated like the loss.

The command is run once for each model with `{model}` replaced by its folder; its last line of output is a JSON list of
numbers, the examples in the same order every time. The verdict is the paired bootstrap of the relative drop.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure.bootstrap import LEAST_CLUSTERS, Clusters, mean_interval
from snello.measure.interval import Interval


def check_command(command: str) -> None:
    """Refuses a command that could not work, before any time is spent."""
    if "{url}" in command:
        hint = "use {model}: the command is given the model's folder, and prints a JSON list of scores"
        raise Unsupported("--metric with {url} needs a server, which this command does not start", hint)
    if "{model}" not in command:
        raise SnelloError("--metric names no {model}", "for example --metric 'python score.py {model}'")
    try:
        program = shlex.split(command)[0]
    except ValueError as error:
        raise SnelloError(f"--metric cannot be read: {error}", "close every quote") from error
    if shutil.which(program) is None:
        raise SnelloError(f"--metric: there is no program {program}", "give its path, and make it executable")


def run(command: str, model: Path, *, timeout_seconds: float | None = None) -> np.ndarray:
    """Scores per example, (N,) float64."""
    check_command(command)
    arguments = [part.replace("{model}", str(model)) for part in shlex.split(command)]
    hint = f"try it yourself: {shlex.join(arguments)}"
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SnelloError(f"the metric did not run: {error}", hint) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SnelloError(f"the metric exited with {done.returncode}: {last}", hint)
    return parse(done.stdout)


def parse(output: str) -> np.ndarray:
    """The last line of the command's output as scores."""
    hint = f"the last line must be a JSON list of numbers, one per example, at least {LEAST_CLUSTERS}"
    lines = output.strip().splitlines()
    try:
        scores = np.array(json.loads(lines[-1]), np.float64)
    except (ValueError, IndexError, TypeError) as error:
        raise SnelloError("the metric printed no list of scores", hint) from error
    if scores.ndim != 1 or len(scores) < LEAST_CLUSTERS or not np.isfinite(scores).all():
        raise SnelloError(f"the metric printed {scores.size} usable scores", hint)
    return scores


def drop(original: np.ndarray, other: np.ndarray, *, seed: int) -> Interval:
    """How much worse, as a share of the original's mean score, with one-sided 95% bounds."""
    if len(original) != len(other):
        message = f"the metric gave {len(original)} scores for the original and {len(other)} for the other"
        raise SnelloError(message, "print one score per example, the same examples each time")
    level = abs(float(original.mean()))
    if level == 0:
        raise SnelloError("the original scores 0 on average: no share of it can be lost", "use another metric")
    mean = mean_interval(Clusters(original - other, np.ones(len(original))), seed=seed)
    return Interval(mean.low / level, mean.mid / level, mean.high / level)

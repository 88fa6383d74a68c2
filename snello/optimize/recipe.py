"""Recipes: what to try, written down. Strict TOML in, resolved TOML out, with the decisions that make it replay.

A recipe names a model, texts, a budget and steps. A key that does not exist is an error that names the nearest one.
The recipe that a run leaves has every option spelt out and a `[replay]` table: with it, the recorded steps are applied
without deciding anew, on the same text with the same seed, and give the same artefact hash. Without that table the same
recipe decides afresh.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snello.errors import SnelloError
from snello.optimize.target import Target
from snello.techniques.base import Technique
from snello.techniques.table import TECHNIQUES

VERSION = 1
TOP_KEYS = ("version", "model", "text", "seed", "budget", "data", "steps", "replay")
BUDGET_KEYS = ("max_loss", "goal", "target", "time_seconds", "strict", "metric", "lossless")
DATA_KEYS = ("calib_tokens", "select_tokens", "proof_tokens")
REPLAY_KEYS = ("model_digest", "text_sha256", "artifact_sha256", "snello", "decisions")
DECISION_KEYS = ("stage", "verdict", "reason")
GOALS = ("latency", "throughput", "memory")
AFRESH = "remove the whole [replay] table to decide afresh"


@dataclass(frozen=True)
class Step:
    """One use of a technique. Only the options that differ from the defaults need be given."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def technique(self) -> Technique:
        return TECHNIQUES[self.use](**self.options)

    def resolved(self) -> dict[str, Any]:
        """Every option of the technique, spelt out; what is unset is left out."""
        technique = self.technique
        values = {f.name: getattr(technique, f.name) for f in dataclasses.fields(technique)}
        return {"use": self.use, **{name: value for name, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Stage:
    """Steps that stand or fall together."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a finished run decided."""

    model_digest: str
    text_sha256: str
    artifact_sha256: str | None = None
    snello: str = ""
    decisions: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as written: what is None was left open."""

    model: str | None = None
    text: tuple[str, ...] = ()
    seed: int | None = None
    max_loss: float | None = None
    goal: str | None = None
    target: Target | None = None
    time_seconds: float | None = None
    strict: bool | None = None
    metric: str | None = None
    lossless: bool | None = None
    data: Mapping[str, int] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    replay: Replay | None = None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe; texts are relative to its folder."""
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SnelloError(f"there is no recipe at {path}", "write one, or leave --recipe out") from error
        except OSError as error:
            raise SnelloError(f"the recipe {path} cannot be read: {error.strerror}", "give a TOML file") from error
        except ValueError as error:  # not UTF-8, or not TOML
            raise SnelloError(f"{path} is not TOML: {error}", "compare it with recipes/*.toml") from error
        recipe = cls.from_table(table)
        texts = tuple(str(path.parent / text) for text in recipe.text)
        return dataclasses.replace(recipe, text=texts)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Recipe:
        _check_keys("recipe", table, TOP_KEYS)
        if table.get("version", VERSION) != VERSION:
            raise SnelloError(f"recipe version {table['version']!r} is not {VERSION}", "update snello")
        budget, data = _table(table, "budget", BUDGET_KEYS), _table(table, "data", DATA_KEYS)
        goal = budget.get("goal")
        if goal is not None and goal not in GOALS:
            raise SnelloError(f"[budget] goal is {goal!r}", nearest(str(goal), GOALS))
        return cls(
            model=_typed("recipe", table, "model", str),
            text=_texts(table.get("text", ())),
            seed=_typed("recipe", table, "seed", int),
            max_loss=None if "max_loss" not in budget else share(budget["max_loss"], "[budget] max_loss"),
            goal=goal,
            target=None if "target" not in budget else Target.parse(budget["target"], "[budget] target"),
            time_seconds=_typed("[budget]", budget, "time_seconds", float),
            strict=_typed("[budget]", budget, "strict", bool),
            metric=_typed("[budget]", budget, "metric", str),
            lossless=_typed("[budget]", budget, "lossless", bool),
            data={key: _count(data, key) for key in data},
            stages=_stages(table.get("steps", ())),
            replay=_replay(table.get("replay")),
        )

    def to_toml(self) -> str:
        """The recipe as TOML that `load` reads back, every option spelt out."""
        top = {"version": VERSION, "model": self.model, "text": list(self.text), "seed": self.seed}
        budget = {key: getattr(self, key) for key in BUDGET_KEYS}
        budget["target"] = None if self.target is None else self.target.to_toml()
        parts = [_pairs(top), "[budget]\n" + _pairs(budget)]
        if self.data:
            parts.append("[data]\n" + _pairs(self.data))
        for stage in self.stages:
            for step in stage.steps:
                parts.append("[[steps]]\n" + _pairs({"stage": stage.name, **step.resolved()}))
        if self.replay is not None:
            fields = {key: getattr(self.replay, key) for key in REPLAY_KEYS if key != "decisions"}
            parts.append("[replay]\n" + _pairs(fields))
            parts += ["[[replay.decisions]]\n" + _pairs(decision) for decision in self.replay.decisions]
        return "\n".join(parts)


# ---- reading ----


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise SnelloError(f"recipe text is {value!r}", 'write a path or a list of them: text = ["yours.txt"]')
    return tuple(texts)


def _count(data: Mapping[str, Any], key: str) -> int:
    value: int = _typed("[data]", data, key, int)
    if value < 1:
        raise SnelloError(f"[data] {key} is {value}", "it must be at least 1")
    return value


def _stages(steps: Any) -> tuple[Stage, ...]:
    """Consecutive steps with one `stage` name are one stage; a step without it is a stage of its own."""
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, dict) for step in steps):
        raise SnelloError("steps must be a list of tables", "write each step under its own [[steps]]")
    stages: list[Stage] = []
    for number, entry in enumerate(steps):
        step = _step(number, entry)
        name = _typed(f"steps[{number}]", entry, "stage", str)
        if name is not None and stages and stages[-1].name == name:
            stages[-1] = Stage(name, (*stages[-1].steps, step))
        else:
            stages.append(Stage(name if name is not None else describe(step), (step,)))
    return tuple(stages)


def _step(number: int, entry: Mapping[str, Any]) -> Step:
    use = _typed(f"steps[{number}]", entry, "use", str)
    if use not in TECHNIQUES:
        message = f"steps[{number}]: there is no technique {use!r}" if use else f"steps[{number}] has no `use`"
        raise SnelloError(message, nearest(str(use or ""), TECHNIQUES))
    where = f"steps[{number}] ({use})"
    options = {key: value for key, value in entry.items() if key not in ("use", "stage")}
    _check_keys(where, options, [f.name for f in dataclasses.fields(TECHNIQUES[use])])
    step = Step(use, options)
    try:
        step.technique  # noqa: B018 - its own checks of the values
    except SnelloError as error:
        raise SnelloError(f"{where}: {error.message}", error.hint) from error
    except TypeError as error:
        raise SnelloError(f"{where}: {error}", f"see `snello explain {use}`") from error
    return step


def describe(step: Step) -> str:
    """ "quantize int4 gptq", "prune ffn 0.25", "quantize int8 cache int8": the technique, the words, and by their names
    the numbers and a word that was there already."""
    shown = [step.use]
    for name, value in step.options.items():
        if isinstance(value, str):
            shown.append(f"{name} {value}" if value in shown else value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            shown.append(f"{name} {value:g}")
    return " ".join(shown)


def _replay(table: Any) -> Replay | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        raise SnelloError("replay must be a table", AFRESH)
    _check_keys("[replay]", table, REPLAY_KEYS)
    for key in REPLAY_KEYS[:-1]:
        if _typed("[replay]", table, key, str) is None and key in ("model_digest", "text_sha256"):
            raise SnelloError(f"[replay] has no {key}", AFRESH)
    decisions = table.get("decisions", [])
    if not isinstance(decisions, list) or not all(isinstance(decision, dict) for decision in decisions):
        raise SnelloError("[replay] decisions must be a list of tables", AFRESH)
    for decision in decisions:
        _check_decision(decision)
    return Replay(**{**table, "decisions": tuple(decisions)})


def _check_decision(decision: Mapping[str, Any]) -> None:
    where = "[[replay.decisions]]"
    _check_keys(where, decision, DECISION_KEYS)
    for key in DECISION_KEYS:
        if _typed(where, decision, key, str) is None:
            raise SnelloError(f"{where} has no {key}", AFRESH)


def _table(table: Mapping[str, Any], name: str, keys: Iterable[str]) -> Mapping[str, Any]:
    inner = table.get(name, {})
    if not isinstance(inner, dict):
        raise SnelloError(f"{name} must be a table", f"write [{name}] on a line of its own")
    _check_keys(f"[{name}]", inner, keys)
    return inner


def _check_keys(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in table:
        if key not in tuple(known):
            raise SnelloError(f"{where}: unknown key {key!r}", nearest(key, known))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'group_size'?", or all that there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"


def _typed(where: str, table: Mapping[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if value is None:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SnelloError(f"{where} {key} is {value!r}", f"it must be of type {kind.__name__}")
    return value


def share(value: Any, name: str) -> float:
    """0.01 or "1%" -> 0.01."""
    try:
        number = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except (TypeError, ValueError) as error:
        raise SnelloError(f"{name} is {value!r}", 'write a share such as 0.01 or "1%"') from error
    if not 0 < number < 1:
        raise SnelloError(f"{name} is {value!r}", "it must be more than 0% and less than 100%")
    return number


# ---- writing ----


def _pairs(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"TOML holds no {type(value).__name__}")

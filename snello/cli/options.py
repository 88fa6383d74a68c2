"""Parsers: common flags, values with units, and the flags of a technique, which come from its dataclass.

An option is written once, as a field with a type and `metadata={"help": ...}`; this module turns it into a flag and a
row of `explain`. No abbreviations: an abbreviation is a promise that nobody made.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from snello.errors import SnelloError
from snello.models.spec import DEPLOYMENT_LIMITS

if TYPE_CHECKING:
    from snello.optimize.target import Target


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, a hint, exit code 2."""

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Options may stand between positionals: MODEL --adapter DIR PROMPT."""
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        raise SnelloError(_lower_first(message), self._hint(message), exit_code=2)

    def _hint(self, message: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in re.findall(r"--[\w-]+", message):
            near = difflib.get_close_matches(word, flags, 1)
            if near and word not in flags:
                return f"did you mean {near[0]}? {self.prog} --help lists all"
        return f"{self.prog} --help has examples and all options"


def make_parser(verb: str, summary: str, examples: Sequence[str]) -> Parser:
    parser = Parser(
        prog=f"snello {verb}",
        description=summary + "\n\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    common = parser.add_argument_group("everywhere")
    common.add_argument("-h", "--help", action="store_true", help="this text")
    common.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    common.add_argument("-q", "--quiet", action="store_true", help="no conversation on stderr")
    common.add_argument("-v", "--verbose", action="store_true", help="more conversation, and tracebacks")
    return parser


# ---- values with units ----------------------------------------------------------------------------------------------


def _pattern(
    regex: str, meaning: str, convert: Callable[[re.Match[str]], float], inside: Callable[[float], bool], bounds: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        match = re.fullmatch(regex, text.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        value = convert(match)
        if not inside(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}")
        return value

    return parse


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "": 1}
percent = _pattern(
    r"(\d+(?:\.\d+)?)(%?)",
    "a loss: write 1% or 0.01",
    lambda m: float(m[1]) / (100 if m[2] else 1),
    lambda value: 0 < value < 1,
    "more than 0% and less than 100%",
)
duration = _pattern(
    r"(\d+(?:\.\d+)?)\s*(s|min|m|h|)",
    "a time: write 90s, 30m or 2h",
    lambda m: float(m[1]) * _UNITS[m[2]],
    lambda value: value > 0,
    "a time above zero",
)


def target(text: str) -> Target:
    """What counts as success: 2x, or 300MB."""
    from snello.optimize.target import Target

    try:
        return Target.parse(text)
    except SnelloError as error:
        raise argparse.ArgumentTypeError(f"{error.message}: {error.hint}") from None


def at_least(low: int, most: int | None = None) -> Callable[[str], int]:
    """An integer type for argparse with a lower bound, and perhaps an upper one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most:,}")
        return value

    return parse


def of_deployment(name: str) -> Callable[[str], int]:
    """The integer type of a field of `Deployment`, within its limits."""
    least, most, _ = DEPLOYMENT_LIMITS[name]
    return at_least(least, most)


def add_running(parser: argparse.ArgumentParser) -> None:
    """How many requests an engine answers at once, how long they may be, and how it goes about it."""
    add = parser.add_argument
    context, threads, most = (of_deployment(name) for name in ("context", "threads", "max_num_seqs"))
    add("--context", type=context, metavar="N", help="positions of one request [the model's, if memory allows]")
    add("--threads", type=threads, metavar="N", help="[the physical cores]")
    add("--max-num-seqs", type=most, default=32, metavar="N", help="answers that run at the same time [32]")
    add("--speculate", metavar="HOW", help="the same answers, sooner: prompt-lookup, suffix, a smaller model, or off")


# ---- the options of a dataclass -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a technique: `choices` empty for open values, `optional` where None is a value."""

    name: str
    kind: type
    choices: tuple[Any, ...]
    optional: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options_of(cls: type) -> list[Option]:
    hints = typing.get_type_hints(cls)
    return [_option(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    members = list(typing.get_args(hint)) if _is_union(hint) else [hint]
    optional = type(None) in members
    members = [member for member in members if member is not type(None)]
    choices = tuple(c for m in members if typing.get_origin(m) is Literal for c in typing.get_args(m))
    plain = [m for m in members if typing.get_origin(m) is not Literal]
    kind = type(choices[0]) if choices else plain[0]
    default = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    help_text = str(field.metadata.get("help", ""))
    return Option(name=field.name, kind=kind, choices=choices, optional=optional, default=default, help=help_text)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def add_options(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """The fields of `cls` as flags; `None` as a word stands for None where the field allows it."""
    group = parser.add_argument_group(title)
    for option in options_of(cls):
        text = _help_text(option)
        if option.kind is bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        group.add_argument(
            option.flag,
            type=_reader(option),
            default=argparse.SUPPRESS,
            metavar=_metavar(option),
            help=text,
        )


def build(cls: type, arguments: argparse.Namespace) -> Any:
    """An instance of `cls` from the flags that were given; the others keep the dataclass's defaults."""
    given = {o.name: getattr(arguments, o.name) for o in options_of(cls) if hasattr(arguments, o.name)}
    return cls(**given)


def option_rows(cls: type) -> Iterable[tuple[str, str, str, str]]:
    """(flag, values, default, help) of each field, for `explain` and the documentation."""
    for option in options_of(cls):
        yield option.flag, _metavar(option), str(option.default).lower(), option.help


def _reader(option: Option) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if option.optional and text == "none":
            return None
        try:
            value = option.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {_metavar(option)}") from None
        if option.choices and value not in option.choices:
            near = difflib.get_close_matches(text, [str(choice) for choice in option.choices], 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {_metavar(option)}{meant}")
        return value

    return read


def _metavar(option: Option) -> str:
    if option.kind is bool:
        return "or --no-" + option.name.replace("_", "-")
    values = [str(choice) for choice in option.choices] or [option.kind.__name__]
    return "|".join(values + (["none"] if option.optional else []))


def _help_text(option: Option) -> str:
    default = str(option.default).lower()
    return f"{option.help} [{default}]".strip().replace("%", "%%")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]

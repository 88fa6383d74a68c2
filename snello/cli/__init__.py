"""The command line: one module a verb, imported only when that verb is chosen, and one way to end.

stdout carries the product, stderr the conversation. `--json` makes stdout one JSON document as its last line for every
verb, errors included. Exit codes: 0 done (also "nothing paid"), 1 failed, 2 usage, 3 target missed or proof failed,
4 the text cannot prove the budget, 130 interrupted. A `SnelloError` is two lines; a bug is one line and the path of a
log.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snello.errors import SnelloError, storage_error
from snello.terminal import Terminal, prepare_streams

if TYPE_CHECKING:
    from snello.cli.options import Parser

VERBS: dict[str, str] = {  # in the order of a first day
    "run": "generate or chat in the terminal, streaming",
    "optimize": "model in; lean model and proof out",
    "adapt": "a task learned by a small adapter, or one merged into its base",
    "check": "the same verdict on what was made elsewhere: a folder, a GGUF file, a server",
    "report": "the proof of an optimized folder, as a page",
    "export": "the formats that other tools load, checked by a round trip",
    "embed": "vectors of texts, with an encoder",
    "serve": "an OpenAI-compatible server",
    "batch": "a file of OpenAI requests, answered with the machine full",
    "bench": "speed beside the ceiling of this machine",
    "apply": "one technique alone",
    "doctor": "what this machine can do, and which kernel serves which operation",
    "explain": "a technique: the idea, its options, when it hurts",
}

HELP = """\
snello: a trained language model in; a lean one, proved still good, out. Fast on CPUs.

  snello doctor
  snello run demo "def area(radius):"
  snello optimize Qwen/Qwen3-0.6B --text yours.txt --max-loss 1% --goal latency

{verbs}

snello VERB --help has examples and options; every verb takes --json, -q and -v.
exit codes: 0 done, 1 failed, 2 usage, 3 target missed or proof failed,
            4 the text cannot prove the budget, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `snello`; returns the exit code."""
    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(words, Terminal(json="--json" in words))


def _overview(words: list[str]) -> bool:
    """Says what needs no verb: the help of all, or the version. False where a verb was named."""
    if not words or words[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:<10}{summary}" for verb, summary in VERBS.items())
        sys.stdout.write(HELP.format(verbs=verbs))
    elif words[0] == "--version":
        from snello import __version__

        sys.stdout.write(f"snello {__version__}\n")
    else:
        return False
    return True


def _guarded(words: list[str], terminal: Terminal) -> int:
    """Runs the verb; whatever happens becomes an exit code and, with --json, one last document."""
    verbose = any(word in ("-v", "--verbose") for word in words)
    try:
        document = None if _overview(words) else dispatch(words, terminal)
    except SnelloError as error:
        return _fail(terminal, error.message, error.hint, error.exit_code)
    except KeyboardInterrupt as interrupt:
        return _leave(_fail(terminal, "interrupted", str(interrupt) or None, 130))
    except BrokenPipeError:  # the reader has what it wanted (`| head`)
        _let_go()
        return 0
    except MemoryError:
        return _fail(terminal, "out of memory", "a smaller --context, or a model in fewer bits, needs less", 1)
    except Exception as error:
        known = storage_error(error, "output", "free some space, then again") if isinstance(error, OSError) else None
        if known is not None:
            return _fail(terminal, known.message, known.hint, known.exit_code)
        if verbose:
            raise
        hint = f"this is a bug; {write_log(words)} has the details (-v prints them)"
        return _fail(terminal, f"{type(error).__name__}: {error}".splitlines()[0], hint, 1)
    code = 0 if document is None else int(document.pop("exit", 0))  # None: help was asked for
    return _conclude(terminal, code, document)


def dispatch(words: list[str], terminal: Terminal) -> dict[str, Any] | None:
    """Parses the rest for its verb and executes it: the fields of its JSON document; None where help was printed."""
    parser, rest = parser_for(words)
    if "-h" in rest or "--help" in rest:
        sys.stdout.write(parser.format_help())
        return None
    arguments = parser.parse(rest)
    terminal.quiet, terminal.verbose = arguments.quiet, arguments.verbose
    terminal.live = terminal.live and not terminal.quiet
    document: dict[str, Any] = _module(words[0]).execute(arguments, terminal)
    return document


def parser_for(words: list[str]) -> tuple[Parser, list[str]]:
    """The parser of the verb that `words` begin with, and the words that it is to read.

    Raises:
        SnelloError: there is no such verb.
    """
    from snello.cli.options import make_parser

    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise SnelloError(f"there is no verb {verb!r}", _nearest_verb(verb), exit_code=2)
    module = _module(verb)
    parser = make_parser(verb, VERBS[verb], module.EXAMPLES)
    if verb == "apply":
        rest = module.choose(parser, rest)
    module.add_arguments(parser)
    return parser, rest


def _module(verb: str) -> Any:
    from importlib import import_module

    return import_module(f"snello.cli.{verb}")


def _fail(terminal: Terminal, message: str, hint: str | None, code: int) -> int:
    lines = [f"error: {message}"] + [f"hint:  {line}" for line in (hint or "").splitlines()]
    terminal.always("\n".join(lines))
    return _conclude(terminal, code, {"error": message, "hint": hint})


def _conclude(terminal: Terminal, code: int, document: dict[str, Any] | None) -> int:
    """Writes the last document and what waits to be written. Whether anybody reads it changes no exit code; that it
    could not be written makes a success a failure.
    """
    try:
        if terminal.json and document is not None:
            terminal.document({"event": "result", "exit": code, **document})
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
    except OSError as error:
        _let_go()
        if code == 0:
            lines = (
                f"error: standard output could not be written: {error.strerror}",
                "hint:  free some space, then again",
            )
            terminal.always("\n".join(lines))
            return 1
    return code


def _let_go() -> None:
    """What is still buffered for stdout goes nowhere, so that the end of the process does not stumble over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(code: int) -> int:
    """Where a unit of work would not stop, the process ends under it: unwinding would wait for it, or abort."""
    if any(thread.daemon and thread.name.startswith("snello ") for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


def _nearest_verb(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, VERBS, 3)
    if near:
        return "did you mean " + " or ".join(f"snello {verb}" for verb in near) + "?"
    return f"verbs: {', '.join(VERBS)}"


def write_log(words: Sequence[str]) -> str:
    """Writes the traceback under way to a file of its own and returns its path."""
    import platform
    import tempfile
    import traceback

    handle, path = tempfile.mkstemp(prefix="snello-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"snello {' '.join(words)}\n{platform.platform()}, Python {platform.python_version()}\n\n")
        file.write(traceback.format_exc())
    return path


if __name__ == "__main__":
    sys.exit(main())

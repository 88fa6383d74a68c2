"""Answers that must follow a grammar: JSON schemas, regular expressions, choices, context-free grammars.

llguidance (extra `serve`) says which tokens may come next; this module owns its tokenizer, what it compiles, and how a
row of logits is masked by it. A schema keyword that it does not know is an error, never ignored.

All answers of a step wait for each of its masks. So what only the first mask needs is made with the grammar, beside the
engine, and a grammar whose masks would take long is refused there, or ends its own answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from snello.errors import SnelloError
from snello.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Kind = Literal["json", "regex", "choice", "grammar"]
KEPT = 64  # grammars that need not be translated again
WHITESPACE = {"whitespace_pattern": " ?"}  # of JSON; where any space is allowed, small models write nothing else
SPACING = {"x-guidance": WHITESPACE}  # the same as a key of a schema that stands in a Lark grammar
LIMITS = {
    "initial_lexer_fuel": 200_000,  # to make a grammar: a tenth of a second
    "step_lexer_fuel": 50_000,  # a mask, beside its walk through the vocabulary: milliseconds
    "max_items_in_row": 20_000,  # thousands of properties that may all come next
}
INTERSECTIONS = 8  # in a Lark grammar: each may double what its first step takes, which no limit of llguidance counts
_LARK = re.compile(r"""//[^\n]*|#[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(&)""")  # what is no operator, or &
_TOO_COMPLEX = re.compile("too many|fuel|precomputation failed|row has|panic", re.IGNORECASE)
MOST_CHARACTERS = 200  # of a reason that is llguidance's own


class TokenGrammar:
    """One compiled grammar; `start` gives a matcher at its beginning.

    Each matcher has a lexer of its own. llguidance lets copies share one, with its states and their limits: what one
    answer may still say would then hang on what others have said, and where one meets a limit all would fail.

    Args:
        make: a matcher, in milliseconds for a usual schema and half a second for the largest.
        ready: those that are made already.
    """

    def __init__(
        self, source: str, make: Callable[[], llguidance.LLMatcher], ready: Iterable[llguidance.LLMatcher]
    ) -> None:
        self._source, self._make, self._ready = source, make, deque(ready)

    @property
    def source(self) -> str:
        return self._source

    def start(self) -> TokenMatcher:
        return TokenMatcher(self._fresh)

    def _fresh(self) -> llguidance.LLMatcher:
        try:
            return self._ready.popleft()
        except IndexError:
            return self._make()


class TokenMatcher:
    """A `Matcher` over llguidance's. Guesses have a lexer of their own too, so they use up nothing of the answer's."""

    def __init__(self, fresh: Callable[[], llguidance.LLMatcher]) -> None:
        self._fresh, self._matcher = fresh, fresh()
        self._guesser: llguidance.LLMatcher | None = None
        self._said: list[int] = []
        self._known = 0  # tokens said that the guesser has seen

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy of the logits (V,) with -inf where a token is not allowed next.

        Raises:
            SnelloError: the grammar became too complex to follow.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        return _where_allowed(logits, bits)

    def guessed(self, logits: np.ndarray, ahead: Sequence[int]) -> np.ndarray:
        """The same after `ahead`; the logits as they are where that cannot be said or followed."""
        if self._guesser is None:
            self._guesser = self._fresh()
        if self._guesser.is_error():
            return logits
        self._guesser.consume_tokens(self._said[self._known :])
        self._known = len(self._said)
        taken = self._guesser.try_consume_tokens(list(ahead)) if ahead else 0
        if taken < len(ahead):
            self._guesser.rollback(taken)
            return logits
        bits = self._guesser.compute_bitmask()
        if self._guesser.is_error():
            return logits
        self._guesser.rollback(taken)
        return _where_allowed(logits, bits)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self._said.append(token)

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SnelloError(f"the grammar cannot be followed: {_reason(self._matcher)}", SIMPLER)


def _where_allowed(logits: np.ndarray, bits: bytes) -> np.ndarray:
    """Those of the allowed tokens, and -inf."""
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: len(logits)].astype(bool)  # (V,)
    result: np.ndarray = np.where(allowed, logits, np.float32(-np.inf))
    return result


class GrammarCompiler:
    """Grammars for one model.

    Args:
        tokenizer, vocab_size: of the model; its logits may be wider than the tokenizer.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._words: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, str] = OrderedDict()  # in llguidance's own form, by what asked for it
        self._lock = threading.Lock()

    def compile(self, kind: Kind, value: Any, matchers: int = 1) -> TokenGrammar:
        """The grammar that a schema (a table), a pattern, a list of texts or a Lark grammar says.

        Args:
            matchers: so many are made now: one for each answer, and one for the guesses of a draft model.

        Raises:
            SnelloError: it is not valid, has a keyword that is not supported, would hold up other answers, or needs
                llguidance, which is not installed.
        """
        text = value if isinstance(value, str) else json.dumps(value)
        source = f"{kind} {text}"
        with self._lock:  # one at a time: the engine needs the cores
            translated = self._kept.get(source) or _translated(kind, value)
            vocabulary = self._vocabulary()
            ready = [_matcher(kind, translated, vocabulary)]
            self._kept[source] = translated
            self._kept.move_to_end(source)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        for _ in range(1, matchers):
            with self._lock:  # others may come between
                ready.append(_matcher(kind, translated, vocabulary))
        return TokenGrammar(source, lambda: _matcher(kind, translated, vocabulary), ready)

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if self._words is None:
            try:
                self._words = _guidance().LLTokenizer(
                    self._tokenizer.backend.to_str(), n_vocab=self._vocab_size, eos_token=self._ends or None
                )
            except Exception as error:  # the package raises bare ones
                message = f"answers of {self._tokenizer.name} cannot follow a grammar: {_first_line(str(error))}"
                raise SnelloError(message, "leave the grammar out") from None
        return self._words


_NAMES = {"json": "JSON schema", "regex": "pattern", "choice": "choice", "grammar": "grammar"}
TOO_COMPLEX = "it is too complex to be held token by token"
SIMPLER = "repeat less within what is repeated, or give fewer alternatives"


def _matcher(kind: Kind, translated: str, vocabulary: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """At the beginning of an answer, with what its first mask needs."""
    guidance = _guidance()
    limits = guidance.LLParserLimits(verbose_errors=False, **LIMITS)
    matcher: llguidance.LLMatcher = guidance.LLMatcher(vocabulary, translated, log_level=0, limits=limits)
    tried = matcher if matcher.is_error() else _tried(matcher)
    if tried.is_error():
        reason = _reason(tried)
        hint = SIMPLER if reason is TOO_COMPLEX else "check it, or leave it out"
        raise SnelloError(f"the {_NAMES[kind]} cannot be used: {reason}", hint)
    return matcher


def _tried(matcher: llguidance.LLMatcher) -> llguidance.LLMatcher:
    """A copy on its lexer, one token on: the first mask makes most of the lexer, and a limit shows with the token."""
    tried = matcher.deep_copy()
    allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
    if allowed.any():
        tried.consume_token(int(allowed.argmax()))
    return tried


def _translated(kind: Kind, value: Any) -> str:
    """In llguidance's own form.

    Raises:
        SnelloError: it is not what its kind says, or has more intersections than can be followed.
    """
    try:
        return _grammar(kind, value)
    except ValueError as error:  # not the JSON that it took for it: a number that JSON does not have
        message = f"the {_NAMES[kind]} cannot be used: {_first_line(str(error))}"
        raise SnelloError(message, "check it, or leave it out") from None


def _grammar(kind: Kind, value: Any) -> str:
    matcher = _guidance().LLMatcher
    if kind == "json":
        schema = json.dumps(_bare(value))
        return str(matcher.grammar_from_json_schema(schema, overrides=WHITESPACE))
    if kind == "regex":
        return str(matcher.grammar_from_regex(value))
    if kind == "choice":  # one terminal: as many rules as texts would be followed side by side
        value = "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    elif sum(match[1] is not None for match in _LARK.finditer(value)) > INTERSECTIONS:
        raise SnelloError(f"the grammar cannot be used: it has more than {INTERSECTIONS} intersections (&)", SIMPLER)
    return str(matcher.grammar_from_lark(value))


def _bare(schema: Any) -> Any:
    """Without the key by which a schema could set llguidance's own options, such as to ignore what it does not know."""
    return {key: item for key, item in schema.items() if key != "x-guidance"} if isinstance(schema, Mapping) else schema


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise SnelloError("grammars need llguidance, which is not installed", "pip install 'snello[serve]'") from None
    return llguidance


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why it cannot go on."""
    said = matcher.get_error()
    if said.startswith("NoExtension"):
        return "no text follows it"
    return TOO_COMPLEX if _TOO_COMPLEX.search(said) else _first_line(said)


def _first_line(text: str) -> str:
    """Of what may repeat the whole schema."""
    line = next((line for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= MOST_CHARACTERS else line[:MOST_CHARACTERS] + "..."

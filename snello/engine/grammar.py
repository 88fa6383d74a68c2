"""Answers that must follow a grammar: JSON schemas, regular expressions, choices, context-free grammars.

llguidance (extra `serve`) says which tokens may come next; this module owns its tokenizer, what it compiles, and how a
row of logits is masked by it. A schema keyword that it does not know is an error, never ignored. Compiled grammars are
kept, since programs send the same one again and again; every answer starts with a copy of its own.

All answers of a step wait for each of its masks. So what only the first mask needs is made with the grammar, beside the
engine, and a grammar whose masks would take long is refused there, or ends its own answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from snello.errors import SnelloError
from snello.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Kind = Literal["json", "regex", "choice", "grammar"]
KEPT = 64  # compiled grammars
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

    Attributes:
        worn: what its answers have in common has met a limit, so the next one is better off with a new grammar.
    """

    def __init__(self, source: str, matcher: llguidance.LLMatcher) -> None:
        self._source, self._matcher = source, matcher
        self.worn = False

    @property
    def source(self) -> str:
        return self._source

    def start(self) -> TokenMatcher:
        return TokenMatcher(self, self._matcher.deep_copy())


class TokenMatcher:
    """A `Matcher` over llguidance's."""

    def __init__(self, grammar: TokenGrammar, matcher: llguidance.LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher

    def masked(self, logits: np.ndarray, ahead: Sequence[int] = ()) -> np.ndarray:
        """A copy of the logits (V,) with -inf where a token is not allowed after `ahead`.

        Raises:
            SnelloError: the grammar became too complex to follow.
        """
        taken = self._matcher.try_consume_tokens(list(ahead)) if ahead else 0
        try:
            if taken < len(ahead):
                return logits  # what was guessed before is not allowed: this row will not count
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
        finally:
            if taken:
                self._matcher.rollback(taken)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)  # (V,)
        result: np.ndarray = np.where(allowed, logits, np.float32(-np.inf))
        return result

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            self._grammar.worn = True
            raise SnelloError(f"the grammar cannot be followed: {_reason(self._matcher)}", SIMPLER)


class GrammarCompiler:
    """Grammars for one model.

    Args:
        tokenizer, vocab_size: of the model; its logits may be wider than the tokenizer.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._words: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, TokenGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: Kind, value: Any) -> TokenGrammar:
        """The grammar that a schema (a table), a pattern, a list of texts or a Lark grammar says.

        Raises:
            SnelloError: it is not valid, has a keyword that is not supported, would hold up other answers, or needs
                llguidance, which is not installed.
        """
        text = value if isinstance(value, str) else json.dumps(value)
        source = f"{kind} {text}"
        with self._lock:
            if source not in self._kept or self._kept[source].worn:
                self._kept[source] = TokenGrammar(source, self._compiled(kind, value))
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(source)
            return self._kept[source]

    def _compiled(self, kind: Kind, value: Any) -> llguidance.LLMatcher:
        guidance = _guidance()
        limits = guidance.LLParserLimits(verbose_errors=False, **LIMITS)
        try:
            grammar = _grammar(kind, value)
        except ValueError as error:  # not the JSON that it took for it: a number that JSON does not have
            message = f"the {_NAMES[kind]} cannot be used: {_first_line(str(error))}"
            raise SnelloError(message, "check it, or leave it out") from None
        matcher: llguidance.LLMatcher = guidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        tried = matcher if matcher.is_error() else _tried(matcher)
        if tried.is_error():
            reason = _reason(tried)
            hint = SIMPLER if reason is TOO_COMPLEX else "check it, or leave it out"
            raise SnelloError(f"the {_NAMES[kind]} cannot be used: {reason}", hint)
        return matcher

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


def _tried(matcher: llguidance.LLMatcher) -> llguidance.LLMatcher:
    """A copy, one token on. What copies share is made with the first mask; a limit that it met shows with the token."""
    tried = matcher.deep_copy()
    allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
    if allowed.any():
        tried.consume_token(int(allowed.argmax()))
    return tried


def _grammar(kind: Kind, value: Any) -> str:
    """In llguidance's own form."""
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

"""A model behind a server of OpenAI's protocol, read by the log-probabilities that it gives of an echoed prompt.

The original's token ids are sent as the prompt of `/completions` with `echo` and `logprobs`: what comes back are the
server's own numbers for these very tokens, whatever it runs and however it was made small. vLLM and `snello serve`
answer that; a server that does not is refused in one line.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure.guards import Divergence, Habits, is_loop
from snello.measure.rulers import NextTokens, Reading, Ruler
from snello.measure.runner import Runner, Step
from snello.measure.text import Block

TRIES = 6  # where the server is busy
PATIENCE_SECONDS = 600.0
LONGEST_WAIT = 30.0
ROUNDING = 1e-3  # of a log-probability of 0, in whatever the server computes
SAME = 0.95  # share of tokens that both must spell alike: servers spell bytes and blanks in ways of their own
SERVERS = "it takes a server that echoes a prompt of token ids with logprobs, such as vLLM or snello serve"


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


class Served:
    """One model of a server.

    Args:
        url: as clients are given it, with or without /v1.
        original: the model whose tokens it is asked in.
        model: its name there; None where it is the only one.
        key: sent as a bearer token.

    Raises:
        SnelloError: it cannot be reached, refuses, or has several models and none was named.
    """

    kind = "behind a server"
    longest: int | None = None

    def __init__(self, url: str, original: Any, *, model: str | None = None, key: str | None = None) -> None:
        self.base = _base(url)
        self.original, self._key = original, _sendable(key)
        self.name = model or self._only_model()
        self._compared = False

    def _only_model(self) -> str:
        listed = self._send("/models", None)
        names = [str(one.get("id")) for one in _list(listed.get("data")) if isinstance(one, dict)]
        if len(names) != 1:
            hint = f"--served-model {names[0]}" if names else "--served-model NAME"
            raise SnelloError(f"{self.base} has {len(names)} models: {', '.join(names) or 'none is listed'}", hint)
        return names[0]

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "url": self.base}

    # ---- judged

    def read(self, ruler: Ruler, blocks: Sequence[Block], step: Step) -> Reading:
        """No first choices: a server spells them, and a spelling is not always one token."""
        assert isinstance(ruler, NextTokens), "only next words are asked of a server"
        values = []
        for number, block in enumerate(blocks, start=1):
            values.append(-self.log_probabilities(block.tokens.tolist())[block.scored_from - 1 :])
            step(number, len(blocks))
        if not self._compared:
            hint = "give a text of words: by them it is seen that the server has the original's tokens"
            raise Unsupported(f"{self.base} was asked for nothing that has letters or digits", hint)
        return Reading(tuple(values))

    def divergence(self, original: Runner, blocks: Sequence[Block], *, seed: int, step: Step) -> Divergence | None:
        return None  # a server gives no distributions

    def habits(self, prompts: Sequence[Sequence[int]], *, most: int, step: Step) -> Habits:
        loops, ends = [], []
        for done, prompt in enumerate(prompts, start=1):
            choice = self._complete(prompt=list(prompt), max_tokens=most)
            loops.append(is_loop(self.original.tokenizer.encode(str(choice.get("text") or ""))))
            ends.append(choice.get("finish_reason") == "stop")
            step(done, len(prompts))
        return Habits(tuple(loops), tuple(ends))

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Of tokens[1:], each given those before it: (T - 1,) float32. One token more is drawn, and left out: many
        servers answer nothing for none.
        """
        choice = self._complete(prompt=tokens, max_tokens=1, echo=True, logprobs=1)
        told = choice.get("logprobs")
        told = told if isinstance(told, dict) else {}
        values, spelled = _list(told.get("token_logprobs")), _list(told.get("tokens"))
        if len(values) < len(tokens) or len(values) > len(tokens) + 1:
            found = f"{len(values)} log-probabilities for a prompt of {len(tokens)} tokens"
            raise Unsupported(f"{self.base} gave {found}", SERVERS)
        numbers = values[1 : len(tokens)]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise Unsupported(f"{self.base} left out log-probabilities of the prompt", SERVERS)
        scores = np.asarray([_float(number) for number in numbers], np.float32)
        wrong = scores[~(scores <= ROUNDING)]  # NaN too
        if wrong.size:
            raise Unsupported(f"{self.base} gave a log-probability of {wrong[0]:g}: none is over 0", SERVERS)
        self._compare_words(tokens, spelled[: len(tokens)])
        return scores

    def _compare_words(self, tokens: list[int], spelled: Sequence[Any]) -> None:
        """Once, in the first window that has words: a server with another tokenizer would be judged on other words
        without anybody noticing. Words of other scripts count where there are none in ASCII.
        """
        if self._compared:
            return
        own = [self.original.tokenizer.decode([token], skip_special=False) for token in tokens]
        words = [(a.strip(), str(b).strip()) for a, b in zip(own, spelled, strict=False) if a.strip().isalnum()]
        shown = [pair for pair in words if pair[0].isascii()] or words
        same = sum(a == b for a, b in shown)
        if len(spelled) != len(tokens) or same < SAME * len(shown):
            hint = f"check compares versions of one model: serve one made from {self.original.name}"
            strange = f"{len(shown) - same} of {len(shown)} tokens"
            raise Unsupported(f"{self.base} spells {strange} otherwise: its tokenizer is another", hint)
        self._compared = bool(shown)

    # ---- the protocol

    def _complete(self, **fields: Any) -> dict[str, Any]:
        body = {"model": self.name, "temperature": 0, **fields}
        choices = self._send("/completions", body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Unsupported(f"{self.base}/completions gave no choices", SERVERS)
        return choices[0]

    def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """A request and its answer; a busy server is asked again when it says so."""
        for attempt in range(TRIES):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503) or attempt == TRIES - 1:
                    raise _refusal(self.base + path, body, error) from None
                time.sleep(_wait(error, attempt))
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                reason = getattr(error, "reason", None) or error
                hint = "is it running, and is that its address?"
                raise SnelloError(f"{self.base}{path} did not answer: {reason}", hint) from None
        raise AssertionError("the last try returns or raises")

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            text = answer.read()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            hint = "is that the address of a server of OpenAI's protocol?"
            raise SnelloError(f"{self.base}{path} did not answer with a JSON object", hint)
        return found

    def close(self) -> None:
        """Nothing is held open."""


def _float(number: int | float) -> float:
    """JSON has whole numbers that are larger than any float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _list(found: Any) -> list[Any]:
    """Nothing where a server gives something else."""
    return found if isinstance(found, list) else []


def _sendable(key: str | None) -> str:
    """A key without the line's end that a file gave it.

    Raises:
        SnelloError: no header can hold it.
    """
    bare = (key or "").strip()
    if not (bare.isascii() and bare.isprintable()):
        raise SnelloError("the server's key is not one line of ASCII", "look at OPENAI_API_KEY", exit_code=2)
    return bare


def _base(url: str) -> str:
    try:
        found = urlsplit(url)
        fine = bool(found.hostname) and found.port != 0 and not found.query and not found.fragment
        secret = found.username is not None
    except ValueError:  # the port is no number, or a bracket is open
        fine = secret = False
    if secret:  # it would stand in every message and in what is written
        raise SnelloError("the address of a server holds no name and password", "its key: OPENAI_API_KEY", exit_code=2)
    if not fine:
        raise SnelloError(f"{url!r} is no address of a server", "like http://127.0.0.1:8080/v1", exit_code=2)
    path = found.path.rstrip("/")
    return f"{found.scheme}://{found.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _refusal(url: str, body: dict[str, Any] | None, error: urllib.error.HTTPError) -> SnelloError:
    """What the server said, in its own words."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):  # it hung up
        text = ""
    try:
        told = json.loads(text)["error"]
        words = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError):
        words = text.strip().splitlines()[0][:200] if text.strip() else str(error.reason)
    key = "its key goes into OPENAI_API_KEY"
    needed = SERVERS
    if body is not None:
        needed += f", with a context of at least {len(body['prompt']) + body['max_tokens']:,} tokens"
    hint = {401: key, 403: key, 400: needed}.get(error.code, "its log says more")
    return SnelloError(f"{url} refused with {error.code}: {words}", hint)


def _wait(error: urllib.error.HTTPError, attempt: int) -> float:
    """Seconds: what the server asks for, else twice as long each time."""
    asked = error.headers.get("Retry-After", "")
    return min(LONGEST_WAIT, float(asked) if asked.isdigit() else 2.0**attempt)

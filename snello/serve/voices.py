"""What one choice of an answer says, piece by piece: chunks of the engine as rows of OpenAI's streams.

A whole answer is the same rows laid together, so a stream that is concatenated and an answer that is not streamed
cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from snello.engine.request import Chunk, TokenLogprob, Usage
from snello.models.tokenizer import Tokenizer
from snello.serve.answers import chat_logprobs, completion_logprobs
from snello.serve.tools import Call, Parser, Said

Row = dict[str, Any]  # one entry of `choices`


class Voice(Protocol):
    """One choice."""

    usage: Usage | None

    def opening(self) -> list[Row]: ...  # before anything was said
    def take(self, chunk: Chunk) -> list[Row]: ...
    def whole(self, rows: Sequence[Row]) -> Row: ...  # all rows as one entry of a body


class ChatVoice:
    """The assistant's message.

    Args:
        before: the last token of the prompt. call_id: begins the ids of its calls. parser: reads calls out of the text.
    """

    def __init__(
        self, index: int, before: int, tokenizer: Tokenizer, *, call_id: str = "", parser: Parser | None = None
    ) -> None:
        self.index, self._before, self._tokenizer = index, before, tokenizer
        self._call_id, self._parser, self._calls = call_id, parser, 0
        self.usage: Usage | None = None

    def opening(self) -> list[Row]:
        return [self._row({"role": "assistant", "content": ""})]

    def take(self, chunk: Chunk) -> list[Row]:
        said: list[Said] = [chunk.text] if chunk.text else []
        if self._parser is not None:
            said = self._parser.feed(chunk.text, chunk.token_id)
            said += self._parser.flush() if chunk.finish_reason is not None else []
        rows = [self._row(self._delta(piece)) for piece in said]
        if chunk.logprob is not None:
            rows = rows or [self._row({"content": ""})]
            rows[0]["logprobs"] = chat_logprobs(self._before, [chunk.logprob], self._tokenizer)
        if chunk.token_id is not None:
            self._before = chunk.token_id
        if chunk.finish_reason is not None:
            self.usage = chunk.usage
            calls = self._calls and chunk.finish_reason == "stop"
            rows.append(self._row({}, "tool_calls" if calls else chunk.finish_reason))
        return rows

    def _row(self, delta: Row, reason: str | None = None) -> Row:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _delta(self, said: Said) -> Row:
        if isinstance(said, str):
            return {"content": said}
        number, self._calls = self._calls, self._calls + 1
        return {"tool_calls": [{"index": number, **_call_row(said, f"{self._call_id}_{self.index}_{number}")}]}

    def whole(self, rows: Sequence[Row]) -> Row:
        texts = [row["delta"]["content"] for row in rows if "content" in row["delta"]]
        calls = [call for row in rows for call in row["delta"].get("tool_calls", ())]
        content = [entry for row in rows if row["logprobs"] for entry in row["logprobs"]["content"]]
        message: Row = {"role": "assistant", "content": "".join(texts), "refusal": None}
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        asked = any(row["logprobs"] for row in rows)
        return {
            "index": self.index,
            "message": message,
            "logprobs": {"content": content, "refusal": None} if asked else None,
            "finish_reason": rows[-1]["finish_reason"],
        }


def _call_row(call: Call, name: str) -> Row:
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class TextVoice:
    """A completion.

    Args:
        prompt: its text, where it is echoed. scores: of the prompt's tokens, where these are asked for too: None for
            the first, which nothing comes before. tokens: of the prompt.
    """

    def __init__(
        self,
        index: int,
        tokens: Sequence[int],
        tokenizer: Tokenizer,
        *,
        prompt: str = "",
        scores: Sequence[TokenLogprob] | None = None,
    ) -> None:
        self.index, self._tokens, self._tokenizer = index, tokens, tokenizer
        self._prompt, self._scores, self._before = prompt, scores, tokens[-1]
        self._spelled = len(prompt)  # characters before the next token
        self.usage: Usage | None = None

    def opening(self) -> list[Row]:
        if not self._prompt and self._scores is None:
            return []
        return [self._row(self._prompt, None if self._scores is None else self._prompt_logprobs(self._scores))]

    def _prompt_logprobs(self, scores: Sequence[TokenLogprob]) -> Row:
        first = self._tokenizer.decode(self._tokens[:1], skip_special=False)
        rest = completion_logprobs(self._tokens[0], scores, self._tokenizer, len(first))
        heads: dict[str, Any] = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [heads[name], *rest[name]] for name in rest}

    def take(self, chunk: Chunk) -> list[Row]:
        logprobs = None
        if chunk.logprob is not None:
            logprobs = completion_logprobs(self._before, [chunk.logprob], self._tokenizer, self._spelled)
            self._spelled += len(logprobs["tokens"][0])
        if chunk.token_id is not None:
            self._before = chunk.token_id
        if chunk.finish_reason is not None:
            self.usage = chunk.usage
        if not chunk.text and logprobs is None and chunk.finish_reason is None:
            return []
        return [self._row(chunk.text, logprobs, chunk.finish_reason)]

    def _row(self, text: str, logprobs: Mapping[str, Any] | None, reason: str | None = None) -> Row:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, rows: Sequence[Row]) -> Row:
        parts = [row["logprobs"] for row in rows if row["logprobs"] is not None]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: [entry for part in parts for entry in part[name]] for name in names} if parts else None
        return self._row("".join(row["text"] for row in rows), logprobs, rows[-1]["finish_reason"])

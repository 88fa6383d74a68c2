"""A request in the engine's terms: prompt tokens, settings, the model, who asks, and until when.

A `Prepared` holds everything that an answer depends on, and nothing of how it came or how it is sent. What answers it
(`answering.py`) takes this and gives chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from snello.engine.grammar import Kind, TokenGrammar
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.serve import openai, tools
from snello.serve.errors import RequestError, request_error
from snello.serve.keys import Caller
from snello.serve.openai import ChatRequest, CompletionRequest
from snello.serve.reading import Reading
from snello.serve.served import Served
from snello.serve.voices import ChatVoice, TextVoice, Voice

Result = TypeVar("Result")
UNSAID = 1024  # tokens: what an answer without a length may be expected to take at most
LONG_TEXT = 20_000  # characters from which on tokenizing would hold up everybody else


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is asked of a model.

    Attributes:
        served: the model; its weights, recipe and tokenizer are `served.llm.model`'s.
        caller: who asks; its salt keeps what is computed for one key from others.
        prompts: token ids. params: of each prompt, its seed settled; the i-th of all answers is drawn with seed + i.
        seeded: the request itself has the seed or takes the likeliest token: the same request has the same answer.
        reading: the request that these were made from.
        deadline: seconds on the loop's clock.
        read, keep: False where the client said no-cache, or no-store.
    """

    served: Served
    caller: Caller
    reading: Reading
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    seeded: bool
    deadline: float
    read: bool = True
    keep: bool = True

    @property
    def num_prompt(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_choices(self) -> int:
        return sum(params.n for params in self.params)

    @property
    def most_tokens(self) -> int:
        """Prompt and answer, of all answers; one whose length is not said counts as `UNSAID`."""
        context = self.served.context
        return sum(
            params.n
            * min(context, len(prompt) + (UNSAID if params.max_tokens == openai.NO_LIMIT else params.max_tokens))
            for prompt, params in zip(self.prompts, self.params, strict=True)
        )


async def prepare(
    reading: Reading, served: Served, prompts: Sequence[Sequence[int]], caller: Caller, deadline: float
) -> Prepared:
    """Compiles and checks; nothing has run when this raises.

    Args:
        prompts: what `encoded` made of the request.

    Raises:
        RequestError: the prompt is too long, the grammar is not supported.
        SnelloError: the same from below.
    """
    executor = served.llm.executor
    for prompt in prompts:
        openai.check_prompt(prompt, served.context, executor.spec.vocab_size, answer=not reading.silent)
    sampling = dict(reading.request.sampling)
    grammar = await _grammar(reading, served, len(prompts))
    if grammar is not None:
        sampling["grammar"] = grammar
    base = openai.settings(sampling, served.llm.default_params)
    seed, params, first = base.drawn_seed, list[SamplingParams](), 0
    for _ in prompts:
        params.append(openai.settings({**sampling, "seed": seed + first}, served.llm.default_params))
        first += base.n
    return Prepared(
        served=served,
        caller=caller,
        reading=reading,
        prompts=prompts,
        params=params,
        seeded=base.seed is not None or base.temperature == 0,
        deadline=deadline,
    )


async def encoded(reading: Reading, served: Served) -> list[list[int]]:
    """The tokens of all prompts; a chat is rendered.

    Raises:
        RequestError: the template refuses, or offers no functions.
    """
    request, llm = reading.request, served.llm
    if isinstance(request, ChatRequest):
        if reading.tools is not None and served.call_format is None:
            message = f"the chat template of {served.name} offers no functions to it"
            raise RequestError(message, param="tools", code="unsupported_parameter")
        variables = {} if reading.tools is None else {"tools": reading.tools.listed}
        size = sum(len(str(message.get("content", ""))) for message in request.messages)
        return [await aside(size, lambda: openai.chat_tokens(request, llm.tokenizer, **variables))]
    texts = request.prompts
    size = sum(len(text) for text in texts if isinstance(text, str))
    return await aside(size, lambda: [openai.prompt_tokens(text, llm.encode) for text in texts])


async def aside(size: int, function: Callable[[], Result]) -> Result:
    """Runs what takes long for this much text in a thread; a cancelled one is waited for by nobody."""
    return function() if size < LONG_TEXT else await asyncio.to_thread(function)


async def _grammar(reading: Reading, served: Served, num_prompts: int) -> TokenGrammar | None:
    drafter = served.llm.drafter
    each = 1 if drafter is None else 1 + drafter.num_matchers
    matchers = num_prompts * reading.request.sampling.get("n", 1) * each
    if reading.tools is not None and reading.tools.forced:
        assert served.call_format is not None
        text = tools.grammar_of(reading.tools, served.call_format, served.llm.tokenizer)
        return await _compiled(served, "grammar", text, matchers, "tools")
    if reading.rules is None:
        return None
    return await _compiled(served, reading.rules.kind, reading.rules.value, matchers, reading.rules.param)


async def _compiled(served: Served, kind: Kind, value: Any, matchers: int, param: str) -> TokenGrammar:
    """`param`: the field that asks for it."""
    try:
        return await asyncio.to_thread(served.grammars.compile, kind, value, matchers)
    except SnelloError as error:
        raise RequestError(request_error(error).message, param=param, code="invalid_value") from None


def voices(prepared: Prepared, name: str, scores: Sequence[Any] | None = None) -> list[Voice]:
    """One for each choice, prompt after prompt.

    Args:
        name: of the request, for the ids of calls. scores: of each prompt's tokens, where they are echoed.
    """
    made: list[Voice] = []
    for place, (prompt, params) in enumerate(zip(prepared.prompts, prepared.params, strict=True)):
        for _ in range(params.n):
            made.append(_voice(prepared, len(made), prompt, name, None if scores is None else scores[place]))
    return made


def _voice(prepared: Prepared, index: int, prompt: Sequence[int], name: str, scores: Any) -> Voice:
    reading, tokenizer = prepared.reading, prepared.served.llm.tokenizer
    if isinstance(reading.request, CompletionRequest):
        text = tokenizer.decode(prompt) if reading.request.echo else ""
        return TextVoice(index, prompt, tokenizer, prompt=text, scores=scores)
    form, offered = prepared.served.call_format, reading.tools
    parser = tools.parser_for(form, tokenizer, offered) if form is not None and offered is not None else None
    return ChatVoice(index, prompt[-1], tokenizer, call_id=f"call_{name}", parser=parser)

"""A file of requests, answered with the machine full, in order, once each.

Requests go into the engine as places become free, so that it always has as many waiting as run, and never the whole
file. What is finished goes to the journal; a call that was killed goes on there, and the file that is left is the same
to the byte. So nothing in it may depend on when a request ran or beside which: ids come from the line, the seed of a
request without one from its `custom_id`, and counts of the moment (cached tokens, seconds) are told beside the file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snello.engine.engine import Engine, EngineOptions
from snello.engine.llm import LLM
from snello.engine.request import Chunk, defaults_from_generation
from snello.errors import SnelloError
from snello.models import load
from snello.models.model import Model
from snello.serve import answers, openai
from snello.serve.batch_file import Item, Survey, items, survey
from snello.serve.errors import RequestError, request_error
from snello.serve.journal import Journal, Origin, Result
from snello.serve.openai import ChatRequest, CompletionRequest, EmbeddingRequest

AHEAD = 2  # sequences in the engine for each one that can run
STEP_MS = 1000.0  # nobody watches a next token: prompts take whole steps


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a file is answered.

    Attributes:
        model: answers every line; None: the one that the lines name.
        overwrite: a file at the output may be replaced. fresh: what an earlier call has answered is thrown away.
        threads, context, max_num_seqs, speculate: as for `LLM`. Of these only the context changes an answer.
        keep_first, keep_last: as for `LLM`; what is forgotten changes answers.
    """

    model: str | None = None
    overwrite: bool = False
    fresh: bool = False
    threads: int | None = None
    context: int | None = None
    max_num_seqs: int = 32
    speculate: str | None = None
    keep_first: int = 0
    keep_last: int | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """So far. `known`: requests that an earlier call had answered; `tokens` and `seconds`: of this call's answers."""

    model: str
    requests: int
    done: int
    known: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens of this call over its time."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def answer_file(source: Path, output: Path, options: BatchOptions) -> Generator[Progress, None, None]:
    """Answers every line of `source` into `output`; the last progress is the whole.

    Raises:
        SnelloError: the file or the model cannot be used, `output` is there, or the disk is full. What was finished
            by then is kept, and the same call goes on.
    """
    _check_paths(source, output)
    found = survey(source)
    model = load(found.model(source, options.model))
    _check_urls(model, found)
    with Journal(
        output, found.items, _origin(model, found, options), fresh=options.fresh, overwrite=options.overwrite
    ) as journal:
        known, started, before = journal.totals.done, time.monotonic(), journal.totals.completion_tokens

        def progress(seconds: float) -> Progress:
            totals = asdict(journal.totals)
            tokens = journal.totals.completion_tokens - before
            return Progress(
                model=model.name, requests=found.items, known=known, tokens=tokens, seconds=seconds, **totals
            )

        yield progress(0.0)
        if not journal.complete:
            with _open(model, journal, options) as llm:
                journal.begin(llm.executor.context)
                started = time.monotonic()
                for _ in Answering(llm, journal, options).run(items(source, found)):
                    yield progress(time.monotonic() - started)
        seconds = time.monotonic() - started
        journal.finish()
        yield progress(seconds)


# ---- before anything runs -------------------------------------------------------------------------------------------


def _check_paths(source: Path, output: Path) -> None:
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise SnelloError(f"{source} {what}", "give a file of requests, one a line")
    if output.exists() and not output.is_file():
        raise SnelloError(f"{output} is not a file", "give the name of a file for the answers")
    if not output.parent.is_dir():
        raise SnelloError(f"the folder of {output} does not exist", f"mkdir -p {output.parent}")
    if output.exists() and output.samefile(source):
        raise SnelloError("the answers would replace the requests", "give another --output")


def usable_urls(model: Model) -> list[str]:
    """What this model can answer."""
    if not model.spec.causal:
        return [openai.EMBEDDINGS] if model.spec.head.kind == "embed" else []
    return [openai.COMPLETIONS] + ([openai.CHAT] if model.tokenizer.chat_templates else [])


def _ability(model: Model) -> str:
    """The same in words."""
    urls = usable_urls(model)
    if not urls:
        return f"it is made for {model.spec.task}"
    template = "" if openai.CHAT in urls or not model.spec.causal else " (it has no chat template)"
    return f"it answers {' and '.join(urls)}{template}"


def _check_urls(model: Model, found: Survey) -> None:
    """Where no line asks for what this model does, the wrong model or url was chosen."""
    if not set(usable_urls(model)) & set(found.urls):
        asked = " or ".join(sorted(found.urls))
        message = f"{model.name} cannot answer {asked}: {_ability(model)}"
        raise SnelloError(message, "change the urls, or give another --model")


def _origin(model: Model, found: Survey, options: BatchOptions) -> Origin:
    from snello import __version__

    tokenizer = model.tokenizer
    words = [tokenizer.backend.to_str(), dict(tokenizer.special_tokens), dict(tokenizer.chat_templates)]
    return Origin(
        snello=__version__,
        input=found.digest,
        model=model.digest,
        name=model.name,
        tokenizer=_digest(json.dumps(words, sort_keys=True)),
        defaults=_digest(json.dumps(defaults_from_generation(model.generation), sort_keys=True)),
        seen="everything" if options.keep_last is None else f"{options.keep_first} + {options.keep_last}",
    )


def _open(model: Model, journal: Journal, options: BatchOptions) -> LLM:
    """The model with the context that the journal was begun with: an answer may end where the context does."""
    context = options.context
    if journal.context is not None and model.spec.causal:
        if context not in (None, journal.context):
            message = f"{journal.path} was begun with --context {journal.context}"
            raise SnelloError(message, "call as before to go on, --fresh to begin again, or give another --output")
        context = journal.context
    return LLM(
        model,
        threads=options.threads,
        context=context,
        max_num_seqs=options.max_num_seqs,
        speculate=options.speculate,
        keep_first=options.keep_first,
        keep_last=options.keep_last,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- answering ------------------------------------------------------------------------------------------------------


@dataclass
class Pending:
    """A request in the engine: its answers so far, prompt after prompt."""

    item: Item
    request: ChatRequest | CompletionRequest
    choices: list[answers.Choice]
    num_prompt: int  # tokens of all prompts
    parts: dict[int, int] = field(default_factory=dict)  # number in the engine -> place of its first choice
    open: int = 0  # choices that are not finished

    def take(self, number: int, chunk: Chunk) -> None:
        self.choices[self.parts[number] + chunk.index].take(chunk)
        self.open -= chunk.finish_reason is not None


class Answering:
    """Takes items, runs them together, and hands results to the journal."""

    def __init__(self, llm: LLM, journal: Journal, options: BatchOptions) -> None:
        self._llm, self._journal = llm, journal
        self._engine = Engine(
            llm.executor,
            llm.tokenizer,
            EngineOptions(max_num_seqs=options.max_num_seqs, step_ms=STEP_MS),
            llm.drafter,
        )
        self._most = AHEAD * options.max_num_seqs
        self._pending: dict[int, Pending] = {}  # by number in the engine

    def run(self, file: Iterator[Item]) -> Iterator[None]:
        """Answers all that the journal does not hold; yields after each piece of work."""
        new = (item for item in file if item.place not in self._journal)
        more = True
        while more or self._pending:
            while more and self._engine.num_running + self._engine.num_waiting < self._most:
                item = next(new, None)
                if item is None:
                    more = False
                else:
                    self._admit(item)
                    yield
            if self._pending:
                self._step()
                yield

    def _admit(self, item: Item) -> None:
        try:
            if item.error is not None:
                raise item.error
            if item.url not in usable_urls(self._llm.model):
                message = f"{self._llm.model.name} cannot answer {item.url}: {_ability(self._llm.model)}"
                raise RequestError(message, param="url", code="unsupported_url")
            if isinstance(item.request, EmbeddingRequest):
                self._embed(item, item.request)
            elif item.request is not None:
                self._add(item, item.request)
        except SnelloError as error:
            self._keep_error(item, request_error(error))

    def _add(self, item: Item, request: ChatRequest | CompletionRequest) -> None:
        """Queues a request: the i-th of all its answers is drawn with seed + i."""
        prompts = self._prompts(request)
        params = openai.settings(request.sampling, self._llm.default_params, _seed(item))
        pending = Pending(item, request, [], sum(map(len, prompts)))
        try:
            for prompt in prompts:
                openai.check_prompt(prompt, self._llm.executor.context, self._llm.model.spec.vocab_size)
                first = len(pending.choices)
                each = openai.settings(
                    {**request.sampling, "seed": params.drawn_seed + first}, self._llm.default_params
                )
                number = self._engine.add(prompt, each)
                pending.parts[number] = first
                pending.choices += [self._choice(prompt, request) for _ in range(params.n)]
        except SnelloError:
            self._drop(pending)
            raise
        pending.open = len(pending.choices)
        self._pending |= dict.fromkeys(pending.parts, pending)

    def _prompts(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        if isinstance(request, ChatRequest):
            return [openai.chat_tokens(request, self._llm.tokenizer)]
        return [openai.prompt_tokens(prompt, self._llm.encode) for prompt in request.prompts]

    def _choice(self, prompt: Sequence[int], request: ChatRequest | CompletionRequest) -> answers.Choice:
        echo = isinstance(request, CompletionRequest) and request.echo
        return answers.Choice(
            before=prompt[-1],
            prompt=self._llm.tokenizer.decode(prompt) if echo else "",
            logprobs=[] if "logprobs" in request.sampling else None,
        )

    def _step(self) -> None:
        for number, chunk in self._engine.step():
            pending = self._pending.get(number)
            if pending is None:
                continue  # another of its answers has failed in this step
            pending.take(number, chunk)
            if chunk.error is not None:
                self._drop(pending)
                self._keep_error(pending.item, request_error(chunk.error))
            elif not pending.open:
                self._drop(pending)
                self._finish(pending)

    def _drop(self, pending: Pending) -> None:
        for number in pending.parts:
            self._engine.cancel(number)
            self._pending.pop(number, None)

    def _finish(self, pending: Pending) -> None:
        usages = [choice.usage for choice in pending.choices if choice.usage is not None]
        completion = sum(usage.completion_tokens for usage in usages)
        cached = sum(pending.choices[first].cached_tokens for first in pending.parts.values())
        make, kind = (
            (answers.chat_body, "chatcmpl") if isinstance(pending.request, ChatRequest)
            else (answers.completion_body, "cmpl")
        )  # fmt: skip
        usage = answers.usage_body(pending.num_prompt, completion)
        body = make(self._head(pending.item, kind), pending.choices, usage, self._llm.tokenizer)
        self._keep(pending.item, body, pending.num_prompt, completion, cached)

    def _embed(self, item: Item, request: EmbeddingRequest) -> None:
        executor = self._llm.executor
        prompts = [openai.prompt_tokens(prompt, self._llm.encode) for prompt in request.prompts]
        for prompt in prompts:
            openai.check_prompt(prompt, executor.context, executor.spec.vocab_size, answer=False, param="input")
        vectors, total = [executor.encode(prompt) for prompt in prompts], sum(map(len, prompts))
        body = answers.embedding_body(self._head(item, "embd"), vectors, total, as_base64=request.base64)
        self._keep(item, body, total)

    # ---- results

    def _head(self, item: Item, kind: str) -> answers.Head:
        return answers.Head(id=_id(kind, item), model=self._llm.model.name)

    def _keep(self, item: Item, body: dict[str, Any], prompt: int, completion: int = 0, cached: int = 0) -> None:
        self._journal.keep(
            Result(
                place=item.place,
                output=_line(item, 200, body),
                prompt_tokens=prompt,
                completion_tokens=completion,
                cached_tokens=cached,
            )
        )

    def _keep_error(self, item: Item, error: RequestError) -> None:
        self._journal.keep(Result(place=item.place, output=_line(item, error.status, error.body()), failed=True))


def _line(item: Item, status: int, body: dict[str, Any]) -> bytes:
    """A line of the output; `error` is null exactly where the request was answered."""
    said = body.get("error")
    table = {
        "id": _id("batch_req", item),
        "custom_id": item.custom_id,
        "response": {"status_code": status, "request_id": _id("req", item), "body": body},
        "error": said and {"code": said["code"], "message": f"line {item.line}: {said['message']}"},
    }
    return json.dumps(table, allow_nan=False).encode()


def _id(kind: str, item: Item) -> str:
    """A name that is the same in every run of the same file."""
    return f"{kind}_{_digest(f'{kind} {item.line} {item.custom_id}')[:24]}"


def _seed(item: Item) -> int:
    """What a request without a seed is drawn with: 63 bits of its `custom_id`."""
    return int(_digest(f"seed {item.custom_id}")[:16], 16) >> 1

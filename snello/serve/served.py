"""The models of a server, by name: each with its thread, its door, and what it can answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from snello.engine.engine import EngineOptions
from snello.engine.grammar import GrammarCompiler
from snello.engine.llm import LLM
from snello.engine.prefix_store import PrefixStoreOptions
from snello.errors import SnelloError
from snello.models import load
from snello.native import core
from snello.serve import tools
from snello.serve.batch import usable_urls
from snello.serve.caches.exact import ExactAnswers
from snello.serve.caches.front import AnswerCaches
from snello.serve.caches.identity import ModelIdentity
from snello.serve.errors import RequestError
from snello.serve.gate import Gate
from snello.serve.options import ServeOptions
from snello.serve.worker import Turns, Worker

WAITING = 3  # times what the cache holds: that may be asked for at once


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model under its name. `created`: seconds since 1970."""

    name: str
    worker: Worker
    gate: Gate
    grammars: GrammarCompiler
    urls: tuple[str, ...]
    call_format: tools.Format | None = None
    caches: AnswerCaches | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def llm(self) -> LLM:
        return self.worker.llm

    def check_url(self, url: str) -> None:
        """Raises RequestError where this model does not answer such requests."""
        if url not in self.urls:
            can = " and ".join(self.urls) or "nothing that is served"
            raise RequestError(
                f"{self.name} does not answer {url}: it answers {can}", param="model", code="unsupported_url"
            )

    def listed(self) -> dict[str, Any]:
        """As `/v1/models` shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "snello",
            "max_model_len": self.llm.executor.context,
        }


class Models(Mapping[str, Served]):
    """What is served, in the order of the command line. `exact`: the answers on disk, of all models."""

    def __init__(self, served: Mapping[str, Served], exact: ExactAnswers | None = None) -> None:
        self._served, self.exact = dict(served), exact

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def find(self, name: str | None) -> Served:
        """The model of this name; one that is alone may go unnamed.

        Raises:
            RequestError: 404: there is none; 400: there are several.
        """
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        known = ", ".join(self._served)
        if name is None:
            raise RequestError(
                f"model is missing; there are: {known}", param="model", code="missing_required_parameter"
            )
        if name not in self._served:
            message = f"there is no model {name!r}; there are: {known}"
            raise RequestError(message, param="model", code="model_not_found", status=404)
        return self._served[name]

    def close(self) -> None:
        for served in self._served.values():
            served.worker.stop()
            served.llm.close()
        if self.exact is not None:
            self.exact.close()


def open_models(options: ServeOptions, num_keys: int = 0) -> Models:
    """Loads all models; those that were loaded are closed again when a later one fails.

    Raises:
        SnelloError: one cannot be run here, or two have the same name.
    """
    turns, opened = Turns(), dict[str, Served]()
    exact = ExactAnswers(options.cache / "answers", options.cache_bytes) if options.cache is not None else None
    try:
        for text in options.models:
            name, _, source = text.rpartition("=")
            llm = _open(source, options)
            name = name or llm.model.name
            if name in opened:
                llm.close()
                raise SnelloError(f"two models are named {name}", "name one: NAME=MODEL", exit_code=2)
            opened[name] = _served(name, llm, options, turns, num_keys, exact)
    except BaseException:
        Models(opened, exact).close()
        raise
    return Models(opened, exact)


def _open(source: str, options: ServeOptions) -> LLM:
    model = load(source)
    prefixes = None
    if options.cache is not None and model.spec.causal:
        prefixes = PrefixStoreOptions(folder=options.cache / "prefixes", limit_bytes=options.cache_bytes)
    return LLM(
        model,
        threads=options.threads,
        context=options.context if model.spec.causal else None,
        max_num_seqs=options.max_num_seqs,
        speculate=options.speculate if model.spec.causal else None,
        prefixes=prefixes,
        keep_first=options.keep_first if model.spec.causal else 0,
        keep_last=options.keep_last if model.spec.causal else None,
    )


def _served(
    name: str, llm: LLM, options: ServeOptions, turns: Turns, num_keys: int, exact: ExactAnswers | None
) -> Served:
    spec, limits = llm.model.spec, options.limits
    held = llm.executor.pages.num_pages * core.PAGE_POSITIONS
    return Served(
        name=name,
        worker=Worker(llm, EngineOptions(max_num_seqs=options.max_num_seqs), turns, name),
        gate=Gate(limits.queue_tokens or WAITING * held, limits.key_share if num_keys > 1 else 1.0),
        grammars=GrammarCompiler(llm.tokenizer, spec.vocab_size, spec.eos_tokens),
        urls=tuple(usable_urls(llm.model)),
        call_format=tools.format_of(llm.tokenizer) if spec.causal else None,
        caches=_caches(name, llm, exact) if spec.causal else None,
    )


def _caches(name: str, llm: LLM, exact: ExactAnswers | None) -> AnswerCaches:
    """The caches of one model. Without answers on disk no weights are read for its identity: what runs now belongs to
    this process, which has one model of this name."""
    if exact is not None:
        return AnswerCaches(ModelIdentity.of(llm.executor), exact)
    here = ModelIdentity(
        weights=name, runs=llm.executor.spec.digest, tokenizer="", recipe="", context=llm.executor.context
    )
    return AnswerCaches(here)

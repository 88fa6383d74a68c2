"""The models of a server, by name: each with its thread, its door, and what it can answer.

An adapter is served under a name of its own, with the thread, the door and the cache of its model, and answers of its
own. So whatever is looked up by name, an unknown one included, needs no word about adapters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from snello.engine.engine import EngineOptions
from snello.engine.grammar import GrammarCompiler
from snello.engine.llm import LLM
from snello.engine.prefix_store import PrefixStoreOptions
from snello.errors import SnelloError
from snello.models import load
from snello.models.adapter import base_of
from snello.models.model import Model
from snello.native import core
from snello.serve import openai, tools
from snello.serve.batch import usable_urls
from snello.serve.caches.exact import ExactAnswers
from snello.serve.caches.front import AnswerCaches
from snello.serve.caches.identity import ModelIdentity
from snello.serve.caches.lookup import Lookups
from snello.serve.caches.proof import open_similar
from snello.serve.errors import RequestError
from snello.serve.gate import Gate
from snello.serve.options import ServeOptions
from snello.serve.worker import Turns, Worker

WAITING = 3  # times what the cache holds: that may be asked for at once


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model, or one with an adapter, under its name.

    Attributes:
        created: seconds since 1970.
        adapter: its name for the engine; parent: the model that it belongs to. None: the model itself.
    """

    name: str
    worker: Worker
    gate: Gate
    grammars: GrammarCompiler
    urls: tuple[str, ...]
    call_format: tools.Format | None = None
    caches: AnswerCaches | None = None
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def llm(self) -> LLM:
        return self.worker.llm

    @property
    def context(self) -> int:
        """Positions of a prompt and its answer; what an adapter puts before every text takes its own."""
        executor = self.llm.executor
        return executor.context - len(executor.adapters.prompt(executor.adapters.number(self.adapter)))

    def check_url(self, url: str) -> None:
        """Raises RequestError where this model does not answer such requests."""
        if url not in self.urls:
            can = " and ".join(self.urls) or "nothing that is served"
            raise RequestError(
                f"{self.name} does not answer {url}: it answers {can}", param="model", code="unsupported_url"
            )

    def listed(self) -> dict[str, Any]:
        """As `/v1/models` shows it."""
        listed = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "snello",
            "max_model_len": self.context,
        }
        return listed if self.parent is None else {**listed, "parent": self.parent}


class Models(Mapping[str, Served]):
    """What is served, in the order of the command line. `exact`, `similar`: the answers on disk, of all models, and
    those to similar questions; None where they were not asked for, or could not be certified."""

    def __init__(
        self, served: Mapping[str, Served], exact: ExactAnswers | None = None, similar: Lookups | None = None
    ) -> None:
        self._served, self.exact, self.similar = dict(served), exact, similar

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def engines(self) -> list[Served]:
        """The models themselves, without their adapters, which share what these have."""
        return [served for served in self._served.values() if served.adapter is None]

    def find(self, name: str | None) -> Served:
        """The model of this name; one that is alone may go unnamed, and is meant then without its adapters.

        Raises:
            RequestError: 404: there is none; 400: there are several.
        """
        if name is None and len(self.engines()) == 1:
            return self.engines()[0]
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
        for served in self.engines():
            served.worker.stop()
            served.llm.close()
        if self.similar is not None:
            self.similar.close()
        if self.exact is not None:
            self.exact.close()


def open_models(options: ServeOptions, num_keys: int = 0) -> Models:
    """Loads all models; those that were loaded are closed again when a later one fails.

    Raises:
        SnelloError: one cannot be run here, or two have the same name; similar questions cannot be served.
    """
    turns, opened, similar = Turns(), dict[str, Served](), None
    exact = ExactAnswers(options.cache / "answers", options.cache_bytes) if options.cache is not None else None
    try:
        if options.similar is not None and options.cache is not None:
            similar = open_similar(options.similar, options.cache / "similar")
        models = [(name, load(source)) for name, _, source in (text.rpartition("=") for text in options.models)]
        adapters = _adapters(options.adapters, [model for _, model in models])
        for (given, model), folders in zip(models, adapters, strict=True):
            name = given or model.name
            _check_free([name, *folders], opened)
            llm = _open(model, folders, options)
            opened[name] = _served(name, llm, options, turns, num_keys, exact, similar)
            opened |= {adapter: _adapted(adapter, opened[name], exact, similar) for adapter in folders}
    except BaseException:
        Models(opened, exact, similar).close()
        raise
    return Models(opened, exact, similar)


def _check_free(names: list[str], opened: Mapping[str, Served]) -> None:
    for place, name in enumerate(names):
        if name in opened or name in names[:place]:
            hint = "name one: NAME=MODEL, --adapter NAME=FOLDER"
            raise SnelloError(f"two models are named {name}", hint, exit_code=2)


def _adapters(given: tuple[str, ...], models: list[Model]) -> list[dict[str, Path]]:
    """The adapters of each model, by name. Among several models the digest of its base says where one belongs.

    Raises:
        SnelloError: one has no name, or nobody knows whose it is.
    """
    found: list[dict[str, Path]] = [{} for _ in models]
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise SnelloError(f"--adapter {text} has no name", "--adapter NAME=FOLDER", exit_code=2)
        if any(name in adapters for adapters in found):
            raise SnelloError(f"two adapters are named {name}", "--adapter NAME=FOLDER", exit_code=2)
        found[_place_of(Path(folder), models)][name] = Path(folder)
    return found


def _place_of(folder: Path, models: list[Model]) -> int:
    if len(models) == 1:
        return 0
    base = base_of(folder)
    for place, model in enumerate(models):
        if base is not None and model.digest == base:
            return place
    said = "does not say whose it is" if base is None else "was made for another base than these models"
    raise SnelloError(f"{folder} {said}", "serve its base alone, or merge it (snello adapt --merge)", exit_code=2)


def _open(model: Model, adapters: Mapping[str, Path], options: ServeOptions) -> LLM:
    prefixes = None
    if options.cache is not None and model.spec.causal:
        prefixes = PrefixStoreOptions(folder=options.cache / "prefixes", limit_bytes=options.cache_bytes)
    return LLM(
        model,
        threads=options.threads,
        context=options.context if model.spec.causal else None,
        max_num_seqs=options.max_num_seqs,
        speculate=options.speculate if model.spec.causal else None,
        adapters=adapters,
        prefixes=prefixes,
        keep_first=options.keep_first if model.spec.causal else 0,
        keep_last=options.keep_last if model.spec.causal else None,
    )


def _served(
    name: str,
    llm: LLM,
    options: ServeOptions,
    turns: Turns,
    num_keys: int,
    exact: ExactAnswers | None,
    similar: Lookups | None,
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
        caches=_caches(name, llm, exact, similar) if spec.causal else None,
    )


def _adapted(name: str, base: Served, exact: ExactAnswers | None, similar: Lookups | None) -> Served:
    """An adapter of a model that is served: all is shared but the answers."""
    return replace(
        base,
        name=name,
        adapter=name,
        parent=base.name,
        urls=tuple(url for url in base.urls if url != openai.EMBEDDINGS),
        caches=_caches(name, base.llm, exact, similar, adapter=name),
    )


def _caches(
    name: str, llm: LLM, exact: ExactAnswers | None, similar: Lookups | None, adapter: str | None = None
) -> AnswerCaches:
    """The caches of one model. Without answers on disk no weights are read for its identity: what runs now belongs to
    this process, which has one model of this name."""
    adapters = llm.executor.adapters
    own = adapters.digest(adapters.number(adapter))
    if exact is not None:
        return AnswerCaches(ModelIdentity.of(llm.executor, adapter=own), exact, similar)
    here = ModelIdentity(
        weights=name, runs=llm.executor.spec.digest, tokenizer="", recipe="", context=llm.executor.context, adapter=own
    )
    return AnswerCaches(here)

"""`LLM`: a model that is loaded and answers. The face of the engine in Python.

Names are vLLM's. Everything runs in the caller's thread; nothing happens at import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from snello.engine.draft_model import DraftModel, check_draft
from snello.engine.engine import Engine, EngineOptions
from snello.engine.lookup import Lookup
from snello.engine.native import NativeExecutor, TokenScores
from snello.engine.prefix_store import PrefixStore, PrefixStoreOptions, fingerprint_of
from snello.engine.request import (
    Chunk,
    Completion,
    Output,
    SamplingParams,
    TokenLogprob,
    Usage,
    defaults_from_generation,
)
from snello.engine.speculate import LOOKUPS, OFF, Drafter, check_way
from snello.errors import SnelloError
from snello.models import load
from snello.models.adapter import Adapter
from snello.models.loading import no_vectors
from snello.models.model import Model
from snello.models.spec import Deployment

Messages = Sequence[Mapping[str, str]]


class LLM:
    """A model, ready: `generate`, `stream`, `chat`, `score`, `embed`.

    Args:
        model: a folder, a Hugging Face Hub name, "demo", or a loaded `Model`.
        threads, context: None takes the physical cores, and the model's context or what a quarter of free memory holds.
        max_num_seqs: answers that run at the same time; more wait in order.
        speculate: guess what follows, so that several tokens come in one step: "prompt-lookup" from what the text
            repeats, "suffix" from past answers too, or a smaller model with the same tokenizer. Answers stay the same,
            token for token. None takes the draft of a folder that holds both (`optimize --lossless`), "off" nobody.
        adapters: by name, folders of adapters of this model; a request may name one. All run in one batch.
        prefixes: keep computed prompts on disk, so that they outlast memory and this process; no byte changes.
        keep_first, keep_last: of a text's tokens only the first and the newest so many are seen, and what lies between
            is forgotten; without keep_last all are. Loses what is forgotten: for very long texts, where it is wanted.

    Raises:
        SnelloError: no such model or way to guess, or the model cannot run here.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        threads: int | None = None,
        context: int | None = None,
        isa: str | None = None,
        max_num_seqs: int = 32,
        speculate: str | Path | Model | None = None,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        prefixes: PrefixStoreOptions | None = None,
        keep_first: int = 0,
        keep_last: int | None = None,
    ) -> None:
        check_way(speculate)
        deployment = Deployment(
            threads=threads,
            context=context,
            isa=isa,
            max_num_seqs=max_num_seqs,
            keep_first=keep_first,
            keep_last=keep_last,
        )
        options = EngineOptions(max_num_seqs=max_num_seqs)
        self.model = model if isinstance(model, Model) else load(model)
        if speculate is None:
            speculate = self.model.draft
        elif speculate == OFF:
            speculate = None
        draft = self._draft_model(speculate)
        self.executor = NativeExecutor(self.model, deployment, adapters=adapters)
        self.tokenizer = self.model.tokenizer
        self.drafter = self._drafter(speculate, draft, max_num_seqs)
        self.store: PrefixStore | None = None
        self.store = self._prefix_store(prefixes)
        self.engine = Engine(self.executor, self.tokenizer, options, self.drafter, self.store)
        self.default_params: dict[str, Any] = defaults_from_generation(self.model.generation)

    def _draft_model(self, speculate: str | Path | Model | None) -> Model | None:
        """The model that guesses, if it is one; checked before anything is packed or run."""
        if speculate is None or speculate in LOOKUPS:
            return None
        draft = speculate if isinstance(speculate, Model) else load(speculate)
        check_draft(self.model, draft)
        return draft

    def _drafter(self, speculate: object, draft: Model | None, max_num_seqs: int) -> Drafter | None:
        if draft is None:
            return None if speculate is None else Lookup(past=speculate == "suffix")
        try:
            return DraftModel(draft, self.executor, max_num_seqs=max_num_seqs)
        except SnelloError:
            self.executor.close()
            raise

    def _prefix_store(self, options: PrefixStoreOptions | None) -> PrefixStore | None:
        if options is None or not self.model.spec.causal:
            return None
        try:
            return PrefixStore(fingerprint_of(self.executor), self.executor, options)
        except SnelloError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"LLM({self.model.name!r}, context={self.executor.context}, isa={self.executor.isa!r})"

    def params(self, params: SamplingParams | None, names: Mapping[str, Any]) -> SamplingParams:
        """Either an object, or keywords over the checkpoint's own defaults."""
        if params is not None and names:
            raise SnelloError("both a SamplingParams and keywords were given", "put everything into one of them")
        return params or SamplingParams.from_names({**self.default_params, **names})

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, *, adapter: str | None = None, **names: Any
    ) -> Output: ...
    @overload
    def generate(
        self, prompts: Sequence[str], params: SamplingParams | None = None, *, adapter: str | None = None, **names: Any
    ) -> list[Output]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **names: Any,
    ) -> Output | list[Output]:
        """Answers to one prompt or to several, in their order; several run together, each as if it were alone."""
        chosen = self.params(params, names)
        if isinstance(prompts, str):
            return self.answer(self.encode(prompts), chosen, adapter=adapter)
        return self.answers([self.encode(prompt) for prompt in prompts], chosen, adapter=adapter)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, adapter: str | None = None, **names: Any
    ) -> Output:
        """The answer to a conversation, through the checkpoint's own chat template."""
        return self.answer(self.tokenizer.chat(messages), self.params(params, names), adapter=adapter)

    def stream(
        self,
        prompt: str | Messages,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **names: Any,
    ) -> Iterator[Chunk]:
        """The same as `generate` (a text) or `chat` (messages), piece by piece; never a split character."""
        ids = self.encode(prompt) if isinstance(prompt, str) else self.tokenizer.chat(prompt)
        return self.stream_tokens(ids, self.params(params, names), adapter=adapter)

    def stream_tokens(
        self, ids: Sequence[int], params: SamplingParams, *, adapter: str | None = None
    ) -> Iterator[Chunk]:
        """Chunks of the answer to these prompt tokens. Several streams taken in turn run together."""
        self.check_decoder()
        return self.engine.stream(ids, params, adapter=adapter)

    def answer(self, ids: Sequence[int], params: SamplingParams, *, adapter: str | None = None) -> Output:
        """`params.n` whole answers to these prompt tokens; the i-th is drawn with seed + i."""
        return self.answers([ids], params, adapter=adapter)[0]

    def answers(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, adapter: str | None = None
    ) -> list[Output]:
        """The same for several prompts."""
        self.check_decoder()
        gathered = self.engine.gather(prompts, params, adapter=adapter)
        return [_output(ids, chunks, params) for ids, chunks in zip(prompts, gathered, strict=True)]

    def score(self, text: str | Sequence[int], *, adapter: str | None = None) -> TokenScores:
        """Log-probabilities of all tokens but the first."""
        self.check_decoder()
        return self.executor.score(self.encode(text) if isinstance(text, str) else text, adapter=adapter)

    @overload
    def embed(self, texts: str, *, truncate: bool = False) -> np.ndarray: ...
    @overload
    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> np.ndarray: ...
    def embed(self, texts: str | Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Embeddings: (D,) of one text, (texts, D) of several. For models that were opened for it.

        Args:
            truncate: read the beginning of a text that is longer than the model reads.

        Raises:
            SnelloError: a text is longer than that, and not to be truncated, or has no tokens.
        """
        if self.model.spec.head.kind != "embed":
            raise no_vectors(self.model, self.model.name)
        prompts = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if [] in prompts:
            raise SnelloError(f"text {prompts.index([]) + 1} of {len(prompts)} is empty", "leave it out")
        limit = self.executor.context
        longer = [number for number, ids in enumerate(prompts, 1) if len(ids) > limit]
        if longer and not truncate:
            which = f"{len(longer)} of {len(prompts)} texts (the first is number {longer[0]})"
            message = f"{self.model.name} reads {limit:,} tokens, and {which} are longer"
            raise SnelloError(message, "split what is longer, or read beginnings only: truncate (--truncate)")
        vectors = np.stack([self.executor.encode(_clip(ids, limit)) for ids in prompts])
        return vectors[0] if isinstance(texts, str) else vectors

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the checkpoint's tokenizer adds; a lone bos for an empty text."""
        ids = self.tokenizer.encode(text)
        if ids or self.model.spec.bos_token is None:
            return ids
        return [self.model.spec.bos_token]

    def check_decoder(self) -> None:
        if not self.model.spec.causal:
            hint = "use `snello embed`" if self.model.spec.head.kind == "embed" else "give a decoder"
            raise SnelloError(f"{self.model.name} is an encoder ({self.model.spec.task}): it does not generate", hint)

    def close(self) -> None:
        """Closing twice is harmless."""
        if self.drafter is not None:
            self.drafter.close()
        if self.store is not None:
            self.store.close()
        self.executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _clip(ids: list[int], limit: int) -> list[int]:
    """At most so many tokens; the closing token stays."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def _output(ids: Sequence[int], chunks: list[Chunk], params: SamplingParams) -> Output:
    each = [[chunk for chunk in chunks if chunk.index == index] for index in range(params.n)]
    usages = [usage for chunk in chunks if (usage := chunk.usage) is not None]
    usage = Usage(
        prompt_tokens=len(ids),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=min(usage.cached_tokens for usage in usages),
        first_token_seconds=min(usage.first_token_seconds for usage in usages),
        seconds=max(usage.seconds for usage in usages),
    )
    return Output(
        prompt_token_ids=tuple(ids), outputs=tuple(_completion(chunks, params) for chunks in each), usage=usage
    )


def _completion(chunks: list[Chunk], params: SamplingParams) -> Completion:
    logprobs: tuple[TokenLogprob, ...] | None = None
    if params.logprobs is not None:
        logprobs = tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None)
    reason = chunks[-1].finish_reason
    assert reason is not None
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(chunk.token_id for chunk in chunks if chunk.token_id is not None),
        finish_reason=reason,
        logprobs=logprobs,
    )

"""How a server is run, and what one caller may ask of it: plain values, each with a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from snello.errors import SnelloError
from snello.serve.caches.proof import SimilarSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may be. What is over is refused before anything is computed.

    Attributes:
        body_bytes: of a request. nesting: of its JSON.
        prompts: in one completion, inputs: in one embedding; n: answers to one prompt, choices: to all prompts.
        stops, stop_characters, biases: of the settings.
        schema_bytes: of a schema or grammar. tools: functions that are offered.
        queue_tokens: prompt and answer tokens that may be asked for at once, of all requests together; None: three
            times what the cache holds, so that as much as runs can wait twice.
        key_share: of them, for one key where there are several.
        seconds: after which a request is given up, wherever it is.
    """

    body_bytes: int = 4 << 20
    nesting: int = 64
    prompts: int = 128
    inputs: int = 256
    n: int = 16
    choices: int = 128
    stops: int = 16
    stop_characters: int = 256
    biases: int = 1024
    schema_bytes: int = 64 << 10
    tools: int = 128
    queue_tokens: int | None = None
    key_share: float = 0.5
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is served, where, and for whom.

    Attributes:
        models: a folder or a name; NAME=MODEL serves it under another name.
        adapters: NAME=FOLDER, each of one of the models, served beside it under its own name.
        host, port: 0 takes a free port.
        keys: a file of SHA-256 hashes of keys; None: no key is asked for, which is for this machine alone.
        open: other machines may call without a key.
        threads, context, max_num_seqs, speculate: as for `LLM`, of each model.
        keep_first, keep_last: as for `LLM`, of each decoder.
        cache: a folder for answers and prefixes that outlast this process; None: memory alone.
        cache_bytes: of the answers, and as much again of the prefixes, of all models together.
        similar: answers to similar questions, of `cache`; None: none.
        drain_seconds: what runs may take so long to finish when the server is told to stop.
        keep_alive_seconds: a stream that says nothing for so long gets a comment, so that no proxy closes it.
        log_prompts: the log may hold what people ask and are answered.
        vllm_names: metrics by vLLM's names too.
    """

    models: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    keys: Path | None = None
    open: bool = False
    threads: int | None = None
    context: int | None = None
    max_num_seqs: int = 32
    speculate: str | None = None
    keep_first: int = 0
    keep_last: int | None = None
    cache: Path | None = None
    cache_bytes: int = 4_000_000_000
    similar: SimilarSettings | None = None
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    log_prompts: bool = False
    vllm_names: bool = True
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.models:
            raise SnelloError("there is no model to serve", "snello serve MODEL", exit_code=2)
        if not self.on_loopback and self.keys is None and not self.open:
            message = f"{self.host} can be reached from other machines, and no key is asked for"
            raise SnelloError(message, "--keys FILE asks for one; --open lets everybody in", exit_code=2)
        if self.similar is not None and self.cache is None:
            message = "answers to similar questions are those that --cache keeps"
            raise SnelloError(message, "--cache FOLDER", exit_code=2)

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK or self.host.startswith("127.")

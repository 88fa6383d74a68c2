"""Everything that `optimize` needs done to a model, behind one face: open it, plan and apply steps, weigh it.

`NativeWorkbench` is the real one. Tests give another, so that every verdict, exit code and interruption can be reached
in milliseconds without weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from snello.errors import SnelloError
from snello.measure import reference
from snello.measure.machine import Machine, machine
from snello.measure.memory import peak_while_serving
from snello.measure.rulers import Reading
from snello.measure.runner import Runner
from snello.measure.text import Block
from snello.measure.translation import Translation, translation
from snello.models.spec import Deployment, Spec
from snello.optimize.recipe import Step
from snello.techniques.base import Context

if TYPE_CHECKING:
    from snello.models.model import Model

PROBED_LATELY = 3_600.0  # seconds; an older probe is done again, and the better of both counts
POOL_TOKENS = 2_560  # positions that 16 streams of the throughput workload, and one window, need at once


class Workbench(Protocol):
    def load(self, name: str | Path) -> Any: ...
    def machine(self) -> Machine: ...
    def open(self, model: Any, *, context: int, streams: int = 1) -> Runner: ...
    def translation(self, original: Any, other: Any) -> Translation | None: ...
    def plan(self, step: Step, spec: Spec) -> Spec: ...
    def apply(self, step: Step, model: Any, context: Context) -> Any: ...
    def peak_memory(self, model: Any) -> int: ...
    def reference(self, model: Any, blocks: Sequence[Block]) -> Reading | str: ...
    def transformers(self, model: Any, prompt: int, generate: int) -> Callable[[], float] | str: ...
    def free_memory(self) -> int: ...
    def free_disk(self, folder: Path) -> int: ...
    def versions(self) -> dict[str, str]: ...


class NativeWorkbench:
    """The native executor, the techniques of the table, and this machine."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def load(self, name: str | Path) -> Model:
        from snello.models import load

        return load(name)

    def machine(self) -> Machine:
        known = machine(threads=self.threads)
        return known if known.age_seconds < PROBED_LATELY else machine(threads=self.threads, refresh=True)

    def open(self, model: Model, *, context: int, streams: int = 1) -> Runner:
        from snello.engine.native import NativeExecutor

        if not model.spec.causal:
            return NativeExecutor(model, Deployment(threads=self.threads))
        context = min(context, model.spec.max_positions)
        streams = max(streams, -(-POOL_TOKENS // context))
        return NativeExecutor(model, Deployment(threads=self.threads, context=context, streams=streams))

    def translation(self, original: Model, other: Model) -> Translation | None:
        """How the original's tokens are told to a model with a tokenizer of its own; None: they are the same."""
        if original is other or original.spec.vocab_size == other.spec.vocab_size:
            return None
        return translation(original.tokenizer, other.tokenizer)

    def plan(self, step: Step, spec: Spec) -> Spec:
        return step.technique.plan(spec)

    def apply(self, step: Step, model: Model, context: Context) -> Model:
        try:
            return step.technique.apply(model, context)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            hint = "uv pip install 'snello[optimize]' --torch-backend=auto"
            raise SnelloError(f"{step.use} needs torch, which is not installed", hint) from error

    def peak_memory(self, model: Model) -> int:
        return peak_while_serving(model.home, threads=self.threads)

    def reference(self, model: Model, blocks: Sequence[Block]) -> Reading | str:
        return reference.why_not(model, self.free_memory()) or reference.read(model, blocks)

    def transformers(self, model: Model, prompt: int, generate: int) -> Callable[[], float] | str:
        from snello.measure.peers.latency import transformers_latency

        return transformers_latency(model, prompt, generate, threads=self.threads)

    def free_memory(self) -> int:
        from snello.engine.resources import free_memory_bytes

        return free_memory_bytes()

    def free_disk(self, folder: Path) -> int:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def versions(self) -> dict[str, str]:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version(), "system": f"{platform.system()} {os.uname().release}"}
        for name in ("snello", "numpy", "tokenizers", "torch", "transformers"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

"""The loop: batches in order, one loss, one update each, on whatever device Accelerate finds.

Everything that a caller hears comes between two steps, and everything that can stop a run is answered there: Ctrl-C and
SIGTERM are held back until the step under way is done, then a checkpoint is written. So what lies in the folder is
always the state after a whole step, and a run that goes on ends with the bytes of one that was never stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recomputed

from snello.errors import SnelloError, Unsupported
from snello.models.reference_layers import Block
from snello.training import checkpoint
from snello.training.data import Batch, Batches
from snello.training.options import TrainOptions

Progress: TypeAlias = Callable[[str, float], None]
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Optimizers: TypeAlias = Callable[[nn.Module], Sequence[torch.optim.Optimizer]]

TELL_SECONDS = 1.0
GOES_ON = "what was learned is kept; the same command goes on from there"
RECENT = 20  # steps whose mean loss is told
TRIAL_STEPS = 2
SHORT = 128  # tokens of a row for which all scores may be written down
BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run. `digest` names the trained weights; `losses` is the loss before each update.

    `seconds` leaves out the trial, and adds up over interruptions. `resumed_from`: the step that a checkpoint had.
    """

    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]
    digest: str
    precision: str
    device: str
    resumed_from: int = 0


def silent(message: str, fraction: float) -> None:
    """The progress callback that says nothing."""


def train(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    options: TrainOptions,
    *,
    progress: Progress = silent,
    checkpoint_dir: Path | None = None,
    optimizers: Optimizers | None = None,
    past: str = "",
) -> Trained:
    """Trains what `module` leaves trainable (`requires_grad`), in place, and leaves it on the CPU, frozen as before.

    Args:
        module: FP32 weights. Blocks of the reference inside it can be recomputed (`options.recompute`).
        batches: data by the number of a step.
        loss: nats or any mean over the rows of a batch, of a module and a batch; called under autocast.
        progress: told what it will take before the first step, then about once a second, between steps. What it raises
            ends the run, with a checkpoint.
        checkpoint_dir: where checkpoints go, and where a run that was stopped goes on from. Its owner removes it.
        optimizers: how to make them; AdamW if None. Their learning rates are set by the loop.
        past: names what the loss is made of (options, a teacher), which no checkpoint holds: with another, a run does
            not go on.

    Raises:
        SnelloError: nothing can be trained, the loss is not finite, it would take longer than `max_minutes`, or the
            checkpoint belongs to another run.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = _Run(module, batches, loss, options, progress, checkpoint_dir, past)
    with torch.random.fork_rng(run.cuda), run.on_device(), _recomputing(module, options.recompute):
        torch.manual_seed(options.seed)
        return run.all(optimizers or partial(adamw, options=options))


def attention_for(longest: int) -> contextlib.AbstractContextManager[None]:
    """Plain products for rows of at most `SHORT` tokens: on a CPU the gradient of torch's fused attention takes up to
    eight times as long where BF16 rows have a few dozen. Wrap `train` in it.
    """
    return sdpa_kernel(SDPBackend.MATH) if longest <= SHORT else contextlib.nullcontext()


def adamw(module: nn.Module, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW; only matrices decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return [torch.optim.AdamW(filled, lr=options.rate, betas=BETAS, fused=True)]


def precision_here(wanted: str, device: torch.device) -> str:
    """ "auto" as what this device multiplies well."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


class _Run:
    def __init__(
        self,
        module: nn.Module,
        batches: Batches,
        loss: Loss,
        options: TrainOptions,
        progress: Progress,
        folder: Path | None,
        past: str,
    ) -> None:
        from accelerate import Accelerator

        _check(module)
        self.accelerator = Accelerator(mixed_precision="no")  # BF16 is asked for by name: its choice is process-wide
        if self.accelerator.num_processes > 1:
            raise Unsupported("training in several processes", "start one process; it uses one device")
        self.device: torch.device = self.accelerator.device
        self.cuda = [self.device] if self.device.type == "cuda" else []
        self.options = replace(options, precision=cast(Any, precision_here(options.precision, self.device)))
        self.module, self.batches, self.loss, self.progress, self.folder = module, batches, loss, progress, folder
        self.past = past

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        self.module.to(self.device).train()
        try:
            yield
        finally:
            self.module.to("cpu").eval()

    def all(self, optimizers: Optimizers) -> Trained:
        self.start = f"{self.batches.digest} {checkpoint.digest(self.module)} {self.past}"
        self.state = state = checkpoint.State(self.module, optimizers(self.module))
        resumed = self.folder is not None and checkpoint.restore(self.folder, state, self.start, self.options)
        began = state.step if resumed else 0
        if state.step < self.options.steps:
            self._announce()
            self._steps()
        return Trained(
            steps=state.step,
            tokens=round(state.step * self.batches.tokens_per_step),
            seconds=state.seconds,
            losses=tuple(state.losses),
            digest=checkpoint.digest(self.module),
            precision=self.options.precision,
            device=str(self.device),
            resumed_from=began,
        )

    def _announce(self) -> None:
        """Says, before it starts, what it will take, and refuses what is too long."""
        left = self.options.steps - self.state.step
        seconds = left * self._trial()
        tokens = round(left * self.batches.tokens_per_step)
        most = self.options.max_minutes
        if most is not None and seconds > 60 * most:
            fitting = int(tokens * 60 * most / seconds)
            message = f"training on {tokens:,} tokens would take about {seconds / 60:.1f} min, {most:g} are allowed"
            raise SnelloError(message, f"about {fitting:,} tokens fit")
        resumed = f", going on from step {self.state.step}" if self.state.step else ""
        self.progress(f"train on {tokens:,} tokens: about {in_words(seconds)}{resumed}", self._fraction)

    def _trial(self) -> float:
        """Seconds of a step: some that change nothing, the first of which only warms up."""
        random = torch.get_rng_state()
        for number in range(1 + TRIAL_STEPS):
            if number == 1:
                began = time.perf_counter()
            self._gradient(self.batches.at(self.state.step))
            self._forget()
        torch.set_rng_state(random)
        return (time.perf_counter() - began) / TRIAL_STEPS

    def _steps(self) -> None:
        state, options = self.state, self.options
        saved = told = time.monotonic()
        with _Held() as held:
            try:
                while state.step < options.steps:
                    self._step()
                    held.answer()
                    now = time.monotonic()
                    if now - told >= TELL_SECONDS or state.step == options.steps:
                        told = now
                        self._tell()
                    if now - saved >= options.save_seconds:
                        saved = now
                        self._save()
            except SnelloError:
                raise  # a run that has gone wrong is not one to go on with
            except BaseException as stopped:
                if not held.hurried:
                    self._save()
                if isinstance(stopped, KeyboardInterrupt) and self.folder is not None and not held.hurried:
                    raise KeyboardInterrupt(GOES_ON) from None
                raise

    def _step(self) -> None:
        began = time.perf_counter()
        value = self._gradient(self.batches.at(self.state.step))
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.options.clip)
        if not (torch.isfinite(torch.tensor(value)) and torch.isfinite(norm)):
            message = f"the loss or its gradient is not finite at step {self.state.step + 1}"
            raise SnelloError(message, f"a lower rate may help: rate={self.options.rate / 10:g}")
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.rate_at(self.state.step)
            optimizer.step()
        self._forget()
        self.state.losses.append(value)
        self.state.seconds += time.perf_counter() - began
        self.state.step += 1

    def _gradient(self, batch: Batch) -> float:
        """Adds the gradient of a batch, piece by piece; gives its mean loss."""
        total = 0.0
        bf16 = self.options.precision == "bf16"
        for share, piece in pieces(batch, self.options.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                found = self.loss(self.module, {name: value.to(self.device) for name, value in piece.items()})
            found = found.float() * share
            self.accelerator.backward(found)
            total += float(found.detach())
        return total

    def _forget(self) -> None:
        self.module.zero_grad(set_to_none=True)

    @property
    def _fraction(self) -> float:
        return self.state.step / max(1, self.options.steps)

    def _tell(self) -> None:
        recent = self.state.losses[-RECENT:]
        left = (self.options.steps - self.state.step) * self.state.seconds / self.state.step
        mean = sum(recent) / len(recent)
        self.progress(f"train: step {self.state.step}, loss {mean:.4f}, {in_words(left)} left", self._fraction)

    def _save(self) -> None:
        if self.folder is not None:
            checkpoint.save(self.folder, self.state, self.start, self.options)


class _Held:
    """Ctrl-C and SIGTERM wait for the end of a step; a second one does not, and leaves the checkpoint before it.

    Only in the main thread, where Python allows it: elsewhere nothing can interrupt a step.
    """

    def __init__(self) -> None:
        self.asked = self.hurried = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Held:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.hurried = True
            raise KeyboardInterrupt
        self.asked = True

    def answer(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _recomputing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Blocks of the reference keep only their input, and compute the rest again where the gradient needs it."""
    blocks = [part for part in module.modules() if isinstance(part, Block)] if wanted else []
    if wanted and not blocks:
        raise SnelloError("there is no block to recompute in this module", "leave recompute off")
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def pieces(batch: Batch, count: int) -> Iterator[tuple[float, Batch]]:
    """A batch in at most `count` pieces of rows, each with its share of them."""
    rows = len(next(iter(batch.values())))
    if count == 1:
        yield 1.0, batch
        return
    bounds = sorted({rows * number // count for number in range(count + 1)})
    for begin, end in itertools.pairwise(bounds):
        yield (end - begin) / rows, {name: value[begin:end] for name, value in batch.items()}


def _check(module: nn.Module) -> None:
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        raise SnelloError("nothing in this model is left to train", "unfreeze some parameters")
    for name, parameter in trained:
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}: what is trained is kept in FP32"


def in_words(seconds: float) -> str:
    """ "40 s", "3.5 min", "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

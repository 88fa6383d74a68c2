"""What a run needs to go on as if nothing had happened: weights, optimizers, random state, how far it came.

One safetensors file, written beside and renamed, so that there is always a whole one and nothing is pickled. It names
the run's past by a digest (data, loss, seed, starting weights, the rates of the steps that were done): a run whose past
would have been another does not go on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snello.errors import SnelloError, storage_error
from snello.training.options import TrainOptions

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """A run between two steps."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def saved_step(folder: Path) -> int | None:
    """How far the checkpoint in this folder came; None where there is none."""
    return int(_header(folder / FILE)["step"]) if (folder / FILE).exists() else None


def past(start: str, options: TrainOptions, step: int) -> str:
    """Names everything that decided the first `step` steps. `start`: data, starting weights and loss."""
    rates = [options.rate_at(number) for number in range(step)]
    same = (options.seed, options.clip, options.weight_decay, options.precision, options.accumulate)
    return hashlib.sha256(repr((start, rates, same)).encode()).hexdigest()


def save(folder: Path, state: State, start: str, options: TrainOptions) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(state)}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    header = {
        "step": str(state.step),
        "past": past(start, options, state.step),
        "losses": json.dumps(state.losses),
        "seconds": str(state.seconds),
    }
    beside = folder / f".{FILE}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata=header)
        os.replace(beside, folder / FILE)
    except OSError as error:
        known = storage_error(error, folder, "free some space; the run goes on from its last checkpoint")
        raise known or error from error
    finally:
        beside.unlink(missing_ok=True)


def restore(folder: Path, state: State, start: str, options: TrainOptions) -> bool:
    """Puts `state` where the checkpoint in this folder was; False where there is none.

    Raises:
        SnelloError: it is of another run: other data, loss, seed, rates or starting weights.
    """
    if not (folder / FILE).exists():
        return False
    from safetensors.torch import load_file

    header = _header(folder / FILE)
    step = int(header["step"])
    if step > options.steps or header["past"] != past(start, options, step):
        message = f"{folder} holds the checkpoint of another training, which came to step {step}"
        raise SnelloError(message, f"go on with the same model, text and options, or remove it: rm -r {folder}")
    tensors = load_file(folder / FILE)
    with torch.no_grad():
        for name, tensor in _weights(state.module):
            tensor.copy_(tensors[f"module.{name}"])
    for number, optimizer in enumerate(state.optimizers):
        _fill(optimizer, tensors, f"optimizer.{number}.")
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    state.step, state.losses, state.seconds = step, json.loads(header["losses"]), float(header["seconds"])
    return True


def digest(module: nn.Module) -> str:
    """SHA-256 of what is trained, by name."""
    total = hashlib.sha256()
    for name, tensor in _weights(module):
        total.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _header(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SnelloError(f"{path} cannot be read: {error}", "remove it, and the training starts anew") from error
    if not {"step", "past", "losses", "seconds"} <= header.keys():
        raise SnelloError(f"{path} is no checkpoint of a training", "give another folder")
    return header


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What changes: parameters that are trained, and buffers."""
    yield from ((name, tensor) for name, tensor in module.named_parameters() if tensor.requires_grad)
    yield from module.named_buffers()


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"module.{name}", tensor) for name, tensor in _weights(state.module))
    for number, optimizer in enumerate(state.optimizers):
        for place, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}"
                yield f"optimizer.{number}.{place}.{key}", value


def _fill(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            place, _, key = name.removeprefix(prefix).partition(".")
            state.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""Where the time of a step goes: each part of the model beside the least that its bytes and operations take here.

The core times an operation from one barrier to the next, so what a thread waits for another is in it. While it is timed
each operation runs by itself; otherwise neighbours share a barrier, so the parts add up to a little more than a step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from snello.engine.native import NativeExecutor
from snello.measure.machine import Machine
from snello.measure.sizes import attention_operations, cache_bytes
from snello.models.spec import Experts
from snello.native.core import Op, OpKind, Tensor

PRODUCTS = (OpKind.LINEAR, OpKind.EXPERTS)
VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step runs over.

    Attributes:
        rows: of all sequences together; each belongs to the batch once.
        outputs: rows whose logits are wanted.
        passes: times that the weights are read: a long prompt goes through in chunks.
        cache_bytes: of keys and values that are read, over all passes and sequences.
        attention_operations: of all rows.
        output_cache_bytes, output_attention_operations: the same if output rows alone attended, in all layers.
    """

    rows: int
    outputs: int
    passes: int
    cache_bytes: int
    attention_operations: float
    output_cache_bytes: int
    output_attention_operations: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of operation in a step: all layers together.

    Attributes:
        count: operations. seconds: median of the steps.
        bytes, operations: the least that it must move and compute.
        least_seconds: the slower of both at this machine's ceilings.
    """

    name: str
    count: int
    seconds: float
    bytes: int
    operations: float
    least_seconds: float

    @property
    def share_of_ceiling(self) -> float:
        return self.least_seconds / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share_of_ceiling": self.share_of_ceiling}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Parts, slowest first; `step_seconds` is a step that was not timed from inside."""

    rows: int
    step_seconds: float
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "step_seconds": self.step_seconds,
            "parts_seconds": self.seconds,
            "parts": [part.to_json() for part in self.parts],
        }


def profile_prompt(executor: NativeExecutor, machine: Machine, prompt: int, repeats: int, seed: int = 0) -> Profile:
    """A prompt from nothing to its first token."""
    generator = np.random.default_rng(seed)

    def step() -> None:
        session = executor.session()
        try:
            session.feed(generator.integers(0, executor.spec.vocab_size, prompt, dtype=np.int32))
        finally:
            session.close()

    spec, chunk = executor.spec, executor.chunk_rows
    ends = [min(end, prompt) for end in range(chunk, prompt + chunk, chunk)]
    shape = Shape(
        rows=prompt,
        outputs=1,
        passes=len(ends),
        cache_bytes=sum(cache_bytes(spec, end) for end in ends),
        attention_operations=sum(attention_operations(spec, seen) for seen in range(1, prompt + 1)),
        output_cache_bytes=cache_bytes(spec, prompt),
        output_attention_operations=attention_operations(spec, prompt),
    )
    return _profile(executor, machine, shape, step, repeats)


def profile_answer(
    executor: NativeExecutor, machine: Machine, prompt: int, streams: int, repeats: int, seed: int = 0
) -> Profile:
    """A next token in each of `streams` answers to prompts of this length."""
    generator = np.random.default_rng(seed)
    sessions = [executor.session() for _ in range(streams)]
    try:
        for session in sessions:
            session.feed(generator.integers(0, executor.spec.vocab_size, prompt, dtype=np.int32))
        tokens = generator.integers(0, executor.spec.vocab_size, streams).tolist()
        seen = prompt + repeats  # in the middle of the steps
        read = streams * cache_bytes(executor.spec, seen)
        operations = streams * attention_operations(executor.spec, seen)
        shape = Shape(
            rows=streams,
            outputs=streams,
            passes=1,
            cache_bytes=read,
            attention_operations=operations,
            output_cache_bytes=read,
            output_attention_operations=operations,
        )
        return _profile(executor, machine, shape, lambda: executor.step(sessions, tokens), repeats)
    finally:
        for session in sessions:
            session.close()


def _profile(
    executor: NativeExecutor, machine: Machine, shape: Shape, step: Callable[[], object], repeats: int
) -> Profile:
    """`repeats` steps as they are, and as many timed from inside, in turn."""
    step()
    walls, inside = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        walls.append(time.perf_counter() - begin)
        executor.program.profile(True)
        step()
        inside.append(executor.program.profile(False))
    costs = _Costs(executor, machine, shape)
    parts = [costs.part(name, np.array(inside)) for name in dict.fromkeys(executor.lowered.parts)]
    ordered = sorted(parts, key=lambda part: -part.seconds)
    return Profile(rows=shape.rows, step_seconds=float(np.median(walls)), parts=tuple(ordered))


class _Costs:
    """Bytes and operations of each operation of an executor's program."""

    def __init__(self, executor: NativeExecutor, machine: Machine, shape: Shape) -> None:
        self.executor, self.machine, self.shape = executor, machine, shape
        self.lowered = executor.lowered
        ops = self.lowered.ops
        self.gather = next(index for index, op in enumerate(ops) if op.kind == OpKind.GATHER)
        self.cycled = sum(self.bytes(index) for index, op in enumerate(ops) if op.kind in PRODUCTS)

    def part(self, name: str, seconds: np.ndarray) -> Part:
        """`seconds`: (repeats, ops)."""
        indices = [index for index, part in enumerate(self.lowered.parts) if part == name]
        return Part(
            name=name,
            count=len(indices),
            seconds=float(np.median(seconds[:, indices].sum(1))),
            bytes=sum(self.bytes(index) for index in indices),
            operations=sum(self.operations(index) for index in indices),
            least_seconds=sum(self.least(index) for index in indices),
        )

    def least(self, index: int) -> float:
        """Weights, keys and values come from wherever the whole step's fit; rows from the cache that holds them."""
        size = self.bytes(index)
        far = self.lowered.ops[index].kind in (*PRODUCTS, OpKind.ATTENTION)
        reading = size / self.machine.bandwidth_at(max(self.cycled, size) if far else size)
        return max(reading, self.operations(index) / self.machine.peak(self.arithmetic(index)))

    def rows(self, index: int) -> int:
        return self.shape.outputs if index >= self.gather else self.shape.rows

    def _passes(self, index: int) -> int:
        """Times that the weights are read."""
        return 1 if index > self.gather else self.shape.passes

    def matrix(self, op: Op) -> Tensor:
        return self.lowered.tensors[op.tensors[0]]

    def bytes(self, index: int) -> int:
        op = self.lowered.ops[index]
        if op.kind == OpKind.LINEAR:
            return int(self.matrix(op).data.nbytes) * self._passes(index)
        if op.kind == OpKind.EXPERTS:
            return self._bytes_of_experts(index)
        if op.kind == OpKind.ATTENTION:
            every, outputs = self.shape.cache_bytes, self.shape.output_cache_bytes
            return self._share_of_attention(outputs if index > self.gather else every)
        return self.rows(index) * sum(self._row_bytes(register) for register in (*op.inputs, op.out) if register >= 0)

    def _row_bytes(self, register: int) -> int:
        """Of one row of the batch, which is there once for each expert that it goes to."""
        one = self.lowered.registers[register]
        copies = self._mixture.num_active if register in self.lowered.dispatched else 1
        return copies * one.width * VALUE_BYTES[one.rows]

    def operations(self, index: int) -> float:
        op = self.lowered.ops[index]
        if op.kind == OpKind.LINEAR:
            matrix = self.matrix(op)
            return 2.0 * self.rows(index) * matrix.rows * matrix.columns
        if op.kind == OpKind.EXPERTS:
            matrix = self.matrix(op)
            return 2.0 * self.rows(index) * self._mixture.num_active * matrix.rows * matrix.columns
        if op.kind == OpKind.ATTENTION:
            all_rows, outputs = self.shape.attention_operations, self.shape.output_attention_operations
            return self._share_of_attention(outputs if index > self.gather else all_rows)
        return 0.0

    @property
    def _mixture(self) -> Experts:
        """Of one layer; all that have experts have as many."""
        found = (layer.feed_forward.experts for layer in self.executor.spec.layers)
        return next(experts for experts in found if experts is not None)

    def _bytes_of_experts(self, index: int) -> int:
        """Of those that the rows of each pass go to, if they go to all alike."""
        experts, passes = self._mixture, self._passes(index)
        idle = (1 - experts.num_active / experts.num_experts) ** (self.rows(index) / passes)
        first = self.lowered.ops[index].tensors[0]
        matrices = self.lowered.tensors[first : first + experts.num_experts]
        held = sum(int(matrix.data.nbytes) for matrix in matrices)
        return int(passes * (1 - float(idle)) * held)

    def _share_of_attention(self, total: float) -> int:
        return int(total / sum(op.kind == OpKind.ATTENTION for op in self.lowered.ops))

    def arithmetic(self, index: int) -> str:
        """Which inner loop it is: see `Machine.peak`."""
        op = self.lowered.ops[index]
        if op.kind == OpKind.ATTENTION:
            return "int8" if self.executor.spec.cache_format == "int8" else "fp32"
        if op.kind not in PRODUCTS:
            return "fp32"
        form = self.matrix(op).format
        rounded = self.lowered.registers[op.inputs[0]].rows != "fp32"
        return form if rounded or form == "fp16" else "fp32"

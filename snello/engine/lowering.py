"""A `Spec` becomes a program of the core: registers, tensors and operations in the order of computation.

The builder names registers once and prepares each distinct input of linears once (transform, rotation, INT8 rounding),
however many linears read it. It knows names and shapes, no weights: tensors are asked for by canonical name, so a wrong
name fails here and not in the core. Shapes: T rows, D hidden size, H heads, E head_dim, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from snello.engine.adapters import Adapters
from snello.engine.pages import STATE_ROWS
from snello.errors import SnelloError, Unsupported
from snello.models.packed import PackedWeights
from snello.models.rope import rope_tables
from snello.models.spec import (
    GLOBAL,
    INTEGER,
    Attention,
    FeedForward,
    Format,
    Layer,
    Norm,
    ShortConvolution,
    Spec,
    input_name,
    is_router,
    linear_shape,
)
from snello.native import core

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "tanh": 5}
ROWS: dict[str, core.RowKind] = {"float": "fp32", "bf16": "bf16", "int8": "int8", "int8-static": "int8"}
BLOCK = 64  # integer matrices pad their columns to this
PARTS = {  # what an op is called in a profile, where its name does not say it
    core.OpKind.TRANSFORM: "rotate, round",
    core.OpKind.STORE: "store keys, values",
    core.OpKind.HEAD: "gather",
}
JOINED = {  # of one input
    **dict.fromkeys(("q", "k", "v", *GLOBAL), "q, k, v"),
    **dict.fromkeys(("b", "c", "x"), "b, c, x"),
    **dict.fromkeys(("up", "gate"), "up, gate"),
}


@dataclass
class Lowered:
    """What `core.Program` is made of, and the arrays that must outlive it."""

    ops: list[core.Op] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # of the model that each op belongs to: "attention", "up, gate"
    tensors: list[core.Tensor] = field(default_factory=list)
    registers: list[core.Register] = field(default_factory=list)
    cache_layers: list[core.CacheLayer] = field(default_factory=list)
    dispatched: set[int] = field(default_factory=set)  # registers with a row for each expert that a row goes to


def lower(spec: Spec, weights: PackedWeights, *, positions: int, adapters: Adapters | None = None) -> Lowered:
    """The program of `spec` for up to `positions` absolute positions, each row with one of `adapters` or none.

    Raises:
        Unsupported: the spec says something that the native core does not do.
    """
    return _Builder(spec, weights, positions, adapters).build()


def cache_layers(spec: Spec) -> list[core.CacheLayer]:
    """What a page holds of each layer. Global rows have keys and values of their own."""
    found: list[core.CacheLayer] = []
    for layer in spec.layers:
        mixer = layer.mixer
        if isinstance(mixer, ShortConvolution):
            found.append(_state_layer(spec))
        elif isinstance(mixer, Attention):
            found += [_kv_layer(spec, mixer)] * (2 if mixer.global_rows else 1)
    return found


def _kv_layer(spec: Spec, mixer: Attention) -> core.CacheLayer:
    form = core.FORMATS[spec.cache_format]
    return core.CacheLayer(num_kv_heads=mixer.num_kv_heads, head_dim=mixer.head_dim, format=form)


def _state_layer(spec: Spec) -> core.CacheLayer:
    """Always FP32: few rows, which every later row must find as they were computed."""
    return core.CacheLayer(
        num_kv_heads=1, head_dim=spec.hidden_size, format=core.FORMATS["fp32"], state_rows=STATE_ROWS
    )


class _Builder:
    def __init__(self, spec: Spec, weights: PackedWeights, positions: int, adapters: Adapters | None) -> None:
        self.spec = spec
        self.adapters = adapters
        self.weights = weights
        self.positions = positions
        self.lowered = Lowered()
        self._tensor_ids: dict[str, int] = {}
        self._register_ids: dict[tuple[str, int, core.RowKind], int] = {}
        self._prepared: dict[tuple[str, str, bool, bool, float], int] = {}

    # ---- registers and tensors

    def register(self, name: str, width: int, rows: core.RowKind = "fp32") -> int:
        key = (name, width, rows)
        if key not in self._register_ids:
            self._register_ids[key] = len(self.lowered.registers)
            self.lowered.registers.append(core.Register(width=width, rows=rows))
        return self._register_ids[key]

    def tensor(self, name: str, make: Callable[[], core.Tensor]) -> int:
        if name not in self._tensor_ids:
            self._tensor_ids[name] = len(self.lowered.tensors)
            self.lowered.tensors.append(make())
        return self._tensor_ids[name]

    def matrix(self, name: str) -> int:
        return self.tensor(name, lambda: self.weights.tensor(name))

    def vector(self, name: str) -> int:
        return self.tensor(name, lambda: core.Tensor.vector(self.weights.vector(name)))

    def op(
        self,
        kind: core.OpKind,
        *inputs: int,
        out: int = -1,
        tensors: tuple[int, ...] = (),
        i: tuple[int, ...] = (),
        f: tuple[float, ...] = (),
        part: str = "",
    ) -> None:
        self.lowered.ops.append(core.Op(kind, inputs, out, tensors, i, f))
        self.lowered.parts.append(part or PARTS.get(kind, kind.name.lower()))

    # ---- the model, from tokens to output

    def build(self) -> Lowered:
        hidden = self.embed()
        for index, layer in enumerate(self.spec.layers):
            self.block(index, layer, hidden)
        if not self.spec.layers:
            self.gather(hidden)
        self.head(hidden)
        return self.lowered

    def embed(self) -> int:
        spec, hidden = self.spec, self.register("hidden", self.spec.hidden_size)
        undo, block = -1, 0
        if spec.head.tied:
            undo, block = self.undo("head")
        tables = (self.matrix("embedding.tokens.weight"), undo, self.prompts())
        self.op(core.OpKind.EMBED, out=hidden, tensors=tables, i=(0, 0, 0, block), f=(spec.embedding.scale,))
        if spec.embedding.learned_positions:
            table = self.matrix("embedding.positions.weight")
            self.op(core.OpKind.EMBED, out=hidden, tensors=(table,), i=(1, spec.embedding.position_offset, 1), f=(1.0,))
        if spec.embedding.token_types:
            table = self.matrix("embedding.types.weight")
            self.op(core.OpKind.EMBED, out=hidden, tensors=(table,), i=(2, 0, 1), f=(1.0,))
        if spec.embedding.norm:
            self.norm("embedding.norm", spec.norm, hidden, hidden)
        return hidden

    def prompts(self) -> int:
        """Rows of the adapters that are prompts, behind the vocabulary's."""
        rows = None if self.adapters is None else self.adapters.prompts
        return -1 if rows is None else self.tensor("prompts", lambda: rows)

    def block(self, index: int, layer: Layer, hidden: int) -> None:
        mixer = layer.mixer
        if not isinstance(mixer, (Attention, ShortConvolution)):
            message = f"layer {index} mixes with {type(mixer).__name__}, which the native core does not run"
            raise Unsupported(message, "give a model of a family in docs/models.md")
        if layer.norms == "parallel":
            self.parallel(index, mixer, layer, hidden)
            return
        self.half(f"layers.{index}.attention", layer, hidden, lambda x, out: self.mix(index, mixer, x, out))
        self.half(f"layers.{index}.ffn", layer, hidden, lambda x, out: self.feed_forward(index, layer, x, out))

    def parallel(self, index: int, mixer: Attention | ShortConvolution, layer: Layer, hidden: int) -> None:
        """Both halves of what the block was given: the second norm is taken before the first half is added."""
        width, norm = self.spec.hidden_size, self.spec.norm
        first, second = self.register("normed", width), self.register("normed too", width)
        self.norm(f"layers.{index}.attention.norm", norm, hidden, first)
        self.norm(f"layers.{index}.ffn.norm", norm, hidden, second)
        self.mix(index, mixer, first, hidden)
        self.feed_forward(index, layer, second, hidden)

    def half(self, name: str, layer: Layer, hidden: int, compute: Callable[[int, int], None]) -> None:
        """One residual half: norm before, after the sum, or on both sides of what is added."""
        width, norm = self.spec.hidden_size, self.spec.norm
        if layer.norms == "post":
            compute(hidden, hidden)
            self.norm(f"{name}.norm", norm, hidden, hidden)
            return
        normed = self.register("normed", width)
        self.norm(f"{name}.norm", norm, hidden, normed)
        if layer.norms == "pre":
            compute(normed, hidden)
            return
        added = self.register("added", width)
        compute(normed, added)
        self.norm(f"{name}.post_norm", norm, added, added)
        self.op(core.OpKind.ADD, hidden, added, out=hidden, f=(1.0,))

    def mix(self, index: int, mixer: Attention | ShortConvolution, x: int, out: int) -> None:
        """What brings positions together."""
        if isinstance(mixer, ShortConvolution):
            self.convolution(index, mixer, x, out)
        else:
            self.attention(index, mixer, x, out)

    def convolution(self, index: int, mixer: ShortConvolution, x: int, out: int) -> None:
        name, width = f"layers.{index}.attention", self.spec.hidden_size
        b, c, given = (self.register(f"convolution {part}", width) for part in ("b", "c", "x"))
        for part, register in (("b", b), ("c", c), ("x", given)):
            self.linear(f"{name}.{part}", x, register, bias=mixer.bias)
        mixed = self.register("mixed", width)
        taps, bias = self.vector(f"{name}.taps.weight"), self.vector(f"{name}.taps.bias") if mixer.bias else -1
        numbers = (self.cache_layer(_state_layer(self.spec)), mixer.kernel)
        self.op(core.OpKind.CONVOLVE, b, given, c, out=mixed, tensors=(taps, bias), i=numbers)
        self.meet(index, mixed)
        self.linear(f"{name}.o", mixed, out, bias=mixer.bias, accumulate=self.accumulates(index))

    def meet(self, index: int, *registers: int) -> None:
        """Where positions meet for the last time. What follows is computed only of rows whose answer is wanted."""
        if index < len(self.spec.layers) - 1:
            return
        width = self.spec.hidden_size
        hidden, parallel = self.register("hidden", width), self.spec.layers[index].norms == "parallel"
        self.gather(hidden, *registers, *([self.register("normed too", width)] if parallel else []))

    def gather(self, *registers: int) -> None:
        self.op(core.OpKind.GATHER, *registers)
        self._prepared.clear()

    def cache_layer(self, layer: core.CacheLayer) -> int:
        self.lowered.cache_layers.append(layer)
        return len(self.lowered.cache_layers) - 1

    def attention(self, index: int, mixer: Attention, x: int, out: int) -> None:
        name = f"layers.{index}.attention"
        q = self.register("q", mixer.num_heads * mixer.head_dim)
        k = self.register("k", mixer.num_kv_heads * mixer.head_dim)
        v = self.register("v", mixer.num_kv_heads * mixer.head_dim)
        for part, register in (("q", q), ("k", k), ("v", v)):
            self.linear(f"{name}.{part}", x, register, bias=mixer.qkv_bias)
        self.adapt(name, x, {"q": q, "k": k, "v": v})
        if mixer.qk_norm is not None:
            self.norm(f"{name}.q_norm", mixer.qk_norm, q, q, segment=mixer.head_dim)
            self.norm(f"{name}.k_norm", mixer.qk_norm, k, k, segment=mixer.head_dim)
        self.rope(mixer, q, mixer.num_heads)
        self.rope(mixer, k, mixer.num_kv_heads)
        mixed = self.register("mixed", mixer.num_heads * mixer.head_dim)
        layer = self.store(mixer, k, v)
        if not mixer.global_rows:
            self.meet(index, q)
        self.attend(layer, mixer, q, mixed)
        if mixer.global_rows:
            for part, register in zip(GLOBAL, (q, k, v), strict=True):
                self.linear(f"{name}.{part}", x, register, bias=mixer.qkv_bias)
            everywhere = replace(mixer, window=None, sinks=0)
            self.attend(self.store(mixer, k, v), everywhere, q, mixed, rows=mixer.global_rows)
            self.meet(index, mixed)
        self.linear(f"{name}.o", mixed, out, bias=mixer.out_bias, accumulate=self.accumulates(index))
        self.adapt(name, mixed, {"o": out})

    def store(self, mixer: Attention, k: int, v: int) -> int:
        """Which layer of the cache it is."""
        layer = self.cache_layer(_kv_layer(self.spec, mixer))
        self.op(core.OpKind.STORE, k, v, i=(layer,))
        return layer

    def attend(self, layer: int, mixer: Attention, q: int, mixed: int, *, rows: int = 0) -> None:
        """`rows`: only the first of each sequence are written; 0: all."""
        heads = (layer, mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
        numbers = (*heads, mixer.window or 0, mixer.sinks, int(mixer.causal), rows)
        scale = (mixer.score_scale, mixer.soft_cap or 0.0)
        self.op(core.OpKind.ATTENTION, q, out=mixed, i=numbers, f=scale)

    def feed_forward(self, index: int, layer: Layer, x: int, out: int) -> None:
        name, ffn = f"layers.{index}.ffn", layer.feed_forward
        if ffn.experts is not None:
            self.mixture(index, ffn, x, out)
            return
        up = self.register("up", ffn.width)
        self.linear(f"{name}.up", x, up, bias=ffn.bias)
        kind = (ACTIVATIONS[ffn.activation],)
        if ffn.gated:
            gate = self.register("gate", ffn.width)
            self.linear(f"{name}.gate", x, gate, bias=ffn.bias)
            self.adapt(name, x, {"up": up, "gate": gate})
            self.op(core.OpKind.ACTIVATE, gate, up, out=up, i=kind)
        else:
            self.adapt(name, x, {"up": up})
            self.op(core.OpKind.ACTIVATE, up, -1, out=up, i=kind)
        self.linear(f"{name}.down", up, out, bias=ffn.bias, accumulate=self.accumulates(index))
        self.adapt(name, up, {"down": out})

    def mixture(self, index: int, ffn: FeedForward, x: int, out: int) -> None:
        """Experts: rows are dispatched to those that the router chose, sorted by expert, and their answers summed."""
        mixture = ffn.experts
        assert mixture is not None
        if mixture.shared or ffn.bias or not ffn.gated:
            message = f"layer {index} has shared, biased or ungated experts, which the native core does not run"
            raise Unsupported(message, "give a model of a family in docs/models.md")
        name = f"layers.{index}.ffn"
        experts = [f"{name}.experts.{number}" for number in range(mixture.num_experts)]
        rows = self.prepare(f"{experts[0]}.gate", x)
        logits = self.register("router", mixture.num_experts)
        self.linear(f"{name}.router", x, logits)
        routes = self.register("routes", 2 * mixture.num_active)
        numbers = (mixture.num_active, int(mixture.normalized))
        self.op(core.OpKind.ROUTE, logits, out=routes, i=numbers, part="router")
        given = self.like("dispatched", rows)
        self.op(core.OpKind.DISPATCH, rows, routes, out=given)
        gate, up = self.register("expert gate", ffn.width), self.register("expert up", ffn.width)
        self.op(core.OpKind.EXPERTS, given, out=gate, tensors=self.matrices(experts, "gate"), part="experts: up, gate")
        self.op(core.OpKind.EXPERTS, given, out=up, tensors=self.matrices(experts, "up"), part="experts: up, gate")
        self.op(core.OpKind.ACTIVATE, gate, up, out=up, i=(ACTIVATIONS[ffn.activation],))
        hidden = self.prepare_hidden(experts, up)
        answers = self.register("expert answers", self.spec.hidden_size)
        down = self.matrices(experts, "down")
        self.op(core.OpKind.EXPERTS, hidden, out=answers, tensors=down, part="experts: down")
        self.op(core.OpKind.COMBINE, answers, routes, out=out, i=(int(self.accumulates(index)),))
        self.lowered.dispatched |= {given, gate, up, hidden, answers}
        self.touch(out)

    def matrices(self, experts: list[str], part: str) -> tuple[int]:
        """The first of the matrices of all experts, which the core wants one after the other."""
        spec = self.spec
        formats = [spec.format(f"{expert}.{part}") for expert in experts]
        kinds = {(fmt.activations, fmt.rotate, fmt.equalize, _integer(fmt)) for fmt in formats}
        if len(kinds) > 1:
            message = f"{experts[0]}.{part} and other experts take their inputs in different forms"
            raise Unsupported(message, "quantize all experts alike: start from the original")
        ids = [self.matrix(f"{expert}.{part}.weight") for expert in experts]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        return (ids[0],)

    def like(self, name: str, register: int) -> int:
        given = self.lowered.registers[register]
        return self.register(name, given.width, given.rows)

    def prepare_hidden(self, experts: list[str], x: int) -> int:
        """As `prepare`, of dispatched rows: each expert has an input scale of its own."""
        first = f"{experts[0]}.down"
        fmt, width = self.spec.format(first), linear_shape(self.spec, first)[1]
        if not _needs_preparing(fmt, width):
            return x
        if fmt.activations == "int8-static":
            message = "experts with static activation scales, which the native core does not run"
            raise Unsupported(message, "quantize with activations that are dynamic or float")
        padded = _padded(width)
        block = _rotate_block(padded) if fmt.rotate else 0
        ids = [self.multiplier(f"{expert}.hidden", fmt, padded, width) for expert in experts]
        assert ids[0] < 0 or ids == list(range(ids[0], ids[0] + len(ids)))
        out = self.register("prepared experts", padded, ROWS[fmt.activations])
        self.op(core.OpKind.TRANSFORM, x, out=out, tensors=(ids[0],), i=(block, int(ids[0] >= 0)), f=(0.0,))
        return out

    def accumulates(self, index: int) -> bool:
        return self.spec.layers[index].norms != "both"

    def head(self, hidden: int) -> None:
        spec, head, width = self.spec, self.spec.head, self.spec.hidden_size
        rows = self.register("answers", width)
        self.op(core.OpKind.HEAD, hidden, out=rows)
        if spec.final_norm:
            self.norm("norm", spec.norm, rows, rows)
        if head.kind == "embed":
            return
        for name, activation in (("head.transform", head.transform), ("head.pooler", head.pooler)):
            if activation is not None:
                rows = self.dense(name, activation, rows)
        if head.transform is not None:
            self.norm("head.transform.norm", spec.norm, rows, rows)
        logits = self.register("logits", linear_shape(spec, "head")[0])
        self.linear("head", rows, logits, bias=head.bias)
        if head.logit_scale != 1.0 or head.soft_cap:
            self.op(core.OpKind.SCALE, logits, out=logits, f=(head.logit_scale, head.soft_cap or 0.0))

    def dense(self, name: str, activation: str, rows: int) -> int:
        out = self.register(name, self.spec.hidden_size)
        self.linear(name, rows, out, bias=True)
        self.op(core.OpKind.ACTIVATE, out, -1, out=out, i=(ACTIVATIONS[activation],))
        return out

    # ---- parts

    def norm(self, name: str, norm: Norm, x: int, out: int, *, segment: int = 0) -> None:
        gain = self.vector(f"{name}.weight")
        bias = self.vector(f"{name}.bias") if norm.bias else -1
        numbers = (int(norm.kind == "layer"), segment)
        self.op(core.OpKind.NORM, x, out=out, tensors=(gain, bias), i=numbers, f=(norm.epsilon, norm.gain_offset))
        self.touch(out)

    def rope(self, mixer: Attention, register: int, heads: int) -> None:
        rope = mixer.rope
        if rope is None:
            return
        name = f"rope {rope}"
        if f"{name} cos" not in self._tensor_ids:
            cosines, sines = rope_tables(rope, self.positions)  # (positions, dims / 2)
            self.tensor(f"{name} cos", lambda: core.Tensor.plain(cosines))
            self.tensor(f"{name} sin", lambda: core.Tensor.plain(sines))
        tables = (self._tensor_ids[f"{name} cos"], self._tensor_ids[f"{name} sin"])
        numbers = (heads, mixer.head_dim, rope.dims, int(rope.interleaved))
        self.op(core.OpKind.ROPE, register, out=register, tensors=tables, i=numbers)

    def linear(self, name: str, x: int, out: int, *, bias: bool = False, accumulate: bool = False) -> None:
        tied = name == "head" and self.spec.head.kind == "lm" and self.spec.head.tied
        matrix = self.matrix("embedding.tokens.weight" if tied else f"{name}.weight")
        prepared = self.prepare(name, x)
        added = self.vector(f"{name}.bias") if bias else -1
        last = name.rsplit(".", 1)[-1]
        numbers, part = (int(accumulate), 0), JOINED.get(last, last)
        self.op(core.OpKind.LINEAR, prepared, out=out, tensors=(matrix, added), i=numbers, part=part)
        self.touch(out)

    def adapt(self, half: str, x: int, outputs: dict[str, int]) -> None:
        """Adds B (A x) of each row's adapter to what linears made of x. All A run beside those linears, then all B."""
        if self.adapters is None:
            return
        count, stacks = len(self.adapters), dict[str, tuple[int, int]]()
        for part in outputs:
            if pairs := self.adapters.pairs(f"{half}.{part}"):
                stacks[part] = (self.stack([a for a, _ in pairs]), self.stack([b for _, b in pairs]))
        low = {part: self.register(f"low {part}", self.adapters.rank) for part in stacks}
        for part, (a, _) in stacks.items():
            self.op(core.OpKind.ADAPT, x, out=low[part], tensors=(a,), i=(0, 0, count), part="adapters")
        for part, (_, b) in stacks.items():
            self.op(core.OpKind.ADAPT, low[part], out=outputs[part], tensors=(b,), i=(1, 0, count), part="adapters")
            self.touch(outputs[part])

    def stack(self, tensors: list[core.Tensor]) -> int:
        """The first of tensors that lie one after the other."""
        first = len(self.lowered.tensors)
        self.lowered.tensors += tensors
        return first

    def prepare(self, linear: str, x: int) -> int:
        """The register that `linear` reads: x itself, or x transformed, rotated or rounded, made once per input."""
        fmt, source = self.spec.format(linear), input_name(linear)
        width = linear_shape(self.spec, linear)[1]
        if is_router(linear) or not _needs_preparing(fmt, width):
            return x
        key = (source, fmt.activations, fmt.rotate, fmt.equalize, fmt.skip)
        if key not in self._prepared:
            padded = _padded(width)
            stage = "answers" if linear.startswith("head") else "rows"  # registers belong to one side of HEAD
            out = self.register(f"prepared {stage}", padded, ROWS[fmt.activations])
            step = self.step(source, fmt)
            block = _rotate_block(padded) if fmt.rotate else 0
            multiplier = self.multiplier(source, fmt, padded, width)
            tensors = (multiplier, self.threshold(source, fmt))
            self.op(core.OpKind.TRANSFORM, x, out=out, tensors=tensors, i=(block,), f=(step,))
            self.touch(out)
            self._prepared[key] = out
        return self._prepared[key]

    def step(self, source: str, fmt: Format) -> float:
        """The scale of all rows of this input where it was measured before, else 0.

        Raises:
            SnelloError: what is stored is no scale.
        """
        if fmt.activations != "int8-static":
            return 0.0
        step = self.weights.input_step(source)
        if not 0 < step < float("inf"):
            raise SnelloError(f"the activation scale of {source} is {step:g}", "make or copy the folder again")
        return step

    def threshold(self, source: str, fmt: Format) -> int:
        """The tensor of thresholds (padded K) below which this input is 0, or -1."""
        if not fmt.skip:
            return -1
        if ROWS[fmt.activations] != "int8":
            raise Unsupported(f"{source} skips values, and its activations are float", "quantize them to int8")
        threshold = self.weights.input_threshold(source)
        assert threshold is not None, f"no thresholds of {source}"
        return self.tensor(f"{source} threshold", lambda: core.Tensor.vector(threshold))

    def multiplier(self, source: str, fmt: Format, padded: int, width: int) -> int:
        """The tensor [width] of 1 / (input scale * sqrt(rotate block)), or -1 where nothing is to be multiplied."""
        if not (fmt.rotate or fmt.equalize):
            return -1
        scale = self.weights.input_scale(source) if fmt.equalize else np.ones(padded, np.float32)
        assert scale is not None and scale.shape == (padded,), f"no input scale of {source}"
        root = np.float32(np.sqrt(_rotate_block(padded))) if fmt.rotate else np.float32(1)
        name = f"{source} multiplier {fmt.rotate} {fmt.equalize} {width}"
        return self.tensor(name, lambda: core.Tensor.vector((np.float32(1) / (scale * root))[:width]))

    def undo(self, linear: str) -> tuple[int, int]:
        """How the embedding is gathered from a tied head that is stored in another basis: (multiplier, block)."""
        fmt, padded = self.spec.format(linear), _padded(self.spec.hidden_size)
        block = _rotate_block(padded) if fmt.rotate else 0
        return self.multiplier(input_name(linear), fmt, padded, padded), block

    def touch(self, register: int) -> None:
        """A register was overwritten: what was prepared from its old content, or lay in it, is no longer valid."""
        stale = [key for key, out in self._prepared.items() if out == register]
        for key in stale:
            del self._prepared[key]


def _needs_preparing(fmt: Format, width: int) -> bool:
    if fmt.activations != "float":
        return True
    return _integer(fmt) and (fmt.rotate or fmt.equalize or width != _padded(width))


def _integer(fmt: Format) -> bool:
    return fmt.weights in INTEGER


def _padded(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _rotate_block(padded: int) -> int:
    return 128 if padded % 128 == 0 else 64

"""What a model *is*: the `Spec`, a frozen tree of plain values that is hashed and stored with every model.

The engine reads a `Spec` and a `Deployment` and nothing else: it never asks which technique made a model. So the tree
can say more than every executor can do; what an executor cannot do, it refuses with `Unsupported`. Dimensions: T rows,
D hidden size, H heads, K kv heads, E head_dim, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, TypeAlias

from snello.errors import SnelloError

Task: TypeAlias = Literal["causal-lm", "masked-lm", "sequence-classification", "embedding"]
FloatFormat: TypeAlias = Literal["fp32", "fp16", "bf16"]
WeightFormat: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4", "int3"]
CacheFormat: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2", "tanh"]

LATER = "later"  # a field that older specs do not have: left out of the JSON where it says nothing, so digests stay
MAX_KERNEL = 8  # positions that a short convolution adds up
GLOBAL = ("global_q", "global_k", "global_v")
BITS: dict[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 3}
GROUPED: tuple[WeightFormat, ...] = ("int4", "int3")  # with a scale for each group of columns
INTEGER: tuple[WeightFormat, ...] = ("int8", *GROUPED)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the weights of one linear are stored, and how its input is prepared (docs/numerics.md).

    `group_size` belongs to INT4 and INT3. `activations` int8 quantizes the input per row and needs integer weights;
    int8-static does so by one scale for all rows, measured before and stored; bf16 rounds it and needs BF16 weights.
    Routers read their input as it is: a rounded row could go to another expert.
    `rotate` and `equalize` say that the weights are stored in the basis `W diag(input scale) H`; the input is brought
    there once.
    `skip` above 0: values of the input below their channel's threshold, in that basis, are 0, about this share of them
    on the text that the thresholds were measured on. The weights are then stored by channel, so that what meets only
    zeros is not read. It needs integer activations; linears of one input have one `skip`.
    """

    weights: WeightFormat
    group_size: Literal[0, 32, 64, 128] = 0
    activations: Literal["float", "bf16", "int8", "int8-static"] = "float"
    rotate: bool = False
    equalize: bool = False
    skip: float = field(default=0.0, metadata={LATER: True})


def own_format(weights: FloatFormat) -> Format:
    """Of a matrix that nobody quantized: its input is of its own type too, where the core multiplies that."""
    return Format(weights=weights, activations="bf16" if weights == "bf16" else "float")


@dataclass(frozen=True, kw_only=True)
class Norm:
    kind: Literal["rms", "layer"]
    epsilon: float
    gain_offset: float = 0.0  # Gemma stores gain - 1
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding. `scaling` keeps the configuration's own names (rope_type llama3, linear, yarn, ...)."""

    base: float
    dims: int  # rotary dims, the first of each head; head_dim unless partial
    interleaved: bool = False
    scaling: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """`window`: a row sees that many positions, its own included; where it looks both ways, window - 1 to each side.

    `sinks` are the first positions, which every row goes on seeing. Where rows look both ways they see everything
    themselves, by projections of their own (Longformer's global tokens).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    rope: Rope | None = None
    qk_norm: Norm | None = None  # per head, before RoPE
    qkv_bias: bool = False
    out_bias: bool = False
    fused_qkv: bool = False  # how the checkpoint stores it; canonical names are always apart
    scale: float | None = None  # None: head_dim ** -0.5
    soft_cap: float | None = None

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def global_rows(self) -> int:
        """The first rows that see everything by projections of their own."""
        return 0 if self.causal or self.window is None else self.sinks

    @property
    def linears(self) -> tuple[str, ...]:
        """In the order of computation."""
        return ("q", "k", "v", *(GLOBAL if self.global_rows else ()), "o")


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """Gated depthwise convolution over the last `kernel` positions (LFM2): o(c(y) * conv(b(y) * x(y))).

    It looks back only. Its state is the last kernel - 1 rows of b(y) * x(y). `bias` belongs to all four linears and to
    the convolution.
    """

    kernel: int
    bias: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """In the order of computation."""
        return ("b", "c", "x", "o")


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """A recurrent mixer with a state of fixed size (linear attention, state space)."""

    kind: str
    num_heads: int
    state_dim: int


Mixer: TypeAlias = Attention | ShortConvolution | Recurrent


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A router sends each row to the `num_active` experts with the largest logits; their answers are summed by weight.

    `normalized`: weights are a softmax over the chosen experts, else over all. `shared` experts see every row.
    """

    num_experts: int
    num_active: int
    shared: int = 0
    normalized: bool = True


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """`gated`: down(act(gate(x)) * up(x)); else down(act(up(x))). With `experts`, each of them is one of this width."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    experts: Experts | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block.

    Norms: `pre` before each half (Llama), `post` after the sum (BERT), `both` around (Gemma 2), `parallel` before each
    where both halves read what the block reads and their sum is added to it (GPT-NeoX).
    """

    mixer: Mixer
    feed_forward: FeedForward
    norms: Literal["pre", "post", "both", "parallel"] = "pre"


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """`learned_positions` and `token_types` count rows of tables that are added (BERT); 0: none."""

    scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    norm: bool = False  # a norm right after the sum (BERT)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden rows into answers.

    `lm`: logits over V (`transform`: BERT's dense + activation + norm first). `classify`: `pooler` (dense + tanh on the
    first row, or DistilBERT's dense + relu) then `num_labels` logits. `embed`: `pooling` over rows, then normalization.
    """

    kind: Literal["lm", "classify", "embed"]
    tied: bool = False
    bias: bool = False
    transform: Activation | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    pooler: Activation | None = None
    labels: tuple[str, ...] = ()
    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model, without its weights.

    `formats` maps canonical linear names (`linear_names`) to formats; `default_format` holds for the others and is the
    model's own type. `cache_format` is the type of keys and values.
    """

    family: str
    task: Task
    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[Layer, ...]
    norm: Norm  # of every block, and the final one unless `final_norm` is False
    embedding: Embedding
    head: Head
    default_format: Format
    cache_format: CacheFormat
    final_norm: bool = True
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    formats: tuple[tuple[str, Format], ...] = ()

    def format(self, linear: str) -> Format:
        """The format of one linear by its canonical name."""
        return self._format_by_linear.get(linear, self.default_format)

    @cached_property
    def _format_by_linear(self) -> dict[str, Format]:
        return dict(self.formats)

    def with_formats(self, formats: dict[str, Format]) -> Spec:
        """A copy in which these linears (or the untied "embedding") have these formats; names must exist."""
        unknown = sorted(set(formats) - {*linear_names(self), "embedding"})
        assert not unknown, f"no such linears: {unknown}"
        merged = {**dict(self.formats), **formats}
        kept = {name: value for name, value in merged.items() if value != self.default_format}
        return dataclasses.replace(self, formats=tuple(sorted(kept.items())))

    @property
    def causal(self) -> bool:
        return self.task == "causal-lm"

    @property
    def answer_row(self) -> int | None:
        """The row of a text that its answer is made of: 0, the first, or -1, the last. None: all rows."""
        if self.causal:
            return -1
        if self.head.kind == "classify":
            return 0
        return {"cls": 0, "last": -1}.get(self.head.pooling or "mean")

    def to_json(self) -> dict[str, Any]:
        return _to_plain(self)  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


# The whole numbers of a `Deployment`: the least, the most that the core takes, and what to do instead.
MOST_ROWS, MOST_POSITIONS = 65_536, 2**31 - 1
DEPLOYMENT_LIMITS: dict[str, tuple[int, int, str]] = {
    "threads": (1, 256, "without the option: the physical cores"),
    "context": (1, MOST_POSITIONS, "without the option: the model's own, or what memory holds"),
    "streams": (1, MOST_ROWS, "how many sequences run at once"),
    "max_num_seqs": (1, MOST_POSITIONS, "how many sequences may share the cache"),
    "chunk_rows": (1, MOST_ROWS, "256 is usual"),
    "keep_first": (0, MOST_POSITIONS, "how many of the first positions are kept"),
    "keep_last": (1, MOST_POSITIONS, "how many of the newest positions are kept; without the option: all"),
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a model runs *here*: this machine's side. Not part of the model's identity.

    `context`: positions to make room for, for each of `streams` sequences at once; None: the model's own, or what a
    quarter of free memory holds. `max_num_seqs`: sequences that may share the cache; it is made larger for them where
    a quarter of free memory allows. `keep_last`: only the newest so many positions are seen, besides the first
    `keep_first`, and keys and values of the others are given up, which the answer may miss; None: all are seen.
    """

    threads: int | None = None  # None: the physical cores
    context: int | None = None
    streams: int = 1
    max_num_seqs: int = 1
    chunk_rows: int = 256  # prompt rows of one step
    keep_first: int = 0
    keep_last: int | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most, hint) in DEPLOYMENT_LIMITS.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
                raise SnelloError(f"{name}={value!r} is not a whole number from {least} to {most:,}", hint)


# ---- canonical names ------------------------------------------------------------------------------------------------
#
# linear                              its input (shared: quantized and transformed once)
# layers.{i}.attention.{q,k,v}        layers.{i}.attention.in
# layers.{i}.attention.global_{q,k,v} layers.{i}.attention.in       (of global rows)
# layers.{i}.attention.o              layers.{i}.attention.mixed
# layers.{i}.attention.{b,c,x}        layers.{i}.attention.in       (of a convolution, in the place of q, k, v)
# layers.{i}.ffn.{gate,up}            layers.{i}.ffn.in
# layers.{i}.ffn.down                 layers.{i}.ffn.hidden
# layers.{i}.ffn.router               layers.{i}.ffn.in (in the place of the three above, with the experts below)
# layers.{i}.ffn.experts.{e}.{gate,up}  layers.{i}.ffn.in
# layers.{i}.ffn.experts.{e}.down     layers.{i}.ffn.experts.{e}.hidden
# head                                head.in       (tied: the embedding is gathered from it)
# head.transform                      head.transform.in
# head.pooler                         head.pooler.in
#
# Parameters: "<linear>.weight", "<linear>.bias"; norms "layers.{i}.{attention,ffn}.norm.{weight,bias}" (pre or post),
# "layers.{i}.{attention,ffn}.post_norm.*" (both), "layers.{i}.attention.{q,k}_norm.weight"; of a convolution
# "layers.{i}.attention.taps.weight" (kernel, D), oldest position first, and "...taps.bias"; "norm.*" the final one;
# "embedding.tokens.weight", "embedding.positions.weight", "embedding.types.weight", "embedding.norm.*",
# "head.transform.norm.*".


def linear_names(spec: Spec) -> list[str]:
    """Canonical names of all linears, in the order of computation."""
    names: list[str] = []
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mixer, (Attention, ShortConvolution)):
            names += [f"layers.{index}.attention.{part}" for part in layer.mixer.linears]
        names += feed_forward_linears(f"layers.{index}.ffn", layer.feed_forward)
    if spec.head.transform is not None:
        names.append("head.transform")
    if spec.head.pooler is not None:
        names.append("head.pooler")
    if spec.head.kind != "embed":
        names.append("head")
    return names


def answers_alone(spec: Spec, linear: str) -> bool:
    """Whether a linear is computed only of rows whose answer is wanted: positions do not meet after it any more."""
    last = f"layers.{len(spec.layers) - 1}"
    return linear.startswith(("head", f"{last}.ffn.")) or linear == f"{last}.attention.o"


def feed_forward_linears(stem: str, feed_forward: FeedForward) -> list[str]:
    """Canonical names of the linears of one feed-forward: the dense ones, or the router and all experts'."""
    parts = ("gate", "up", "down") if feed_forward.gated else ("up", "down")
    if feed_forward.experts is None:
        return [f"{stem}.{part}" for part in parts]
    experts = range(feed_forward.experts.num_experts)
    return [f"{stem}.router"] + [f"{stem}.experts.{number}.{part}" for number in experts for part in parts]


def experts_of(spec: Spec, linear: str) -> Experts | None:
    """The experts that this linear is one of; None: every row reads it."""
    if ".experts." not in linear:
        return None
    return spec.layers[int(linear.split(".")[1])].feed_forward.experts


def is_router(linear: str) -> bool:
    """Routers keep the model's own type: which experts a row goes to is not to be rounded."""
    return linear.endswith(".ffn.router")


def read_share(spec: Spec, linear: str, rows: int = 1) -> float:
    """How much of a linear a step of `rows` rows reads: 1, or the chance that one of them goes to this expert.

    Rows are taken to go to all experts alike, each row by itself.
    """
    experts = experts_of(spec, linear)
    return 1.0 if experts is None else 1.0 - (1.0 - experts.num_active / experts.num_experts) ** rows


def input_name(linear: str) -> str:
    """The canonical name of the input that this linear reads; linears that share it share its preparation."""
    stem, _, part = linear.rpartition(".")
    own = {"o": "mixed", "down": "hidden"}
    if stem.endswith(("attention", "ffn")):
        return f"{stem}.{own.get(part, 'in')}"
    if ".experts." in stem:
        return f"{stem}.hidden" if part == "down" else f"{stem.partition('.experts.')[0]}.in"
    return f"{linear}.in"


def linear_shape(spec: Spec, linear: str) -> tuple[int, int]:
    """(outputs N, inputs K) of a linear by its canonical name."""
    if linear == "head":
        outputs = len(spec.head.labels) if spec.head.kind == "classify" else spec.vocab_size
        return outputs, spec.hidden_size
    if linear.startswith("head."):
        return spec.hidden_size, spec.hidden_size
    _, index, half, *_, part = linear.split(".")
    layer = spec.layers[int(index)]
    if half == "ffn":
        width, experts = layer.feed_forward.width, layer.feed_forward.experts
        if part == "router":
            assert experts is not None
            return experts.num_experts, spec.hidden_size
        return (spec.hidden_size, width) if part == "down" else (width, spec.hidden_size)
    if isinstance(layer.mixer, ShortConvolution):
        return spec.hidden_size, spec.hidden_size
    assert isinstance(layer.mixer, Attention)
    queries = layer.mixer.num_heads * layer.mixer.head_dim
    keys = layer.mixer.num_kv_heads * layer.mixer.head_dim
    shapes = {"q": (queries, spec.hidden_size), "k": (keys, spec.hidden_size), "v": (keys, spec.hidden_size)}
    return shapes.get(part.removeprefix("global_"), (spec.hidden_size, queries))


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        said = [each for each in dataclasses.fields(value) if not _says_nothing(value, each)]
        fields = {each.name: _to_plain(getattr(value, each.name)) for each in said}
        return {"kind_of": type(value).__name__, **fields} if isinstance(value, Mixer) else fields
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


def _says_nothing(value: Any, each: dataclasses.Field[Any]) -> bool:
    return LATER in each.metadata and getattr(value, each.name) == each.default

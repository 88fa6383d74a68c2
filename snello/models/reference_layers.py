"""The torch modules that the reference is built from; attribute paths are the canonical parameter names.

Attention and feed-forward have one shape, `Half`: prepare (norm), inner (up to the input of the last linear), project
(the last linear), finish (residual and norm). Calibration walks these four steps instead of hooking into a forward
pass, so a half can be quantized between two of them. B sequences, T rows, D hidden, H heads, K kv heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.errors import Unsupported
from snello.models import spec as specs
from snello.models.rope import rope_tables

NEAR_ROWS = 256  # rows with a window that are taken at once
ACTIVATIONS: dict[specs.Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
}


class NormLayer(nn.Module):
    def __init__(self, norm: specs.Norm, size: int) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        offset, gain = self.norm.gain_offset, self.weight
        if self.norm.kind == "layer":
            return F.layer_norm(x, gain.shape, gain + offset if offset else gain, self.bias, self.norm.epsilon)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm.epsilon)
        # Where the gain is stored less an offset, the product is taken before it is rounded to 16 bits (Gemma).
        y = ((gain.float() + offset) * y).to(x.dtype) if offset else gain * y.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Half(nn.Module):
    """One half of a block. `order` says where the norms stand (`spec.Layer.norms`)."""

    inputs: tuple[str, ...]  # linears that read `prepare(x)`
    output: str  # the linear that reads `inner(...)`

    def __init__(self, spec: specs.Spec, layer: specs.Layer) -> None:
        super().__init__()
        self.order = layer.norms
        self.norm = NormLayer(spec.norm, spec.hidden_size)
        self.skips: dict[str, Callable[[Tensor], Tensor]] = {}  # of "inputs" and of "output", where the format skips
        if layer.norms == "both":
            self.post_norm = NormLayer(spec.norm, spec.hidden_size)

    def prepare(self, x: Tensor) -> Tensor:
        y = x if self.order == "post" else cast(Tensor, self.norm(x))
        return self.skips["inputs"](y) if "inputs" in self.skips else y

    def inner(self, y: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def project(self, y: Tensor) -> Tensor:
        y = self.skips["output"](y) if "output" in self.skips else y
        return cast(Tensor, getattr(self, self.output)(y))

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        if self.order == "post":
            return cast(Tensor, self.norm(x + y))
        return x + cast(Tensor, self.post_norm(y)) if self.order == "both" else x + y

    def added(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What this half adds to the residual, before a norm that stands behind it."""
        return self.project(self.inner(self.prepare(x), mask))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(x, self.added(x, mask))


class AttentionHalf(Half):
    inputs, output = ("q", "k", "v"), "o"

    def __init__(self, spec: specs.Spec, layer: specs.Layer) -> None:
        super().__init__(spec, layer)
        assert isinstance(layer.mixer, specs.Attention)
        self.mixer = mixer = layer.mixer
        queries, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        self.q = nn.Linear(spec.hidden_size, queries, bias=mixer.qkv_bias)
        self.k = nn.Linear(spec.hidden_size, keys, bias=mixer.qkv_bias)
        self.v = nn.Linear(spec.hidden_size, keys, bias=mixer.qkv_bias)
        self.o = nn.Linear(queries, spec.hidden_size, bias=mixer.out_bias)
        if mixer.global_rows:
            self.global_q = nn.Linear(spec.hidden_size, queries, bias=mixer.qkv_bias)
            self.global_k = nn.Linear(spec.hidden_size, keys, bias=mixer.qkv_bias)
            self.global_v = nn.Linear(spec.hidden_size, keys, bias=mixer.qkv_bias)
        if mixer.qk_norm is not None:
            self.q_norm = NormLayer(mixer.qk_norm, mixer.head_dim)
            self.k_norm = NormLayer(mixer.qk_norm, mixer.head_dim)

    def inner(self, y: Tensor, mask: Tensor | None) -> Tensor:
        mixer = self.mixer
        q, k, v = (by_head(linear(y), mixer.head_dim) for linear in (self.q, self.k, self.v))
        if mixer.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # (B, H, T, E), (B, K, T, E)
        if mixer.rope is not None:
            q, k = rotate(q, mixer.rope), rotate(k, mixer.rope)
        repeats = mixer.num_heads // mixer.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # (B, H, T, E)
        mixed = attend(mixer, q, k, v, mask).transpose(1, 2).flatten(2)  # (B, T, H * E)
        count = mixer.global_rows
        return torch.cat((self.everywhere(y, mask), mixed[:, count:]), dim=1) if count else mixed

    def everywhere(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """The global rows, which see all positions by their own projections; (B, S, H * E)."""
        mixer = self.mixer
        q = by_head(self.global_q(y[:, : mixer.global_rows]), mixer.head_dim)  # (B, H, S, E)
        k, v = (by_head(linear(y), mixer.head_dim) for linear in (self.global_k, self.global_v))  # (B, H, T, E)
        seen = None if mask is None else mask.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, seen, scale=mixer.score_scale).transpose(1, 2).flatten(2)


class Taps(nn.Module):
    """What a convolution adds up of each channel: one weight for each of the last positions, oldest first."""

    def __init__(self, kernel: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kernel, width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, u: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); before the first position there is nothing."""
        kernel, width = self.weight.shape
        padded = F.pad(u.transpose(1, 2), (kernel - 1, 0))  # (B, D, T + kernel - 1)
        return F.conv1d(padded, self.weight.T[:, None], self.bias, groups=width).transpose(1, 2)


class ConvolutionHalf(Half):
    """A gated short convolution in the place of attention. Padding at the end is never seen: it looks back only."""

    inputs, output = ("b", "c", "x"), "o"

    def __init__(self, spec: specs.Spec, layer: specs.Layer) -> None:
        super().__init__(spec, layer)
        assert isinstance(layer.mixer, specs.ShortConvolution)
        self.mixer = mixer = layer.mixer
        self.b = nn.Linear(spec.hidden_size, spec.hidden_size, bias=mixer.bias)
        self.c = nn.Linear(spec.hidden_size, spec.hidden_size, bias=mixer.bias)
        self.x = nn.Linear(spec.hidden_size, spec.hidden_size, bias=mixer.bias)
        self.taps = Taps(mixer.kernel, spec.hidden_size, bias=mixer.bias)
        self.o = nn.Linear(spec.hidden_size, spec.hidden_size, bias=mixer.bias)

    def inner(self, y: Tensor, mask: Tensor | None) -> Tensor:
        return cast(Tensor, self.c(y) * self.taps(self.b(y) * self.x(y)))


class FeedForwardHalf(Half):
    output = "down"

    def __init__(self, spec: specs.Spec, layer: specs.Layer) -> None:
        super().__init__(spec, layer)
        feed = layer.feed_forward
        self.activation = ACTIVATIONS[feed.activation]
        self.inputs = ("gate", "up") if feed.gated else ("up",)
        if feed.gated:
            self.gate = nn.Linear(spec.hidden_size, feed.width, bias=feed.bias)
        self.up = nn.Linear(spec.hidden_size, feed.width, bias=feed.bias)
        self.down = nn.Linear(feed.width, spec.hidden_size, bias=feed.bias)

    def inner(self, y: Tensor, mask: Tensor | None) -> Tensor:
        up = cast(Tensor, self.up(y))  # (B, T, F)
        return self.activation(self.gate(y)) * up if len(self.inputs) == 2 else self.activation(up)


class Expert(nn.Module):
    """One feed-forward of a mixture."""

    def __init__(self, spec: specs.Spec, feed: specs.FeedForward) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[feed.activation]
        self.gate = nn.Linear(spec.hidden_size, feed.width, bias=False)
        self.up = nn.Linear(spec.hidden_size, feed.width, bias=False)
        self.down = nn.Linear(feed.width, spec.hidden_size, bias=False)

    def inner(self, y: Tensor) -> Tensor:
        return self.activation(self.gate(y)) * cast(Tensor, self.up(y))  # (N, F)

    def forward(self, y: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.inner(y)))


class ExpertsHalf(Half):
    """A mixture of experts. Its linears see different rows, so it has no `inner` and `project` of its own."""

    experts: nn.ModuleList  # of Expert

    def __init__(self, spec: specs.Spec, layer: specs.Layer) -> None:
        super().__init__(spec, layer)
        feed = layer.feed_forward
        assert feed.experts is not None
        self.mixture = feed.experts
        self.router = nn.Linear(spec.hidden_size, self.mixture.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(spec, feed) for _ in range(self.mixture.num_experts))

    def shares(self, rows: Tensor) -> Tensor:
        """Rows (N, D) -> what the router gives each expert of each (N, X)."""
        return cast(Tensor, self.router(rows)).float().softmax(-1)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, D) -> the experts (N, A) that each goes to and their weights (N, A)."""
        weights, chosen = self.shares(rows).topk(self.mixture.num_active)
        weights = weights / weights.sum(-1, keepdim=True) if self.mixture.normalized else weights
        return chosen, weights.to(rows.dtype)

    def added(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.prepare(x)
        rows = y.flatten(0, -2)  # (N, D)
        chosen, weights = self.route(rows)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            if len(row):
                total = total.index_add(0, row, expert(rows[row]) * weights[row, place, None])
        return total.reshape(y.shape)


class Block(nn.Module):
    def __init__(self, spec: specs.Spec, index: int) -> None:
        super().__init__()
        layer = spec.layers[index]
        self.parallel = layer.norms == "parallel"
        convolves = isinstance(layer.mixer, specs.ShortConvolution)
        self.attention: Half = (ConvolutionHalf if convolves else AttentionHalf)(spec, layer)
        self.ffn: Half = (FeedForwardHalf if layer.feed_forward.experts is None else ExpertsHalf)(spec, layer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.parallel:
            return x + self.attention.added(x, mask) + self.ffn.added(x, mask)
        return cast(Tensor, self.ffn(self.attention(x, mask), mask))


class TokenEmbedding(nn.Module):
    def __init__(self, spec: specs.Spec) -> None:
        super().__init__()
        self.embedding = embedding = spec.embedding
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.prompt: nn.Parameter | None = None  # (N, D): rows of ids past the vocabulary, taken as they are
        if embedding.learned_positions:
            self.positions = nn.Embedding(embedding.learned_positions, spec.hidden_size)
        if embedding.token_types:
            self.types = nn.Embedding(embedding.token_types, spec.hidden_size)
        if embedding.norm:
            self.norm = NormLayer(spec.norm, spec.hidden_size)

    def forward(self, tokens: Tensor, types: Tensor | None = None) -> Tensor:
        x = self._looked_up(tokens)  # (B, T, D)
        if self.embedding.learned_positions:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device) + self.embedding.position_offset)
        if self.embedding.token_types:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        return cast(Tensor, self.norm(x)) if self.embedding.norm else x

    def _looked_up(self, tokens: Tensor) -> Tensor:
        if self.prompt is None:
            return cast(Tensor, self.tokens(tokens)) * self.embedding.scale
        past = tokens - self.tokens.num_embeddings
        own = cast(Tensor, self.tokens(tokens.where(past < 0, 0))) * self.embedding.scale
        return torch.where((past < 0)[..., None], own, self.prompt[past.clamp(min=0)])


class Transform(nn.Linear):
    """BERT's dense + activation + norm in front of the vocabulary."""

    def __init__(self, spec: specs.Spec, activation: specs.Activation) -> None:
        super().__init__(spec.hidden_size, spec.hidden_size)
        self.activation = ACTIVATIONS[activation]
        self.norm = NormLayer(spec.norm, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.activation(super().forward(x))))


class AnswerHead(nn.Module):
    def __init__(self, spec: specs.Spec) -> None:
        super().__init__()
        self.head = head = spec.head
        if head.transform is not None:
            self.transform = Transform(spec, head.transform)
        if head.pooler is not None:
            self.pooler = nn.Linear(spec.hidden_size, spec.hidden_size)
        outputs = len(head.labels) if head.kind == "classify" else spec.vocab_size
        if head.kind != "embed" and not head.tied:
            self.weight = nn.Parameter(torch.empty(outputs, spec.hidden_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if head.bias else None

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """One row of D per sequence: the mean, the last real row, or the first; then the pooler if there is one."""
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)  # (B, T)
        if self.head.pooling == "mean":
            row = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1e-9)
        elif self.head.pooling == "last":
            row = x[torch.arange(len(x), device=x.device), real.sum(1).long() - 1]
        else:
            row = x[:, 0]
        return row if self.head.pooler is None else ACTIVATIONS[self.head.pooler](self.pooler(row))

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the last linear reads: (B, T, D), or (B, D) for a classifier."""
        if self.head.kind == "classify":
            return self.pool(x, mask)
        return cast(Tensor, self.transform(x)) if self.head.transform is not None else x

    def forward(self, x: Tensor, mask: Tensor | None = None, tied: Tensor | None = None) -> Tensor:
        y = self.features(x, mask)
        if self.head.kind == "embed":
            return y
        y = F.linear(y, self.weight if tied is None else tied, self.bias) * self.head.logit_scale
        cap = self.head.soft_cap
        return y if cap is None else cap * torch.tanh(y / cap)


def by_head(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * E) -> (B, H, T, E)."""
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(1, 2)


def rotate(x: Tensor, rope: specs.Rope) -> Tensor:
    """Rotary embedding of rows at positions 0 .. T - 1: the first `dims` of each head, in halves or pairs."""
    cos, sin = (table.to(x.device) for table in _tables(rope, x.shape[-2]))  # (T, dims / 2)
    part, rest = x[..., : rope.dims].float(), x[..., rope.dims :]
    shape = part.shape[:-1]
    pairs = part.reshape(*shape, -1, 2) if rope.interleaved else part.reshape(*shape, 2, -1).transpose(-1, -2)
    a, b = pairs.unbind(-1)  # (B, H, T, dims / 2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.flatten(-2) if rope.interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _tables(rope: specs.Rope, positions: int) -> tuple[Tensor, Tensor]:
    """Kept between calls, so ordinary tensors even if first asked for under inference mode: training uses them too."""
    cos, sin = rope_tables(rope, positions)
    return torch.from_numpy(cos), torch.from_numpy(sin)


def attend(mixer: specs.Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(cap(q k^T * scale)) v over the visible positions; (B, H, T, E) in and out.

    Rows with a window are taken in blocks beside the keys that any of them sees: no T x T scores, so time and memory
    grow with T alone.
    """
    rows = q.shape[-2]
    if mixer.window is None or mixer.window >= rows:
        return weigh(mixer, q, k, v, visible(mixer, rows, mask, q.device))
    parts = []
    for start in range(0, rows, NEAR_ROWS):
        end = min(rows, start + NEAR_ROWS)
        columns = _near(mixer, start, end, rows, q.device)
        seen = _sees(mixer, torch.arange(start, end, device=q.device)[:, None], columns[None, :])[None, None]
        if mask is not None:
            real = mask.bool()[:, None, None, columns]
            seen = seen & (real | (columns == torch.arange(start, end, device=q.device)[:, None]))
        parts.append(weigh(mixer, q[:, :, start:end], k[:, :, columns], v[:, :, columns], seen))
    return torch.cat(parts, dim=2)


def weigh(mixer: specs.Attention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Rows q (B, H, R, E) over the keys and values (B, H, C, E) that `seen` (B or 1, 1, R, C) lets them see."""
    if mixer.soft_cap is None:
        causal = seen is None and mixer.causal
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=mixer.score_scale)
    scores = q @ k.transpose(-1, -2) * mixer.score_scale  # (B, H, R, C)
    scores = mixer.soft_cap * torch.tanh(scores / mixer.soft_cap)
    if seen is None and mixer.causal:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def visible(mixer: specs.Attention, rows: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """True where a row sees a position, (B or 1, 1, T, T); None: plainly causal, or everything."""
    if mask is None and (mixer.window is None or mixer.window >= rows):
        return None
    position = torch.arange(rows, device=device)
    seen = _sees(mixer, position[:, None], position[None, :])[None, None]
    return seen if mask is None else seen & mask.bool()[:, None, None, :]


def _sees(mixer: specs.Attention, row: Tensor, column: Tensor) -> Tensor:
    """Whether the rows at these positions see these columns, padding apart."""
    seen = column <= row if mixer.causal else torch.ones_like(row + column, dtype=torch.bool)
    if mixer.window is None:
        return seen
    near = column > row - mixer.window
    if not mixer.causal:
        near = near & (column < row + mixer.window)
    return seen & (near | (column < mixer.sinks))


def _near(mixer: specs.Attention, start: int, end: int, rows: int, device: torch.device) -> Tensor:
    """The positions that any of rows start .. end - 1 may see: sinks, then a stretch around the rows."""
    assert mixer.window is not None
    first = max(0, start - mixer.window + 1)
    last = end if mixer.causal else min(rows, end + mixer.window - 1)
    stretch = torch.arange(first, last, device=device)
    return torch.cat((torch.arange(min(mixer.sinks, first), device=device), stretch))


def check_experts(feed: specs.FeedForward, where: str) -> None:
    """Refuse mixtures of another kind: with experts for all rows, with biases, or not gated."""
    if feed.experts is None:
        return
    if feed.experts.shared or feed.bias or not feed.gated:
        raise Unsupported(f"experts in {where} are shared, biased or not gated", "Mixtral's and Qwen3's are supported")


def check_convolution(spec: specs.Spec, mixer: specs.ShortConvolution, where: str) -> None:
    """A convolution looks back only, and at few positions."""
    if not spec.causal:
        raise Unsupported(f"a convolution in {where}, which looks both ways", "decoders are supported")
    if not 1 <= mixer.kernel <= specs.MAX_KERNEL:
        raise Unsupported(f"a kernel of {mixer.kernel} in {where}", f"1 to {specs.MAX_KERNEL} are supported")


def check(spec: specs.Spec) -> None:
    """Refuse, by name, what these modules do not compute."""
    for index, layer in enumerate(spec.layers):
        where = f"layer {index} of this {spec.family} model"
        check_experts(layer.feed_forward, where)
        if isinstance(layer.mixer, specs.ShortConvolution):
            check_convolution(spec, layer.mixer, where)
            continue
        if not isinstance(layer.mixer, specs.Attention):
            hint = "attention and short convolutions are supported"
            raise Unsupported(f"{type(layer.mixer).__name__} mixer in {where}", hint)
        if layer.mixer.global_rows and (layer.mixer.rope or layer.mixer.qk_norm or layer.mixer.soft_cap):
            raise Unsupported(
                f"global tokens in {where}", "they are supported with learned positions alone (Longformer)"
            )
        if layer.mixer.rope is not None:
            rope_tables(layer.mixer.rope, 1)

"""Row operations, attention and sampling stated again in NumPy from docs/numerics.md, one rounding at a time.

Independent of the core. The fused multiply-add, Hadamard and rounding to INT8 are those of tests/oracle.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle import fma, hadamard, quantize

F32 = NDArray[np.float32]
LANES = 16
f32 = np.float32


def lanes(x: F32, fill: float = 0.0) -> F32:
    """[n] -> [ceil(n / 16), 16]."""
    return np.pad(x, (0, -len(x) % LANES), constant_values=fill).reshape(-1, LANES).astype(f32)


def tree(x: F32) -> np.float32:
    for d in (8, 4, 2, 1):
        x = x[:d] + x[d : 2 * d]
    return f32(x[0])


def lane_sum(x: F32) -> np.float32:
    total = np.zeros(LANES, f32)
    for line in lanes(x):
        total = total + line
    return tree(total)


def lane_square_sum(x: F32) -> np.float32:
    total = np.zeros(LANES, f32)
    for line in lanes(x):
        total = fma(line, line, total)
    return tree(total)


def scalar(pattern: str) -> np.float32:
    return f32(float.fromhex(pattern))


EXP = ["0x1.41fbb8p-13", "0x1.5f3e54p-10", "0x1.3b2d4cp-7", "0x1.c6aee8p-5", "0x1.ebfbdcp-3", "0x1.62e430p-1", "0x1p0"]


def exp(x: Any) -> F32:
    x = np.asarray(x, f32)
    with np.errstate(all="ignore"):
        n = np.rint(x * scalar("0x1.715476p+0"))
        safe = np.where(np.abs(n) < 200, n, f32(0)).astype(f32)
        f = fma(x, np.full_like(x, scalar("0x1.715476p+0")), -safe)
        f = fma(x, np.full_like(x, scalar("0x1.4ae0c0p-26")), f)
        p = np.full_like(x, scalar(EXP[0]))
        for c in EXP[1:]:
            p = fma(p, f, np.full_like(x, scalar(c)))
        half = np.floor(safe / 2)
        y = p * np.exp2(half).astype(f32) * np.exp2(safe - half).astype(f32)
        y = np.where(x < f32(-87.3), f32(0), np.where(x > f32(88.7), f32(np.inf), y))
        return np.where(np.isnan(x), x, y).astype(f32)


def power_of_half(s: F32, unit: np.float32, m: np.float32) -> NDArray[np.int64]:
    """2 to the power of (s - m) units of e, in units of 2^-15."""
    steps = np.rint((m - s).astype(f32) * f32(unit * scalar("0x1.715476p+11")))
    y = np.minimum(steps, 32768).astype(np.int64)
    f = y % 2048 * 32
    p = np.full_like(f, 1288)
    for c in (7561, 22658, 32767):
        p = c - (f * p >> 16)
    return p >> y // 2048


def tanh(x: Any) -> F32:
    x = np.asarray(x, f32)
    y = f32(1) - f32(2) / (exp(x + x) + f32(1))
    return np.where(np.abs(x) > 9, np.copysign(f32(1), x), y).astype(f32)


# ---- rows ----


def norm(x: F32, gain: F32 | None, bias: F32 | None, epsilon: float, offset: float, centered: bool) -> F32:
    n = f32(len(x))
    if centered:
        x = x - lane_sum(x) / n
    inverse = f32(1) / np.sqrt(lane_square_sum(x) / n + f32(epsilon))
    y: F32 = x * inverse
    if gain is not None:
        y = y * (gain + f32(offset))
    return y if bias is None else y + bias


def rope(x: F32, cosines: F32, sines: F32, interleaved: bool) -> F32:
    """x [heads, head_dim]; cosines and sines [rotary dims / 2] of this position."""
    out, half = x.copy(), len(cosines)
    low = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    high = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[:, low], x[:, high]
    out[:, low] = a * cosines - b * sines
    out[:, high] = b * cosines + a * sines
    return out


# ---- attention ----


def round_to(x: F32, kv_format: str) -> F32:
    """A float as the cache keeps it."""
    if kv_format == "f16":
        return x.astype(np.float16).astype(f32)
    if kv_format == "bf16":
        raw = x.view(np.uint32).astype(np.uint64)
        return (((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint32) << 16).view(f32)
    return x


def head_rotation(head_dim: int) -> int:
    power = min(head_dim & -head_dim, 128)
    return power if power >= 16 else 0


def quantized_heads(x: F32, rotate: bool) -> tuple[NDArray[np.int64], F32]:
    """x [tokens, head_dim] -> integers and scales."""
    block = head_rotation(x.shape[1]) if rotate else 0
    if block:
        x = hadamard(x * f32(1 / np.sqrt(block)), block)
    rows = quantize(np.ascontiguousarray(x))
    return rows.q.astype(np.int64), rows.scale


def visible(position: int, length: int, window: int, sinks: int, causal: bool) -> NDArray[np.int64]:
    j = np.arange(length)
    seen = j <= position if causal else np.ones(length, bool)
    if window:
        near = j > position - window
        if not causal:
            near &= j < position + window
        seen &= near | (j < sinks)
    return np.nonzero(seen)[0]


def attention(q: F32, k: F32, v: F32, seen: NDArray[np.int64], scale: float, cap: float, kv_format: str) -> F32:
    """One query row and head. k and v [positions, head_dim] of its kv head, FP32."""
    head_dim = q.shape[0]
    if kv_format == "int8":
        q8, q_scale = quantized_heads(q[None], True)
        k8, k_scale = quantized_heads(k, True)
        v8, v_scale = quantized_heads(v, False)
    else:
        k, v = round_to(k, kv_format), round_to(v, kv_format)
    m, total, o = f32(0), f32(0), np.zeros(head_dim, f32)
    first = True
    for tile in np.unique(seen // 128):
        j = seen[seen // 128 == tile]
        unit = f32(1)
        if kv_format == "int8":
            s = (k8[j] @ q8[0]).astype(f32) * k_scale[j]
            if cap:
                s = s * q_scale[0]
            else:
                unit = f32(q_scale[0] * f32(scale))
        else:
            s = np.zeros(len(j), f32)
            for d in range(head_dim):
                s = fma(np.full(len(j), q[d], f32), k[j, d], s)
        if cap or kv_format != "int8":
            s = s * f32(scale)
        if cap:
            s = f32(cap) * tanh(s / f32(cap))
        m_t = s.max()
        if kv_format == "int8":
            parts = power_of_half(s, unit, m_t)
            l_t = f32(parts.sum())
            c = v_scale[j].max()
            weights = np.rint(v_scale[j] * (f32(32767) / c)).astype(np.int64)
            u = (parts * weights + 2**14) >> 15
            factor = min(int(np.rint(f32(255 * 32768) / f32(u.max()))) if u.any() else 32767, 32767)
            u8 = np.minimum((u * factor + 2**14) >> 15, 255)
            o_t = (u8 @ v8[j]).astype(f32) * (c * f32(32769) / f32(factor))
        else:
            p = exp(s - m_t)
            in_tile = np.zeros(128, f32)
            in_tile[j % 128] = p
            l_t = lane_sum(in_tile)
            o_t = np.zeros(head_dim, f32)
            for p_j, v_j in zip(p, v[j], strict=True):
                o_t = fma(np.full(head_dim, p_j, f32), v_j, o_t)
        if first:
            m, total, o, first = m_t, l_t, o_t, False
            continue
        top = max(m, m_t)
        a, b = f32(exp((m - top) * unit)), f32(exp((m_t - top) * unit))
        m, total, o = top, f32(total * a + l_t * b), (o * a + o_t * b).astype(f32)
    return (o * (f32(1) / total)).astype(f32)


# ---- sampling ----


def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    c = list(counter)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def gumbel(seed: int, position: int, n: int) -> NDArray[np.float64]:
    words = [w for quad in range(-(-n // 4)) for w in philox(seed, (quad, position & 0xFFFFFFFF, position >> 32, 0))]
    u = (np.array(words[:n], np.uint64) >> 8).astype(np.float64) * 2.0**-24 + 2.0**-25
    return -np.log(-np.log(u))


def modified(
    logits: F32,
    biases: dict[int, float],
    history: list[int],
    num_prompt: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> F32:
    x = logits.copy()
    for token, value in biases.items():
        x[token] += f32(value)
    if not history or (repetition == 1 and presence == 0 and frequency == 0):
        return x
    for token in set(history):
        x[token] = x[token] / f32(repetition) if x[token] > 0 else x[token] * f32(repetition)
        if times := history[num_prompt:].count(token):
            x[token] = (x[token] - f32(presence)) - f32(frequency) * f32(times)
    return x


def allowed(x: F32, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Tokens that may be drawn, best first; x already divided by the temperature."""
    order = sorted((i for i in range(len(x)) if x[i] != -np.inf), key=lambda i: (-x[i], i))
    if top_k:
        order = order[:top_k]
    weights = np.exp(x[order].astype(np.float64) - float(x.max()))
    if top_p < 1:
        enough = int(np.searchsorted(np.cumsum(weights), np.float64(f32(top_p)) * weights.sum())) + 1
        order, weights = order[:enough], weights[:enough]
    kept = 1 + int(np.count_nonzero(weights[1:] >= np.float64(f32(min_p)))) if min_p else len(order)
    return order[:kept]

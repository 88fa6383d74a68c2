"""Whole programs: the same bytes however a step is made up, scores, sequences that fail alone, and every refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.native.harness import (
    ACTIVATE,
    ADD,
    ATTENTION,
    BF16_ROWS,
    EMBED,
    F32,
    GATHER,
    HEAD,
    ISAS,
    LINEAR,
    NORM,
    ROPE,
    SCALE,
    STORE,
    TRANSFORM,
    Batch,
    Builder,
    Cache,
    CoreError,
    Program,
    Tensor,
    isa,
    packed,
    pages_for,
    plain,
)

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 211, 128, 4, 2, 32, 192, 2


def model(
    weights: str, cache: Cache, threads: int = 1, poison: int = -1, head_rows: int = 3, *, whole: bool = False
) -> Program:
    """A small decoder. INT8 and INT4 weights get quantized inputs.

    Args:
        poison: a token whose embedding is NaN.
        whole: the last layer is computed of every row, and not of output rows alone once its keys are stored.
    """
    rng = np.random.default_rng(5)
    b = Builder()
    integer = weights in ("int8", "int4")

    def matrix(rows: int, columns: int) -> int:
        return b.tensor(packed(weights, (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)))

    def vector(n: int) -> int:
        return b.tensor(plain((1 + 0.1 * rng.standard_normal(n)).astype(np.float32)))

    def normed(x: int) -> int:
        return b.op(NORM, [x], b.register(WIDTH), [vector(WIDTH)], [0, 0], [1e-5])

    def ready(x: int, width: int) -> int:
        if not integer:
            return x
        return b.op(TRANSFORM, [x], b.register(width, True), [vector(width)], [64 if width % 128 else 128])

    def linear(x: int, rows: int, columns: int, out: int | None = None) -> int:
        target = b.register(rows) if out is None else out
        return b.op(LINEAR, [x], target, [matrix(rows, columns)], [int(out is not None), 0])

    embedding = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    if poison >= 0:
        embedding[poison, 3] = np.nan
    angles = np.outer(np.arange(512), 100.0 ** (-np.arange(HEAD_DIM // 2) / HEAD_DIM))
    cosines, sines = (b.tensor(plain(f(angles).astype(np.float32))) for f in (np.cos, np.sin))
    x = b.table(embedding)
    for layer in range(LAYERS):
        h = ready(normed(x), WIDTH)
        q, k = linear(h, HEADS * HEAD_DIM, WIDTH), linear(h, KV_HEADS * HEAD_DIM, WIDTH)
        v = linear(h, KV_HEADS * HEAD_DIM, WIDTH)
        for register, heads in ((q, HEADS), (k, KV_HEADS)):
            b.op(ROPE, [register], register, [cosines, sines], [heads, HEAD_DIM, HEAD_DIM])
        a = b.register(HEADS * HEAD_DIM)
        b.op(STORE, [k, v], -1, i=[layer])
        if layer == LAYERS - 1 and not whole:
            b.op(GATHER, [x, q], -1)
        b.op(ATTENTION, [q], a, [], [layer, HEADS, KV_HEADS, HEAD_DIM, 0, 0, 1], [HEAD_DIM**-0.5, 0.0])
        linear(ready(a, WIDTH), WIDTH, HEADS * HEAD_DIM, x)
        h = ready(normed(x), WIDTH)
        gate, up = linear(h, INNER, WIDTH), linear(h, INNER, WIDTH)
        b.op(ACTIVATE, [gate, up], gate, i=[0])
        linear(ready(gate, INNER), WIDTH, INNER, x)
    last = b.gather(x) if whole else b.head(x)
    logits = linear(ready(normed(last), WIDTH), VOCABULARY, WIDTH)
    b.op(SCALE, [logits], logits, f=[1.0, 20.0])
    return b.build(cache, threads, max_rows=300, head_rows=head_rows)


def cache_for(kv_format: str = "f16", pages: int = 16) -> Cache:
    return Cache([(KV_HEADS, HEAD_DIM, kv_format)] * LAYERS, pages)


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCABULARY - 1, n)]


def run(program: Program, tokens: list[int], chunk: int, pages: list[int]) -> F32:
    outputs = []
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        result, out = program.step(Batch([(part, at, at + len(part), pages)]))
        assert result == 0
        outputs.append(out)
    return np.concatenate(outputs)


@pytest.mark.parametrize("kv_format", ["f16", "int8"])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_the_same_bytes_for_every_chunk_thread_and_instruction_set(weights: str, kv_format: str) -> None:
    tokens = tokens_of(260)
    base = run(model(weights, cache_for(kv_format)), tokens, 260, [0, 1, 2]).tobytes()
    for chunk, threads in ((1, 1), (7, 2), (128, 4), (260, 2)):
        got = run(model(weights, cache_for(kv_format), threads), tokens, chunk, [5, 3, 9])
        assert got.tobytes() == base, (chunk, threads)
    for name in ISAS:
        with isa(name):
            got = run(model(weights, cache_for(kv_format), 2), tokens, 100, [0, 1, 2])
        assert got.tobytes() == base, name


@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_batch_mix_and_output_rows_change_nothing(weights: str) -> None:
    cache = cache_for()
    alone = model(weights, cache)
    lengths = (1, 40, 129)
    sequences = [(tokens_of(n, n), pages_for(n, 4 * i)) for i, n in enumerate(lengths)]
    want = [run(alone, tokens, 300, pages) for tokens, pages in sequences]
    together = model(weights, cache_for(), 2, head_rows=5)
    rows = [0, 1, 20, 40, 41, 100, 169]
    _, got = together.step(Batch([(t, 0, len(t), p) for t, p in sequences], output_rows=rows))
    assert got.tobytes() == np.concatenate(want)[rows].tobytes()
    result, nothing = together.step(Batch([(sequences[1][0], 0, 40, [4])], output_rows=[]))
    assert result == 0 and nothing.shape == (0, VOCABULARY)


@pytest.mark.parametrize("kv_format", ["f16", "int8"])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_the_end_of_the_last_layer_takes_output_rows_alone(weights: str, kv_format: str) -> None:
    """Any choice of output rows has the bytes that it has where all rows go through all layers."""
    rng = np.random.default_rng(3)
    lengths = (1, 40, 129, 30)
    parts = [(tokens_of(n, n), 0, n, pages_for(n, 4 * i)) for i, n in enumerate(lengths)]
    _, want = model(weights, cache_for(kv_format), whole=True).step(Batch(parts))
    chosen = [range(200), [199], [0, 40, 169, 199], [39, 41], sorted(rng.choice(200, 90, replace=False))]
    for name in ISAS:
        with isa(name):
            for threads, rows in enumerate(chosen, 1):
                program = model(weights, cache_for(kv_format), threads, head_rows=7)
                result, got = program.step(Batch(parts, output_rows=list(rows)))
                assert result == 0 and got.tobytes() == want[rows].tobytes(), (name, threads)


def test_what_gather_does_not_keep_is_gone() -> None:
    b = Builder()
    x, y = start(b), start(b)
    b.op(GATHER, [x], -1)
    b.head(b.op(ADD, [x, y], b.register(64), f=[1.0]))
    with pytest.raises(CoreError, match=r"in1 \(register 1\) is read before column 0 is written"):
        b.build()


def test_head_rows_change_nothing() -> None:
    tokens = tokens_of(50)
    results = {run(model("int8", cache_for(), 2, head_rows=n), tokens, 50, [0]).tobytes() for n in (1, 7, 64)}
    assert len(results) == 1


@pytest.mark.parametrize("name", ISAS)
def test_score_is_the_log_softmax_of_step(name: str) -> None:
    with isa(name):
        program, tokens = model("int4", cache_for(), 2), tokens_of(60)
        batch = Batch([(tokens, 0, 60, [0])])
        _, logits = program.step(batch)
        targets = np.asarray([*tokens[1:], 0], np.int32)
        result, log_probability, top1 = program.score(batch, targets)
    wide = logits.astype(np.float64)
    want = wide - wide.max(axis=1, keepdims=True)
    want -= np.log(np.exp(want).sum(axis=1, keepdims=True))
    assert result == 0
    assert np.abs(log_probability - want[np.arange(60), targets]).max() < 2e-6
    assert (top1 == logits.argmax(axis=1)).all()


@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_nan_ends_only_its_sequence(weights: str) -> None:
    bad_token = VOCABULARY - 1
    clean, poisoned = model(weights, cache_for()), model(weights, cache_for(), 2, poison=bad_token)
    a, b, c = tokens_of(20, 1), tokens_of(9, 2), tokens_of(30, 3)
    b[4] = bad_token
    want = [run(clean, t, 100, [i]) for i, t in enumerate((a, b, c))]
    batch = Batch([(a, 0, 20, [0]), (b, 0, 9, [1]), (c, 0, 30, [2])])
    result, got = poisoned.step(batch)
    assert result == 1 + 20 + 4
    assert got[:20].tobytes() == want[0].tobytes()
    assert got[29:].tobytes() == want[2].tobytes()
    assert np.isnan(got[20:29]).all()
    result, log_probability, top1 = poisoned.score(batch, np.zeros(59, np.int32))
    assert result == 1 + 20 + 4
    assert np.isnan(log_probability[20:29]).all() and (top1[20:29] == -1).all()
    assert np.isfinite(log_probability[:20]).all() and np.isfinite(log_probability[29:]).all()
    result, got = poisoned.step(Batch([(a, 0, 20, [0])]))
    assert result == 0 and got.tobytes() == want[0].tobytes()


def test_registers_may_be_written_in_parts() -> None:
    """Two products side by side in one register, and one that adds onto the second."""
    rng = np.random.default_rng(0)
    x, w, v = (rng.standard_normal(s).astype(np.float32) for s in ((30, 64), (37, 64), (24, 64)))
    bias = rng.standard_normal(24).astype(np.float32)
    b = Builder()
    source, out = b.table(x), b.register(61)
    b.op(LINEAR, [source], out, [b.tensor(packed("f32", w))], [0, 0])
    b.op(LINEAR, [source], out, [b.tensor(packed("f32", v)), b.tensor(plain(bias))], [0, 37])
    b.op(LINEAR, [source], out, [b.tensor(packed("f32", v))], [1, 37])
    b.gather(out)
    for threads in (1, 4):
        _, got = b.build(threads=threads).step(Batch([(range(30), 0, 30, [])]))
        assert np.allclose(got, np.concatenate([x @ w.T, 2 * (x @ v.T) + bias], axis=1), atol=1e-4)


def test_arena_and_page_bytes() -> None:
    cache = cache_for("int8", 3)
    assert cache.page_bytes == LAYERS * KV_HEADS * (8 * (64 + 16 * HEAD_DIM) + 512 + 128 * HEAD_DIM)
    small, large = model("int8", cache, head_rows=1), model("int8", cache, head_rows=100)
    assert 0 < small.arena_bytes < large.arena_bytes


# ---- refusals ----


def weight(rows: int = 64, columns: int = 64, kind: str = "f32") -> Tensor:
    return packed(kind, np.ones((rows, columns), np.float32))


def changed(tensor: Tensor, **fields: int) -> Tensor:
    return Tensor(tensor.data, **{**{k: getattr(tensor, k) for k in ("format", "rows", "columns")}, **fields})


def start(b: Builder, width: int = 64) -> int:
    return b.table(np.ones((4, width), np.float32))


def refuse_linear(x: int, out: int, tensor: Tensor, i: list[int]) -> Callable[[Builder], None]:
    def make(b: Builder) -> None:
        start(b)
        b.op(LINEAR, [x], b.register(out), [b.tensor(tensor)], i)

    return make


def refuse_op(kind: int, out: int | None = None, **arguments: list[float]) -> Callable[[Builder], None]:
    """An operation on a register of 64 columns that is otherwise in place or into `out` columns."""

    def make(b: Builder) -> None:
        x = start(b)
        tensors = [b.tensor(plain(np.ones(int(n), np.float32))) for n in arguments.get("vectors", [])]
        i = [int(n) for n in arguments.get("i", [])]
        b.op(kind, [x], x if out is None else b.register(out), tensors, i, arguments.get("f", []))

    return make


def refuse_attention(
    i: list[int], widths: tuple[int, int, int, int] = (64, 32, 32, 64), out: int | None = None
) -> Callable[[Builder], None]:
    def make(b: Builder) -> None:
        q, k, v = (start(b, w) for w in widths[:3])
        b.attention(q, k, v, b.register(widths[3]) if out is None else out, i, [1.0, 0.0])

    return make


def two_stores(b: Builder) -> None:
    for _ in range(2):
        refuse_attention([0, 4, 2, 16, 0, 0, 1])(b)


def two_attentions(b: Builder) -> None:
    refuse_attention([0, 4, 2, 16, 0, 0, 1])(b)
    b.op(ATTENTION, [0], b.register(64), [], [0, 4, 2, 16, 0, 0, 1], [1.0, 0.0])


def nothing_stored(b: Builder) -> None:
    b.op(ATTENTION, [start(b)], b.register(64), [], [0, 4, 2, 16, 0, 0, 1], [1.0, 0.0])


def stored_into_a_register(b: Builder) -> None:
    k = start(b, 32)
    b.op(STORE, [k, k], k, i=[0])


def unaligned(b: Builder) -> None:
    x = start(b)
    shifted = b.tensor(weight())
    b.tensors[shifted].data = b.tensors[shifted].data[4:]
    b.op(LINEAR, [x], b.register(64), [shifted])


def unwritten(b: Builder) -> None:
    b.op(ADD, [b.register(64), start(b)], b.register(64), f=[1.0])


def half_written(b: Builder) -> None:
    out = b.register(64)
    b.op(LINEAR, [start(b)], out, [b.tensor(weight(32))])
    b.op(SCALE, [out], out, f=[1.0, 0.0])


def quantized_into_float_matrix(b: Builder) -> None:
    q = b.op(TRANSFORM, [start(b)], b.register(64, True))
    b.op(LINEAR, [q], b.register(64), [b.tensor(weight())])


def bf16_into(weights: Tensor, width: int = 64) -> Callable[[Builder], None]:
    def make(b: Builder) -> None:
        b.op(LINEAR, [b.op(TRANSFORM, [start(b)], b.register(width, BF16_ROWS))], b.register(64), [b.tensor(weights)])

    return make


def bf16_added(b: Builder) -> None:
    half = b.op(TRANSFORM, [start(b)], b.register(64, BF16_ROWS))
    b.op(ADD, [half, half], b.register(64), f=[1.0])


def quantized_norm(b: Builder) -> None:
    q = b.op(TRANSFORM, [start(b)], b.register(64, True))
    b.op(NORM, [q], b.register(64), f=[1e-5])


REFUSALS: list[tuple[Callable[[Builder], None], str]] = [
    (refuse_op(42), r"op 1 \(unknown\): kind 42"),
    (refuse_linear(7, 64, weight(), []), r"in0 is register 7 of 3"),
    (refuse_linear(0, 64, weight(64, 32), []), r"op 1 \(linear\): in0 has 64 columns, tensor 1 has 32"),
    (refuse_linear(0, 48, weight(), []), r"has 64 rows: they do not fit in out at column 0 of 48"),
    (refuse_linear(0, 100, weight(), [0, 37]), r"do not fit in out at column 37 of 100"),
    (refuse_linear(0, 100, weight(), [0, -1]), r"do not fit in out at column -1"),
    (refuse_linear(0, 64, weight(), [2]), r"i0 is 2"),
    (refuse_linear(0, 64, changed(weight(), rows=80), []), r"bytes: packed it must have"),
    (refuse_linear(0, 64, changed(weight(), format=9), []), r"format 9"),
    (refuse_linear(0, 64, changed(weight(64, 64, "int4"), group_size=48), []), r"groups of 48"),
    (refuse_linear(0, 64, changed(weight(64, 64, "int8"), columns=60), []), r"integer matrix of 60 columns"),
    (quantized_into_float_matrix, r"quantized, but tensor 1 is a float matrix"),
    (quantized_norm, r"in0 \(register 1\) is quantized"),
    (bf16_into(weight()), r"in0 \(register 1\) is BF16, but tensor 1 is not"),
    (bf16_into(weight(64, 64, "int8")), r"is BF16, but tensor 1 is not"),
    (bf16_into(weight(64, 128, "bf16")), r"in0 has 64 columns, tensor 1 has 128"),
    (bf16_into(weight(64, 64, "bf16"), 96), r"register 1: the width of a rounded register must be a multiple of 64"),
    (bf16_added, r"in1 \(register 1\) is BF16"),
    (unaligned, r"not 64-byte aligned"),
    (unwritten, r"in0 \(register 0\) is read before column 0 is written"),
    (half_written, r"read before column 32 is written"),
    (refuse_op(NORM, vectors=[32], f=[1e-5]), r"the gain \(tensor 1\) is 1 x 32: it must be 1 x 64"),
    (refuse_op(NORM, i=[0, 48], f=[1e-5]), r"segments of 48 do not divide 64"),
    (refuse_op(NORM, 32, f=[1e-5]), r"in0 has 64 columns, out has 32"),
    (refuse_op(NORM, i=[3], f=[1e-5]), r"i0 is 3"),
    (refuse_op(TRANSFORM), r"in0 and out are both register 0"),
    (refuse_op(TRANSFORM, 128), r"in0 has 64 columns, out has 128"),
    (refuse_op(TRANSFORM, 65, i=[64]), r"blocks of 64 do not divide 65"),
    (refuse_op(TRANSFORM, 64, i=[32]), r"blocks of 64 or 128"),
    (refuse_op(TRANSFORM, 64, f=[-1.0]), r"the scale is -1"),
    (refuse_op(TRANSFORM, 64, f=[float("inf")]), r"the scale is inf"),
    (refuse_op(TRANSFORM, 64, f=[float("nan")]), r"the scale is -?nan"),
    (refuse_op(TRANSFORM, 64, f=[0.5]), r"a scale, but out \(register 1\) is float"),
    (refuse_op(ROPE, vectors=[16, 16], i=[2, 16, 16]), r"2 heads of 16 are not 64 columns"),
    (refuse_op(ROPE, vectors=[16, 16], i=[2, 32, 33]), r"33 rotary dims of 32"),
    (refuse_op(ROPE, vectors=[16, 8], i=[2, 32, 32]), r"the sines"),
    (refuse_op(ROPE, 64, vectors=[16, 16], i=[2, 32, 32]), r"works in place"),
    (refuse_op(ACTIVATE, i=[6]), r"no such activation"),
    (refuse_op(ADD), r"in1 is register -1"),
    (refuse_op(EMBED), r"tensor\[0\] is tensor -1"),
    (refuse_attention([3, 4, 2, 16, 0, 0, 1]), r"cache layer 3 of 2"),
    (refuse_attention([0, 4, 2, 8, 0, 0, 1]), r"cache layer 0 has 2 kv heads of 16, not 2 of 8"),
    (refuse_attention([0, 3, 2, 16, 0, 0, 1]), r"3 heads over 2 kv heads"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 1], (32, 32, 32, 64)), r"in0 has 32 columns, not 64"),
    (refuse_attention([0, 4 + 2**28, 2, 16, 0, 0, 1]), r"in0 has 64 columns, not 4294967360"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 1], (64, 32, 64, 64)), r"op 3 \(store\): in1 has 64 columns, not 32"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 1], out=0), r"in0 and out are both register 0"),
    (refuse_attention([0, 4, 2, 16, 0, 4, 1]), r"sinks need a window"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 7]), r"i6 is 7"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 0, -1]), r"-1 rows"),
    (refuse_attention([0, 4, 2, 16, 0, 0, 0, 1]), r"out"),
    (two_stores, r"op \d+ \(store\): cache layer 0 is another op's too"),
    (two_attentions, r"op \d+ \(attention\): cache layer 0 is another op's too"),
    (nothing_stored, r"nothing was stored in cache layer 0"),
    (stored_into_a_register, r"out is register 0: it writes none"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refused_programs(make: Callable[[Builder], None], message: str) -> None:
    b = Builder()
    make(b)
    b.gather(0)
    with pytest.raises(CoreError, match=message):
        b.build(Cache([(2, 16, "f32")] * 2, 1))


def test_refused_structures() -> None:
    def build(*kinds: str, max_rows: int = 8, head_rows: int = 8) -> Program:
        b = Builder()
        x = start(b)
        for kind in kinds:
            if kind == "gather":
                b.op(GATHER, [x], -1)
            elif kind == "elsewhere":
                b.op(GATHER, [x], b.register(64))
            elif kind == "store":
                b.op(STORE, [x, x], -1, i=[0])
            elif kind == "same":
                b.op(HEAD, [x], x)
            elif kind == "late":
                b.op(SCALE, [x], b.register(64), f=[1.0, 0.0])
            else:
                b.head(x)
        return b.build(max_rows=max_rows, head_rows=head_rows)

    for arguments, message in (
        ((), "no gather"),
        (("head",), "no gather"),
        (("gather",), "no head"),
        (("gather", "gather", "head"), "ops 1 and 2 are both gather"),
        (("gather", "head", "head"), "ops 2 and 3 are both head"),
        (("head", "gather"), "gather.*: it must come before head"),
        (("gather", "store", "head"), r"op 2 \(store\): it must come before gather"),
        (("elsewhere", "head"), "out is register 1: it works in place"),
        (("gather", "same"), "register 0 is used on both sides of head"),
        (("gather", "head", "late"), "register 0 is used on both sides of head"),
    ):
        with pytest.raises(CoreError, match=message):
            build(*arguments)
    for rows in (0, 1 << 20):
        with pytest.raises(CoreError, match="max_rows"):
            build("gather", "head", max_rows=rows)
        with pytest.raises(CoreError, match="head_rows"):
            build("gather", "head", head_rows=rows)
    b = Builder()
    b.registers.append((60, 1))
    start(b)
    b.gather(1)
    with pytest.raises(CoreError, match="multiple of 64"):
        b.build()
    b = Builder()
    refuse_attention([0, 4, 2, 16, 0, 0, 1])(b)
    b.gather(0)
    with pytest.raises(CoreError, match="no cache"):
        b.build()
    b = Builder()
    last = start(b)
    out = b.gather(last)
    b.op(ROPE, [out], out, [0, 0], [2, 32, 32])
    with pytest.raises(CoreError, match="before head"):
        b.build()
    with pytest.raises(CoreError, match="needs operations"):
        Builder().build()


def test_refused_batches() -> None:
    program = model("f32", cache_for("f32", 4))

    def refuse(message: str, batch: Batch, **fields: object) -> None:
        for name, value in fields.items():
            setattr(batch, name, value if isinstance(value, int) else np.asarray(value, np.int32))
        with pytest.raises(CoreError, match=message):
            program.step(batch)

    def batch() -> Batch:
        return Batch([([1, 2, 3], 0, 3, [0]), ([4, 5], 10, 12, [1])])

    refuse("a batch of 301 rows", Batch([([0] * 301, 0, 301, [0, 1, 2])]))
    refuse("row 1: token 211 of 211", batch(), tokens=[0, 211, 0, 0, 0])
    refuse("row 0: token -1", batch(), tokens=[-1, 0, 0, 0, 0])
    refuse("row 2: position 3 of a sequence of length 3", batch(), positions=[0, 1, 3, 10, 11])
    refuse("row 2: position 1 does not come after position 1", batch(), positions=[0, 1, 1, 10, 11])
    refuse("row 0: position -1", batch(), positions=[-1, 1, 2, 10, 11])
    refuse("row 3: sequence 2 of 2", batch(), sequences=[0, 0, 0, 2, 2])
    refuse("row 3: sequence 0 comes after sequence 1", batch(), sequences=[1, 1, 1, 0, 0], positions=[0, 1, 2, 0, 1])
    refuse("sequence 1: entry 0 is page 4 of 4", batch(), page_tables=[[0], [4]])
    refuse("sequence 0: entry 0 is page -1", batch(), page_tables=[[-1], [1]])
    refuse("length 200 does not fit in 1 pages", batch(), lengths=[200, 12])
    refuse("output 0: row 5 of 5", batch(), output_rows=[5])
    refuse("output 1: row 2 does not come after row 2", batch(), output_rows=[2, 2])
    refuse("rotary position 511|512 of 512", Batch([([1], 512, 513, [0, 1, 2, 3, 0])]))
    with pytest.raises(CoreError, match="target 0 is token 211 of 211"):
        program.score(batch(), np.full(5, 211, np.int32))
    result, _ = program.step(batch())
    assert result == 0


def test_refused_caches() -> None:
    for layers, message in (
        ([], "at least one layer"),
        ([(1, 8, "int4")], "format 4"),
        ([(0, 8, "f32")], "0 kv heads"),
        ([(1, 0, "f32")], "head_dim is 0"),
        ([(1, 513, "f32")], "head_dim is 513"),
    ):
        with pytest.raises(CoreError, match=message):
            Cache(layers, 1)
    with pytest.raises(CoreError, match="cannot map 1717986919 pages"):  # their bytes are more than 64 bits count
        Cache([(4096, 512, "f32")] * 5, 1717986919)
    with pytest.raises(CoreError, match="at least one page"):
        Cache([(1, 8, "f32")], 0)
    with pytest.raises(CoreError, match="page 2 of 2"):
        Cache([(1, 8, "f32")], 2).copy_page(0, 2)

// What happens to a linear's input: a multiplier per column, a block Hadamard transform, and rounding to INT8 or BF16.
//
// A block of up to 128 columns lives in registers from the load to the store, so the form that finds its own scale
// simply computes it twice (once for the row's largest magnitude, once to round) instead of keeping a row of FP32.
#pragma once

template <int vectors>
struct Columns {
  F32 v[vectors];
};

// Columns [at, at + 16) of a row of `width`; zero beyond it.
LANES F32 load_columns(const float* row, int at, int width) {
  const int left = width - at;
  if (left >= kLanes) return load(row + at);
  return left > 0 ? load_partial(row + at, left) : set1(0.0f);
}

LANES void store_columns(float* row, F32 x, int at, int width) {
  const int left = width - at;
  if (left >= kLanes) return store(row + at, x);
  if (left > 0) store_partial(row + at, x, left);
}

template <int d>
struct ButterflySigns {
  float v[kLanes] = {};
  constexpr ButterflySigns() {
    for (int i = 0; i < kLanes; ++i) v[i] = i & d ? -1.0f : 1.0f;
  }
};

// One stage inside a vector: lane i and lane i + d become their sum and difference. Multiplying by a sign is exact, so
// the fused operation rounds as a sum does.
template <int d>
LANES F32 butterfly(F32 x) {
  static constexpr ButterflySigns<d> kSigns;
  return fma(x, load(kSigns.v), swap<d>(x));
}

// The unnormalized Sylvester Hadamard transform of 16 * vectors columns, distances ascending.
template <int vectors>
LANES void hadamard(Columns<vectors>& x) {
  for (F32& v : x.v) v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
  for (int d = 1; d < vectors; d *= 2) {
    for (int i = 0; i < vectors; ++i) {
      if (i & d) continue;
      const F32 a = x.v[i], b = x.v[i + d];
      x.v[i] = add(a, b);
      x.v[i + d] = sub(a, b);
    }
  }
}

template <int vectors>
inline void hadamard_blocks(float* row, int width) {
  for (int at = 0; at < width; at += kLanes * vectors) {
    Columns<vectors> x;
    for (int i = 0; i < vectors; ++i) x.v[i] = load(row + at + kLanes * i);
    hadamard(x);
    for (int i = 0; i < vectors; ++i) store(row + at + kLanes * i, x.v[i]);
  }
}

// In place over a row whose width is a multiple of `block`: 16, 32, 64 or 128; 0 does nothing.
inline void hadamard_row(float* row, int width, int block) {
  if (block == 16) hadamard_blocks<1>(row, width);
  if (block == 32) hadamard_blocks<2>(row, width);
  if (block == 64) hadamard_blocks<4>(row, width);
  if (block == 128) hadamard_blocks<8>(row, width);
}

// ---- rounding to INT8 ----

// absmax / 127, or 1 where that is 0, and what a value is multiplied by in its place. A row with Inf or NaN is flagged
// by the caller and only has to stay harmless.
struct RowScale {
  float scale, inverse;
  bool finite;
};

// x, not negative, or the largest number where that is too large.
LANES float bounded(float x) { return x < __FLT_MAX__ ? x : __FLT_MAX__; }

// Collects what the scale of a row depends on: the largest magnitude, whose bits order as integers do, those of Inf and
// NaN above all others.
struct Magnitude {
  I32 largest = set1(0);
  LANES void see(F32 x) { largest = max(bit_and(as_int(x), set1(INT32_MAX)), largest); }
  LANES RowScale scale() const {
    constexpr int kInfinite = 0x7f800000;
    const int bits = reduce_max(largest);
    if (bits >= kInfinite) return {1.0f, 1.0f, false};
    float absmax;
    __builtin_memcpy(&absmax, &bits, sizeof absmax);
    const float scale = absmax / 127.0f;
    return {scale > 0 ? scale : 1.0f, bounded(127.0f / absmax), true};
  }
};

// 64 columns as bytes. With a row's own scale nothing lies beyond 127; with a given one what does is cut to it.
template <bool cut>
LANES void round_columns(const F32* x, F32 inverse, int8_t* q) {
  I32 rounded[4];
  for (int i = 0; i < 4; ++i) {
    F32 y = mul(x[i], inverse);
    if constexpr (cut) y = min(max(y, set1(-127.0f)), set1(127.0f));
    rounded[i] = to_int(y);
  }
  store_s8(q, rounded[0], rounded[1], rounded[2], rounded[3]);
}

// One row of FP32 (width a multiple of 64) to INT8. False: it has Inf or NaN.
inline bool quantize_row(const float* row, int width, int8_t* q, float* scale) {
  Magnitude magnitude;
  for (int at = 0; at < width; at += kLanes) magnitude.see(load(row + at));
  const RowScale found = magnitude.scale();
  *scale = found.scale;
  for (int at = 0; at < width; at += 4 * kLanes) {
    const F32 x[4] = {load(row + at), load(row + at + kLanes), load(row + at + 2 * kLanes),
                      load(row + at + 3 * kLanes)};
    round_columns<false>(x, set1(found.inverse), q + at);
  }
  return found.finite;
}

// ---- the operation ----

template <int vectors, bool rotate>
LANES Columns<vectors> transformed(const TransformTask& task, const float* row, int at) {
  Columns<vectors> x;
  for (int i = 0; i < vectors; ++i) {
    const int column = at + kLanes * i;
    x.v[i] = load_columns(row, column, task.input_width);
    if (task.multiplier) x.v[i] = mul(x.v[i], load_columns(task.multiplier, column, task.input_width));
  }
  if constexpr (rotate) hadamard(x);
  return x;
}

template <int vectors, bool rotate>
inline bool transform_row(const TransformTask& task, int m) {
  const float* row = task.input.row(m);
  float* out = task.output.row(m);
  Magnitude magnitude;
  for (int at = 0; at < task.width; at += kLanes * vectors) {
    const Columns<vectors> x = transformed<vectors, rotate>(task, row, at);
    for (int i = 0; i < vectors; ++i) {
      magnitude.see(x.v[i]);
      store_columns(out, x.v[i], at + kLanes * i, task.width);
    }
  }
  return magnitude.scale().finite;
}

// A rotated row is kept for its second pass where it is short enough to stay in the first cache.
constexpr int kStagedColumns = 8192;

template <int vectors, bool rotate>
inline Magnitude transformed_magnitude(const TransformTask& task, const float* row, float* staged) {
  Magnitude magnitude;
  for (int at = 0; at < task.width; at += kLanes * vectors) {
    const Columns<vectors> x = transformed<vectors, rotate>(task, row, at);
    for (int i = 0; i < vectors; ++i) magnitude.see(x.v[i]);
    for (int i = 0; staged && i < vectors; ++i) store(staged + at + kLanes * i, x.v[i]);
  }
  return magnitude;
}

template <int vectors, bool rotate>
LANES Columns<vectors> transformed_before(const TransformTask& task, const float* row, const float* staged, int at) {
  if (!staged) return transformed<vectors, rotate>(task, row, at);
  Columns<vectors> x;
  for (int i = 0; i < vectors; ++i) x.v[i] = load(staged + at + kLanes * i);
  return x;
}

// Magnitudes below their column's threshold become 0.
template <int vectors>
LANES void cut(Columns<vectors>& x, const float* threshold) {
  for (int i = 0; i < vectors; ++i)
    x.v[i] = select(less(abs(x.v[i]), load(threshold + kLanes * i)), set1(0.0f), x.v[i]);
}

// With a scale that is known before, one pass looks for Inf and NaN and rounds at once.
template <int vectors, bool rotate, bool given>
inline bool quantize_transformed_row(const TransformTask& task, int m) {
  const float* row = task.input.row(m);
  Magnitude magnitude;
  alignas(64) float memory[rotate ? kStagedColumns : kLanes];
  float* staged = rotate && !given && task.width <= kStagedColumns ? memory : nullptr;
  RowScale found{task.step, bounded(1.0f / task.step), true};
  if constexpr (!given) found = transformed_magnitude<vectors, rotate>(task, row, staged).scale();
  const QuantRows& out = task.quant;
  int8_t* q = out.row(m);
  int32_t* sums = out.row_sums(m);
  out.scale[m] = found.scale;
  const F32 inverse = set1(found.inverse);
  for (int at = 0; at < task.width; at += kLanes * vectors) {
    Columns<vectors> x = transformed_before<vectors, rotate>(task, row, staged, at);
    for (int i = 0; given && i < vectors; ++i) magnitude.see(x.v[i]);
    if (task.threshold) cut(x, task.threshold + at);
    for (int i = 0; i < vectors; i += 4) {
      const int column = at + kLanes * i;
      round_columns<given>(x.v + i, inverse, q + column);
      sum_bytes(q + column, sums + column / kSumColumns);
    }
  }
  return given ? magnitude.scale().finite : found.finite;
}

// To BF16: a magnitude below 2^-56 becomes 0, and a product of two such numbers, or a sum of such products, is never
// subnormal: they are all multiples of 2^-126.
LANES void round_half(F32 x, uint16_t* out) { store_bf16(out, select(less(abs(x), set1(0x1p-56f)), set1(0.0f), x)); }

template <int vectors, bool rotate>
inline bool halve_row(const TransformTask& task, int m) {
  const float* row = task.input.row(m);
  uint16_t* out = task.halves.row(m);
  Magnitude magnitude;
  for (int at = 0; at < task.width; at += kLanes * vectors) {
    const Columns<vectors> x = transformed<vectors, rotate>(task, row, at);
    for (int i = 0; i < vectors; ++i) {
      magnitude.see(x.v[i]);
      round_half(x.v[i], out + at + kLanes * i);
    }
  }
  return magnitude.scale().finite;
}

template <int vectors, bool rotate>
inline void transform_rows(const TransformTask& task, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const bool finite = task.halves.data  ? halve_row<vectors, rotate>(task, m)
                        : !task.quantized ? transform_row<vectors, rotate>(task, m)
                        : task.step > 0   ? quantize_transformed_row<vectors, rotate, true>(task, m)
                                          : quantize_transformed_row<vectors, rotate, false>(task, m);
    if (!finite && task.not_finite) task.not_finite[m] = 1;
  }
}

inline void transform(const TransformTask& task, int m0, int m1) {
  if (task.rotate_block == 128) return transform_rows<8, true>(task, m0, m1);
  if (task.rotate_block == 64) return transform_rows<4, true>(task, m0, m1);
  transform_rows<4, false>(task, m0, m1);
}

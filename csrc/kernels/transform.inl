// What happens to a linear's input: a multiplier per column, a block Hadamard transform, and rounding to INT8.
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
  int32_t v[kLanes] = {};
  constexpr ButterflySigns() {
    for (int i = 0; i < kLanes; ++i) v[i] = i & d ? INT32_MIN : 0;
  }
};

// One stage inside a vector: lane i and lane i + d become their sum and difference.
template <int d>
LANES F32 butterfly(F32 x) {
  static constexpr ButterflySigns<d> kSigns;
  return add(swap<d>(x), as_float(bit_xor(as_int(x), load(kSigns.v))));
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

// Collects what the scale of a row depends on.
struct Magnitude {
  F32 largest = set1(0.0f);
  Mask infinite = first(0);
  LANES void see(F32 x) {
    const F32 magnitude = abs(x);
    largest = max(magnitude, largest);
    infinite = mask_or(infinite, mask_not(less(magnitude, set1(__builtin_inff()))));
  }
  LANES bool finite() const { return !any(infinite); }
  // absmax / 127, or 1 where that is 0; a row with Inf or NaN is flagged by the caller and only has to stay harmless.
  LANES float scale() const {
    const float scale = reduce_max(largest) / 127.0f;
    return finite() && scale > 0 ? scale : 1.0f;
  }
};

LANES I32 quantize(F32 x, F32 scale) {
  const F32 q = min(max(div(x, scale), set1(-127.0f)), set1(127.0f));
  return to_int(q);
}

// One row of FP32 (width a multiple of 32) to INT8; sums per 32 columns may be null. False: it has Inf or NaN.
inline bool quantize_row(const float* row, int width, int8_t* q, float* scale, int32_t* sums) {
  Magnitude magnitude;
  for (int at = 0; at < width; at += kLanes) magnitude.see(load(row + at));
  *scale = magnitude.scale();
  const F32 divisor = set1(*scale);
  for (int at = 0; at < width; at += 2 * kLanes) {
    const I32 a = quantize(load(row + at), divisor), b = quantize(load(row + at + kLanes), divisor);
    store_s8(q + at, a);
    store_s8(q + at + kLanes, b);
    if (sums) sums[at / kSumColumns] = reduce_add(add(a, b));
  }
  return magnitude.finite();
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
  return magnitude.finite();
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
template <int vectors, bool rotate>
inline bool quantize_transformed_row(const TransformTask& task, int m) {
  const float* row = task.input.row(m);
  const bool given = task.step > 0;
  Magnitude magnitude;
  alignas(64) float memory[rotate ? kStagedColumns : kLanes];
  float* staged = rotate && !given && task.width <= kStagedColumns ? memory : nullptr;
  if (!given) magnitude = transformed_magnitude<vectors, rotate>(task, row, staged);
  const QuantRows& out = task.quant;
  int8_t* q = out.row(m);
  int32_t* sums = out.row_sums(m);
  out.scale[m] = given ? task.step : magnitude.scale();
  const F32 scale = set1(out.scale[m]);
  for (int at = 0; at < task.width; at += kLanes * vectors) {
    Columns<vectors> x = transformed_before<vectors, rotate>(task, row, staged, at);
    for (int i = 0; given && i < vectors; ++i) magnitude.see(x.v[i]);
    if (task.threshold) cut(x, task.threshold + at);
    for (int i = 0; i < vectors; i += 2) {
      const int column = at + kLanes * i;
      const I32 a = quantize(x.v[i], scale), b = quantize(x.v[i + 1], scale);
      store_s8(q + column, a);
      store_s8(q + column + kLanes, b);
      sums[column / kSumColumns] = reduce_add(add(a, b));
    }
  }
  return magnitude.finite();
}

template <int vectors, bool rotate>
inline void transform_rows(const TransformTask& task, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const bool finite =
        task.quantized ? quantize_transformed_row<vectors, rotate>(task, m) : transform_row<vectors, rotate>(task, m);
    if (!finite && task.not_finite) task.not_finite[m] = 1;
  }
}

inline void transform(const TransformTask& task, int m0, int m1) {
  if (task.rotate_block == 128) return transform_rows<8, true>(task, m0, m1);
  if (task.rotate_block == 64) return transform_rows<4, true>(task, m0, m1);
  transform_rows<4, false>(task, m0, m1);
}

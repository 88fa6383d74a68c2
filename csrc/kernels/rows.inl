// Everything that works row by row and is not a product: embedding rows, norms, rotary positions, activations, sums.
// The formulas and their order are in docs/numerics.md, Row operations.
#pragma once

// What is left of a row at some column: all 16 lanes, or the first n.
struct All {};
struct First {
  int n;
};
inline F32 load(const float* p, All) { return load(p); }
inline F32 load(const float* p, First part) { return load_partial(p, part.n); }
inline void store(float* p, F32 x, All) { store(p, x); }
inline void store(float* p, F32 x, First part) { store_partial(p, x, part.n); }
inline F32 keep(F32 x, All) { return x; }
inline F32 keep(F32 x, First part) { return select(first(part.n), x, set1(0.0f)); }

// f(column, All or First) over the columns of a row, 16 at a time.
template <class Function>
inline void for_columns(int width, Function f) {
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, All{});
  if (i < width) f(i, First{width - i});
}

// ---- embedding ----

// Columns [k0, k0 + n) of one row of a packed matrix.
inline void gather_row(const snello_tensor& w, int row, int k0, int n, float* out) {
  const int panels = (w.rows + kPanel - 1) / kPanel, lane = row % kPanel;
  const uint8_t* panel = static_cast<const uint8_t*>(w.data) +
                         w.bytes / static_cast<uint64_t>(panels) * static_cast<uint64_t>(row / kPanel);
  if (w.format == SNELLO_F32) {
    const float* values = reinterpret_cast<const float*>(panel) + lane;
    for (int i = 0; i < n; ++i) out[i] = values[static_cast<int64_t>(k0 + i) * kPanel];
    return;
  }
  if (w.format == SNELLO_F16 || w.format == SNELLO_BF16) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(panel);
    for (int i = 0; i < n; i += kLanes) {
      const int some = n - i < kLanes ? n - i : kLanes;
      uint16_t halves[kLanes] = {};
      for (int j = 0; j < some; ++j) {
        const int64_t k = k0 + i + j;
        halves[j] = values[w.format == SNELLO_F16 ? k * kPanel + lane : (k / 2 * kPanel + lane) * 2 + k % 2];
      }
      store_partial(out + i, w.format == SNELLO_F16 ? load_f16(halves) : load_bf16(halves), some);
    }
    return;
  }
  const float row_scale = reinterpret_cast<const float*>(panel)[lane];
  if (w.format == SNELLO_INT8) {
    const int8_t* lines = reinterpret_cast<const int8_t*>(panel) + 2 * kPanel * 4 + lane * 4;
    for (int i = 0; i < n; ++i) {
      const int k = k0 + i;
      out[i] = static_cast<float>(lines[static_cast<int64_t>(k / 4) * 64 + k % 4]) * row_scale;
    }
    return;
  }
  const int groups = (w.columns + w.group_size - 1) / w.group_size;
  const uint8_t* scales = panel + kPanel * 4 + lane;
  const uint8_t* lines = panel + kPanel * 4 + (groups * kPanel + 63) / 64 * 64 + lane * 4;
  if (w.format == SNELLO_INT3) {
    for (int i = 0; i < n; ++i) {
      const int k = k0 + i, quad = k % kSumColumns / 4;
      const uint8_t* at = lines + static_cast<int64_t>(k / kSumColumns) * 192 + k % 4;
      const int q =
          quad < 6 ? at[quad / 2 * 64] >> 3 * (quad % 2) & 7 : at[(quad - 6) * 64] >> 6 | (at[128] >> quad & 1) << 2;
      out[i] = static_cast<float>(static_cast<int8_t>(scales[k / w.group_size * kPanel]) * (q - 4)) * row_scale;
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    const int k = k0 + i, quad = k % kBlock / 4;
    const uint8_t byte = lines[static_cast<int64_t>(k / kBlock) * 512 + quad % 8 * 64 + k % 4];
    const int q = quad < 8 ? byte & 15 : byte >> 4;
    out[i] = static_cast<float>(scales[k / w.group_size * kPanel] * (q - 8)) * row_scale;
  }
}

inline void embed(const EmbedTask& task, int m0, int m1) {
  constexpr int kStep = 128;
  const int step = task.rotate_block ? task.rotate_block : kStep;
  for (int m = m0; m < m1; ++m) {
    float* out = task.output.row(m);
    if (const int past = task.ids[m] - task.weights->rows; past >= 0) {
      gather_row(*task.more, past, 0, task.width, out);
      continue;
    }
    for (int k0 = 0; k0 < task.width; k0 += step) {
      alignas(64) float values[kStep];
      const int have = task.weights->columns - k0 < step ? task.weights->columns - k0 : step;
      const int want = task.width - k0 < step ? task.width - k0 : step;
      gather_row(*task.weights, task.ids[m], k0, have, values);
      hadamard_row(values, step, task.rotate_block);
      for_columns(want, [&](int i, auto part) {
        F32 x = load(values + i, part);
        if (task.undo) x = mul(x, load(task.undo + k0 + i, part));
        x = mul(x, set1(task.multiplier));
        if (task.accumulate) x = add(load(out + k0 + i, part), x);
        store(out + k0 + i, x, part);
      });
    }
  }
}

// ---- norms ----

inline void norm_segment(const NormTask& task, const float* in, float* out, int n) {
  const F32 count = set1(static_cast<float>(n));
  F32 mean = set1(0.0f);
  if (task.centered) {
    F32 sum = set1(0.0f);
    for_columns(n, [&](int i, auto part) { sum = add(sum, load(in + i, part)); });
    mean = div(set1(reduce_add(sum)), count);
  }
  F32 squares = set1(0.0f);
  for_columns(n, [&](int i, auto part) {
    const F32 x = keep(task.centered ? sub(load(in + i, part), mean) : load(in + i, part), part);
    squares = fma(x, x, squares);
  });
  const F32 variance = div(set1(reduce_add(squares)), count);
  const F32 inverse = div(set1(1.0f), sqrt(add(variance, set1(task.epsilon))));
  for_columns(n, [&](int i, auto part) {
    F32 x = load(in + i, part);
    if (task.centered) x = sub(x, mean);
    x = mul(x, inverse);
    if (task.gain) x = mul(x, add(load(task.gain + i, part), set1(task.gain_offset)));
    if (task.bias) x = add(x, load(task.bias + i, part));
    store(out + i, x, part);
  });
}

inline void norm(const NormTask& task, int m0, int m1) {
  const int segment = task.segment ? task.segment : task.width;
  for (int m = m0; m < m1; ++m)
    for (int at = 0; at < task.width; at += segment)
      norm_segment(task, task.input.row(m) + at, task.output.row(m) + at, segment);
}

// ---- rotary positions ----

constexpr int kMaxRotary = 512;

inline void rope_halves(const RopeTask& task, float* row, const float* cosines, const float* sines) {
  const int half = task.rotary_dims / 2;
  for (int h = 0; h < task.num_heads; ++h) {
    float *low = row + static_cast<int64_t>(h) * task.head_dim, *high = low + half;
    for_columns(half, [&](int i, auto part) {
      const F32 a = load(low + i, part), b = load(high + i, part);
      const F32 c = load(cosines + i, part), s = load(sines + i, part);
      store(low + i, sub(mul(a, c), mul(b, s)), part);
      store(high + i, add(mul(b, c), mul(a, s)), part);
    });
  }
}

// Pairs (2i, 2i + 1): a c + (-(b s)) and b c + a s, with the sines' signs alternating beforehand.
inline void rope_pairs(const RopeTask& task, float* row, const float* cosines, const float* sines) {
  alignas(64) float c[kMaxRotary], s[kMaxRotary];
  for (int i = 0; i < task.rotary_dims; ++i) {
    c[i] = cosines[i / 2];
    s[i] = i % 2 ? sines[i / 2] : -sines[i / 2];
  }
  for (int h = 0; h < task.num_heads; ++h) {
    float* head = row + static_cast<int64_t>(h) * task.head_dim;
    for_columns(task.rotary_dims, [&](int i, auto part) {
      const F32 x = load(head + i, part);
      store(head + i, add(mul(x, load(c + i, part)), mul(swap<1>(x), load(s + i, part))), part);
    });
  }
}

inline void rope(const RopeTask& task, int m0, int m1) {
  const int half = task.rotary_dims / 2;
  for (int m = m0; m < m1; ++m) {
    const int64_t at = static_cast<int64_t>(task.positions[m]) * half;
    const auto rotate = task.interleaved ? rope_pairs : rope_halves;
    rotate(task, task.rows.row(m), task.cosines + at, task.sines + at);
  }
}

// ---- activations and sums ----

template <int kind>
inline F32 activation(F32 x) {
  const F32 one = set1(1.0f), half = set1(0.5f);
  if constexpr (kind == 0) return mul(x, sigmoid(x));
  if constexpr (kind == 1) {
    const F32 cubic = mul(mul(x, x), set1(0.044715f));
    const F32 inner = mul(set1(0.7978845608f), fma(cubic, x, x));
    return mul(mul(half, x), add(one, tanh(inner)));
  }
  if constexpr (kind == 2) return mul(mul(half, x), add(one, erf(mul(x, set1(0.7071067812f)))));
  const F32 positive = max(set1(0.0f), x);  // in this order NaN stays
  if constexpr (kind == 3) return positive;
  if constexpr (kind == 4) return mul(positive, positive);
  if constexpr (kind == 5) return tanh(x);
}

inline F32 activation_of(int kind, F32 x) {
  switch (kind) {
    case 0: return activation<0>(x);
    case 1: return activation<1>(x);
    case 2: return activation<2>(x);
    case 3: return activation<3>(x);
    case 4: return activation<4>(x);
    default: return activation<5>(x);
  }
}

template <int kind>
inline void activate_rows(const ActivateTask& task, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const float *gate = task.gate.row(m), *up = task.up.data ? task.up.row(m) : nullptr;
    float* out = task.output.row(m);
    for_columns(task.width, [&](int i, auto part) {
      F32 x = activation<kind>(load(gate + i, part));
      if (up) x = mul(x, load(up + i, part));
      store(out + i, x, part);
    });
  }
}

inline void activate(const ActivateTask& task, int m0, int m1) {
  switch (task.kind) {
    case 0: return activate_rows<0>(task, m0, m1);
    case 1: return activate_rows<1>(task, m0, m1);
    case 2: return activate_rows<2>(task, m0, m1);
    case 3: return activate_rows<3>(task, m0, m1);
    case 4: return activate_rows<4>(task, m0, m1);
    default: return activate_rows<5>(task, m0, m1);
  }
}

inline void add_rows(const FloatRows& a, const FloatRows& b, float f, const FloatRows& out, int width, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const float *x = a.row(m), *y = b.row(m);
    float* z = out.row(m);
    for_columns(width,
                [&](int i, auto part) { store(z + i, add(load(x + i, part), mul(load(y + i, part), set1(f))), part); });
  }
}

inline void scale_rows(const FloatRows& in, float factor, float cap, const FloatRows& out, int width, int m0, int m1) {
  for (int m = m0; m < m1; ++m) {
    const float* x = in.row(m);
    float* y = out.row(m);
    for_columns(width, [&](int i, auto part) {
      F32 v = mul(load(x + i, part), set1(factor));
      if (cap != 0.0f) v = mul(set1(cap), tanh(div(v, set1(cap))));
      store(y + i, v, part);
    });
  }
}

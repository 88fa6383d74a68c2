// Keys and values: stored as the cache keeps them, read only from there, also for the rows just computed.
//
// attend() takes query rows of one sequence and the query heads of one kv head together: up to 16 (row, head) pairs,
// called vectors, go through a page tile by tile, so every load of keys and values serves several of them. What a
// vector may see is at most two ranges of positions (sinks, and the rest); nothing outside them reaches any statistic,
// so pages may hold anything there. The arithmetic is in docs/numerics.md, Attention.
#pragma once

constexpr int kVectors = 16;  // = lanes: the merge works on all vectors at once
constexpr int kMaxHead = 512;
constexpr int kHeadStride = kMaxHead + 16;  // not a power of two, or the vectors would share cache sets
constexpr int kTileStride = kPage + 16;

// Vectors of one micro-kernel, and the panels that go with R of them so that the accumulators stay in registers.
constexpr int kMicroVectors = kPanelBlock == 2 ? 6 : 2;
constexpr int micro_panels(int vectors) { return kPanelBlock == 2 ? 4 : vectors == 1 ? 4 : 2; }

struct Span {
  int begin, end;
  LANES bool empty() const { return begin >= end; }
};

struct AttentionScratch {
  alignas(64) float q[kVectors][kHeadStride];
  alignas(64) float o[kVectors][kHeadStride];       // merged so far
  alignas(64) float tile_o[kVectors][kHeadStride];  // of this tile
  alignas(64) float score[kVectors][kTileStride];   // scores, then probabilities
  alignas(64) int8_t q8[kVectors][kHeadStride];
  alignas(64) uint8_t p8[kVectors][kTileStride];
  alignas(64) int16_t p16[kVectors][kTileStride];           // packed
  alignas(64) int16_t value_weight[kVectors][kTileStride];  // packed: the values' scales against the largest one seen
  alignas(64) float m[kVectors], l[kVectors], tile_m[kVectors], tile_l[kVectors], keep[kVectors], take[kVectors];
  alignas(64) float q_scale[kVectors], p_scale[kVectors], value_scale[kVectors];
  alignas(64) float unit[kVectors];  // what a score of 1 stands for
  int32_t q_bias[kVectors];
  int64_t ahead;  // bytes from this tile's block to the next one's: what is read here is fetched there
  Span sinks[kVectors], rest[kVectors];  // what each vector sees of this tile
};
static_assert(sizeof(AttentionScratch) <= kAttentionScratchBytes);

// ---- formats ----

struct KeepsF32 {
  using Element = float;
  LANES static F32 get(const float* p) { return load(p); }
  LANES static F32 get_some(const float* p, int n) { return load_partial(p, n); }
  LANES static void put_some(float* p, F32 x, int n) { store_partial(p, x, n); }
};
struct KeepsF16 {
  using Element = uint16_t;
  LANES static F32 get(const uint16_t* p) { return load_f16(p); }
  LANES static F32 get_some(const uint16_t* p, int n) { return load_f16_partial(p, n); }
  LANES static void put_some(uint16_t* p, F32 x, int n) { store_f16_partial(p, x, n); }
};
struct KeepsBF16 {
  using Element = uint16_t;
  LANES static F32 get(const uint16_t* p) { return load_bf16(p); }
  LANES static F32 get_some(const uint16_t* p, int n) { return load_bf16_partial(p, n); }
  LANES static void put_some(uint16_t* p, F32 x, int n) { store_bf16_partial(p, x, n); }
};

LANES int padded_head(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
LANES int64_t key_panel_bytes(int head_dim) { return kPanel * 4 + kPanel * padded_head(head_dim); }

// The largest power of two up to 128 that divides head_dim; none below 16.
LANES int head_rotation(int head_dim) {
  const int power = head_dim & -head_dim;
  return power >= 128 ? 128 : power >= 16 ? power : 0;
}

LANES float rotation_factor(int block) {
  return block == 16 ? 0.25f : block == 32 ? 0.17677669529663687f : block == 64 ? 0.125f : 0.08838834764831845f;
}

template <class Task>
LANES const uint8_t* head_block(const Task& task, int sequence, int tile, int h) {
  const int64_t page = task.page_tables[static_cast<int64_t>(sequence) * task.pages_per_sequence + tile];
  return task.cache.data + page * task.cache.page_stride + h * task.cache.head_stride;
}

// A whole tile ahead, into the second cache: blocks of a head lie a page apart, where no hardware prefetcher finds
// them.
LANES void fetch_ahead(const void* p, int64_t ahead) {
  __builtin_prefetch(static_cast<const uint8_t*>(p) + ahead, 0, 2);
}

// The scales of INT8 keys and values, which no product reads.
LANES void fetch_scales(const CacheLayer& cache, const uint8_t* block, int64_t ahead) {
  const int64_t stride = key_panel_bytes(cache.head_dim);
#pragma GCC unroll 8
  for (int p = 0; p < kPage / kPanel; ++p) {
    fetch_ahead(block + p * stride, ahead);
    fetch_ahead(block + cache.value_offset + p * kPanel * 4, ahead);
  }
}

// One head's values as INT8, rotated first if asked. `padded` receives the zero-padded bytes (up to the next 64).
inline bool quantize_head(const float* x, int head_dim, bool rotate, int8_t* padded, float* scale) {
  alignas(64) float values[kHeadStride];
  const int width = (head_dim + kBlock - 1) / kBlock * kBlock;
  const int block = rotate ? head_rotation(head_dim) : 0;
  const F32 factor = set1(block ? rotation_factor(block) : 1.0f);
  for (int d = 0; d < width; d += kLanes) store(values + d, mul(load_columns(x, d, head_dim), factor));
  hadamard_row(values, head_dim, block);
  return quantize_row(values, width, padded, scale);
}

// ---- storing ----

template <class Keeps>
inline void store_kv_float(const StoreTask& task, uint8_t* block, const float* key, const float* value, int slot) {
  using Element = typename Keeps::Element;
  const int head_dim = task.cache.head_dim;
  Element* keys =
      reinterpret_cast<Element*>(block) + static_cast<int64_t>(slot / kPanel) * head_dim * kPanel + slot % kPanel;
  Element* values = reinterpret_cast<Element*>(block + task.cache.value_offset) + static_cast<int64_t>(slot) * head_dim;
  for (int d = 0; d < head_dim; d += kLanes) {
    const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
    Element narrow[kLanes];
    Keeps::put_some(narrow, load_columns(key, d, head_dim), n);
    for (int i = 0; i < n; ++i) keys[(d + i) * kPanel] = narrow[i];
    Keeps::put_some(values + d, load_columns(value, d, head_dim), n);
  }
}

inline bool store_kv_int8(const StoreTask& task, uint8_t* block, const float* key, const float* value, int slot) {
  const int head_dim = task.cache.head_dim, padded = padded_head(head_dim), lane = slot % kPanel;
  alignas(64) int8_t q[kHeadStride];
  float scale;
  bool finite = quantize_head(key, head_dim, true, q, &scale);
  uint8_t* panel = block + static_cast<int64_t>(slot / kPanel) * (kPanel * 4 + kPanel * padded);
  reinterpret_cast<float*>(panel)[lane] = scale;
  for (int d = 0; d < padded; d += 4) __builtin_memcpy(panel + kPanel * 4 + d * kPanel + lane * 4, q + d, 4);

  finite = quantize_head(value, head_dim, false, q, &scale) && finite;
  uint8_t* values = block + task.cache.value_offset;
  reinterpret_cast<float*>(values)[slot] = scale;
  int8_t* bytes = reinterpret_cast<int8_t*>(values) + kPage * 4 + slot / 4 * 64 + slot % 4;
  for (int d = 0; d < padded; ++d) bytes[d / kLanes * (kPage * kLanes) + d % kLanes * 4] = q[d];
  return finite;
}

inline void store_kv(const StoreTask& task, int h, int m0, int m1) {
  const int head_dim = task.cache.head_dim;
  for (int m = m0; m < m1; ++m) {
    const int position = task.positions[m], slot = position % kPage;
    uint8_t* block = const_cast<uint8_t*>(head_block(task, task.sequences[m], position / kPage, h));
    const float* key = task.keys.row(m) + static_cast<int64_t>(h) * head_dim;
    const float* value = task.values.row(m) + static_cast<int64_t>(h) * head_dim;
    switch (task.cache.format) {
      case SNELLO_F32: store_kv_float<KeepsF32>(task, block, key, value, slot); break;
      case SNELLO_F16: store_kv_float<KeepsF16>(task, block, key, value, slot); break;
      case SNELLO_BF16: store_kv_float<KeepsBF16>(task, block, key, value, slot); break;
      default:
        if (!store_kv_int8(task, block, key, value, slot) && task.not_finite)
          __atomic_store_n(task.not_finite + m, uint8_t{1}, __ATOMIC_RELAXED);  // several heads may say so at once
    }
  }
}

// ---- scores ----

// Integer dot products stand in the place of the scores that become of them.
LANES int32_t* sums_of(AttentionScratch& s, int v) { return reinterpret_cast<int32_t*>(s.score[v]); }

// Dot products of R vectors with P panels of 16 keys: per position one ascending chain over d.
template <class Keeps, int R, int P>
inline void dot_keys(AttentionScratch& s, int v, const typename Keeps::Element* keys, int head_dim, int panel) {
  F32 sum[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = set1(0.0f);
  const int64_t panel_stride = static_cast<int64_t>(head_dim) * kPanel;
  const typename Keeps::Element* at = keys + panel * panel_stride;
  const float* q = s.q[v];
  const int64_t ahead = s.ahead;
  for (int d = 0; d < head_dim; ++d, at += kPanel) {
    F32 k[P];
    for (int p = 0; p < P; ++p) {
      fetch_ahead(at + p * panel_stride, ahead);
      k[p] = Keeps::get(at + p * panel_stride);
    }
    for (int r = 0; r < R; ++r) {
      const F32 x = set1(q[r * kHeadStride + d]);
      for (int p = 0; p < P; ++p) sum[r][p] = fma(x, k[p], sum[r][p]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(s.score[v + r] + (panel + p) * kPanel, sum[r][p]);
}

template <int R, int P>
inline void dot_keys_int8(AttentionScratch& s, int v, const uint8_t* keys, int head_dim, int panel) {
  I32 sum[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = set1(-s.q_bias[v + r]);
  const int padded = padded_head(head_dim);
  const int64_t panel_stride = key_panel_bytes(head_dim);
  const uint8_t* at = keys + panel * panel_stride + kPanel * 4;
  const int64_t ahead = s.ahead;
  for (int d = 0; d < padded; d += 4, at += 4 * kPanel) {
    Quads k[P];
    for (int p = 0; p < P; ++p) {
      fetch_ahead(at + p * panel_stride, ahead);
      k[p] = as_weights(load_quads(at + p * panel_stride));
    }
    for (int r = 0; r < R; ++r) {
      const Quads x = set1_quad(s.q8[v + r] + d);
      for (int p = 0; p < P; ++p) sum[r][p] = dot_weights(sum[r][p], k[p], x);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) store(sums_of(s, v + r) + (panel + p) * kPanel, sum[r][p]);
}

// All panels that hold `span`, a whole micro-kernel's worth at a time: what is computed too much is masked later.
template <int R>
inline void dot_some_keys(AttentionScratch& s, const CacheLayer& layer, int v, const uint8_t* block, Span span) {
  constexpr int P = micro_panels(R);
  const int begin = span.begin / (kPanel * P) * P, end = (span.end + kPanel - 1) / kPanel;
  const int head_dim = layer.head_dim;
  for (int panel = begin; panel < end; panel += P) {
    switch (layer.format) {
      case SNELLO_F32: dot_keys<KeepsF32, R, P>(s, v, reinterpret_cast<const float*>(block), head_dim, panel); break;
      case SNELLO_F16: dot_keys<KeepsF16, R, P>(s, v, reinterpret_cast<const uint16_t*>(block), head_dim, panel); break;
      case SNELLO_BF16:
        dot_keys<KeepsBF16, R, P>(s, v, reinterpret_cast<const uint16_t*>(block), head_dim, panel);
        break;
      default: dot_keys_int8<R, P>(s, v, block, head_dim, panel);
    }
  }
}

// ---- probabilities ----

// Positions of the panel at `base` within the span.
LANES Mask within(Span span, int base) {
  const auto clamp = [](int x) { return x < 0 ? 0 : x > kLanes ? kLanes : x; };
  return mask_and(first(clamp(span.end - base)), mask_not(first(clamp(span.begin - base))));
}
LANES Mask visible(const AttentionScratch& s, int v, int base) {
  const Mask rest = within(s.rest[v], base);
  return s.sinks[v].empty() ? rest : mask_or(rest, within(s.sinks[v], base));
}

// The panels of this tile of which a vector sees something, and those among them of which it sees all; with sinks, all
// that any vector sees and none.
struct Panels {
  int begin, end, whole_begin, whole_end;
};
LANES Panels panels_seen(const AttentionScratch& s, int v, int begin, int end) {
  if (!s.sinks[v].empty()) return {begin, end, end, end};
  const Span span = s.rest[v];
  if (span.empty()) return {begin, begin, begin, begin};
  const int first = (span.begin + kPanel - 1) / kPanel * kPanel, last = span.end / kPanel * kPanel;
  return {span.begin / kPanel * kPanel, (span.end + kPanel - 1) / kPanel * kPanel, first, last};
}

LANES bool sees_the_same(const AttentionScratch& s, int v, int w) {
  const auto same = [](Span a, Span b) { return a.begin == b.begin && a.end == b.end; };
  return same(s.rest[v], s.rest[w]) && same(s.sinks[v], s.sinks[w]);
}

// x where it is seen.
struct SeenWhole {
  LANES F32 of(F32 x, F32) const { return x; }
};
struct SeenInPart {
  Mask mask;
  LANES F32 of(F32 x, F32 otherwise) const { return select(mask, x, otherwise); }
};

// f(position, what is seen from there) for each of them.
template <class Function>
LANES void for_panels(const AttentionScratch& s, int v, const Panels& panels, Function f) {
  if (panels.whole_begin == 0 && panels.whole_end == kPage) {
#pragma GCC unroll 8
    for (int at = 0; at < kPage; at += kPanel) f(at, SeenWhole{});
    return;
  }
  int at = panels.begin;
  for (; at < panels.end && at < panels.whole_begin; at += kPanel) f(at, SeenInPart{visible(s, v, at)});
  for (; at < panels.whole_end; at += kPanel) f(at, SeenWhole{});
  for (; at < panels.end; at += kPanel) f(at, SeenInPart{visible(s, v, at)});
}

// What becomes of the product of a vector and a key.
struct Scoring {
  F32 scale, cap;
  bool capped;
  LANES explicit Scoring(const AttentionTask& task)
      : scale(set1(task.scale)), cap(set1(task.soft_cap)), capped(task.soft_cap != 0.0f) {}
  LANES F32 of(F32 dot) const {
    const F32 x = mul(dot, scale);
    return capped ? mul(cap, tanh(div(x, cap))) : x;
  }
};

// The tile's maximum, probabilities and their sum.
inline void weigh_float(const Scoring& scoring, AttentionScratch& s, int v, const Panels& panels) {
  const F32 never = set1(-__builtin_inff());
  F32 highest = never;
  for_panels(s, v, panels, [&](int at, auto seen) {
    const F32 x = seen.of(scoring.of(load(s.score[v] + at)), never);
    highest = max(x, highest);
    store(s.score[v] + at, x);
  });
  s.tile_m[v] = reduce_max(highest);
  const F32 m = set1(s.tile_m[v]);
  F32 sum = set1(0.0f);
  for (int at = panels.begin; at < panels.end; at += kPanel) {
    const F32 p = exp_of_negative(sub(load(s.score[v] + at), m));
    sum = add(sum, p);
    store(s.score[v] + at, p);
  }
  s.tile_l[v] = reduce_add(sum);
}

// The same of integer products, scores of the next vector before this one's probabilities: what one of them waits for
// is another one's work. A score is a multiple of the vector's unit; with a soft cap, which is no multiple of anything,
// the unit is 1. What becomes a byte needs no more than 16 bits on the way, 32 at once, in pieces of 64 positions.
constexpr int kPiece = 4 * kPanel;
LANES Span pieces(const Panels& panels) {
  if (panels.begin >= panels.end) return {0, 0};
  return {panels.begin / kPiece * kPiece, (panels.end + kPiece - 1) / kPiece * kPiece};
}

// f(position) for the panels of those pieces of which nothing is seen.
template <class Function>
LANES void for_unseen(const Panels& panels, Function f) {
  const Span span = pieces(panels);
  for (int at = span.begin; at < panels.begin; at += kPanel) f(at);
  for (int at = panels.end; at < span.end; at += kPanel) f(at);
}

inline void scale_scores(const Scoring& scoring, AttentionScratch& s, int v, const uint8_t* keys, int64_t stride,
                         const Panels& panels) {
  const F32 never = set1(-__builtin_inff()), q_scale = set1(s.q_scale[v]);
  F32 highest = never;
  for_panels(s, v, panels, [&](int at, auto seen) {
    F32 x = mul(to_float(load(sums_of(s, v) + at)), load(reinterpret_cast<const float*>(keys + at / kPanel * stride)));
    if (scoring.capped) x = scoring.of(mul(x, q_scale));
    x = seen.of(x, never);
    highest = max(x, highest);
    store(s.score[v] + at, x);
  });
  for_unseen(panels, [&](int at) { store(s.score[v] + at, never); });
  s.tile_m[v] = reduce_max(highest);
}

// The scales of the values that vector v sees, in units of 2^-15 of the largest one.
inline void weigh_scales(AttentionScratch& s, int v, const float* value_scale, const Panels& panels) {
  alignas(64) float scales[kPage];
  const F32 zero = set1(0.0f);
  F32 highest = zero;
  for_panels(s, v, panels, [&](int at, auto seen) {
    const F32 x = seen.of(load(value_scale + at), zero);
    highest = max(x, highest);
    store(scales + at, x);
  });
  for_unseen(panels, [&](int at) { store(scales + at, zero); });
  s.value_scale[v] = reduce_max(highest);
  const F32 factor = set1(bounded(32767.0f / s.value_scale[v]));
  const auto rounded = [&](int at) { return to_int(mul(load(scales + at), factor)); };
  const Span span = pieces(panels);
  for (int at = span.begin; at < span.end; at += 2 * kPanel)
    store_16(s.value_weight[v] + at, pack(rounded(at), rounded(at + kPanel)));
}

// Probabilities, in units of 2^-15 of the largest one, times the values' scales.
inline void weigh_int8(AttentionScratch& s, int v, const int16_t* value_weight, const Panels& panels) {
  const F32 unit = mul(set1(s.unit[v]), set1(0x1.715476p+11f)), m = set1(s.tile_m[v]);
  const auto below = [&](int at) { return to_int(mul(sub(m, load(s.score[v] + at)), unit)); };
  I32 sum = set1(0);
  I16 highest = set1_16(0);
  const Span span = pieces(panels);
  for (int at = span.begin; at < span.end; at += 2 * kPanel) {
    const I16 p = power_of_half(pack(below(at), below(at + kPanel)));
    const I16 u = multiply_round(p, load_16(value_weight + at));
    sum = add_pairs(sum, p);
    highest = max(u, highest);
    store_16(s.p16[v] + at, u);
  }
  s.tile_l[v] = static_cast<float>(reduce_add(sum));
  s.p_scale[v] = static_cast<float>(reduce_max(highest));
}

// As bytes against their own maximum, if that is not a byte already; 0 for all other positions of the tile.
inline void round_weights(AttentionScratch& s, int n, const Panels* panels) {
  const I32 factor = to_int(min(div(set1(255.0f * 32768.0f), load(s.p_scale)), set1(32767.0f)));
  alignas(64) int32_t factors[kVectors];
  store(factors, factor);
  store(s.p_scale, div(mul(load(s.value_scale), set1(32769.0f)), to_float(factor)));
  for (int v = 0; v < n; ++v) {
    const I16 by = set1_16(factors[v]);
    const Span span = pieces(panels[v]);
    for (int at = 0; at < kPage; at += kPiece) {
      const int16_t* p = s.p16[v] + at;
      if (at >= span.begin && at < span.end)
        store_u8(s.p8[v] + at, multiply_round(load_16(p), by), multiply_round(load_16(p + 2 * kPanel), by));
      else
        store_u8(s.p8[v] + at, set1_16(0), set1_16(0));
    }
  }
}

// All vectors, over panels [begin, end).
inline void weigh(const AttentionTask& task, AttentionScratch& s, int n, const uint8_t* block, int begin, int end) {
  const Scoring scoring(task);
  Panels panels[kVectors] = {};
  for (int v = 0; v < n; ++v) panels[v] = panels_seen(s, v, begin, end);
  if (task.cache.format != SNELLO_INT8) {
    for (int v = 0; v < n; ++v) weigh_float(scoring, s, v, panels[v]);
    return;
  }
  const int64_t stride = key_panel_bytes(task.cache.head_dim);
  const float* value_scale = reinterpret_cast<const float*>(block + task.cache.value_offset);
  const auto scale = [&](int v) { scale_scores(scoring, s, v, block, stride, panels[v]); };
  scale(0);
  for (int v = 0, like = 0; v < n; ++v) {
    if (v + 1 < n) scale(v + 1);
    if (v == 0 || !sees_the_same(s, v, like)) weigh_scales(s, like = v, value_scale, panels[v]);
    s.value_scale[v] = s.value_scale[like];
    weigh_int8(s, v, s.value_weight[like], panels[v]);
  }
  round_weights(s, n, panels);
}

// ---- values ----

// Adds positions [span) of R vectors to their tile sums: per d one ascending chain over positions.
template <class Keeps, int R, int D, bool whole>
inline void add_value_panels(AttentionScratch& s, int v, const typename Keeps::Element* values, int head_dim, int d,
                             Span span) {
  F32 sum[R][D];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < D; ++c) sum[r][c] = load(s.tile_o[v + r] + d + c * kLanes);
  const float* p = s.score[v];
  const int64_t ahead = s.ahead;
  const typename Keeps::Element* at = values + static_cast<int64_t>(span.begin) * head_dim + d;
  for (int j = span.begin; j < span.end; ++j, at += head_dim) {
    F32 x[D];
    for (int c = 0; c < D; ++c) fetch_ahead(at + c * kLanes, ahead);
    for (int c = 0; c < D; ++c) x[c] = whole ? Keeps::get(at + c * kLanes) : Keeps::get_some(at, head_dim - d);
    for (int r = 0; r < R; ++r) {
      const F32 weight = set1(p[r * kTileStride + j]);
      for (int c = 0; c < D; ++c) sum[r][c] = fma(weight, x[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < D; ++c) store(s.tile_o[v + r] + d + c * kLanes, sum[r][c]);
}

template <class Keeps, int R>
inline void add_values(AttentionScratch& s, int v, const uint8_t* block, int head_dim, Span span) {
  if (span.empty()) return;
  const auto* values = reinterpret_cast<const typename Keeps::Element*>(block);
  constexpr int D = micro_panels(R);
  int d = 0;
  for (; d + D * kLanes <= head_dim; d += D * kLanes)
    add_value_panels<Keeps, R, D, true>(s, v, values, head_dim, d, span);
  for (; D > 2 && d + 2 * kLanes <= head_dim; d += 2 * kLanes)
    add_value_panels<Keeps, R, 2, true>(s, v, values, head_dim, d, span);
  for (; d + kLanes <= head_dim; d += kLanes) add_value_panels<Keeps, R, 1, true>(s, v, values, head_dim, d, span);
  if (d < head_dim) add_value_panels<Keeps, R, 1, false>(s, v, values, head_dim, d, span);
}

// The same where the vectors may see different spans: what all see together, the rest of each alone, in order.
template <class Keeps, int R>
inline void add_spans(AttentionScratch& s, int v, const Span* spans, const uint8_t* block, int head_dim) {
  Span common = spans[0];
  for (int r = 1; r < R; ++r) {
    common.begin = spans[r].begin > common.begin ? spans[r].begin : common.begin;
    common.end = spans[r].end < common.end ? spans[r].end : common.end;
  }
  if (R == 1 || common.empty()) {
    for (int r = 0; r < R; ++r) add_values<Keeps, 1>(s, v + r, block, head_dim, spans[r]);
    return;
  }
  for (int r = 0; r < R; ++r) add_values<Keeps, 1>(s, v + r, block, head_dim, {spans[r].begin, common.begin});
  add_values<Keeps, R>(s, v, block, head_dim, common);
  for (int r = 0; r < R; ++r) add_values<Keeps, 1>(s, v + r, block, head_dim, {common.end, spans[r].end});
}

template <class Keeps, int R>
inline void weigh_values_float(AttentionScratch& s, int v, const uint8_t* block, int head_dim) {
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < head_dim; d += kLanes) store(s.tile_o[v + r] + d, set1(0.0f));
  add_spans<Keeps, R>(s, v, s.sinks + v, block, head_dim);
  add_spans<Keeps, R>(s, v, s.rest + v, block, head_dim);
}

// R vectors times the values of D panels of dimensions, from the `panel`-th on.
template <int R, int D>
inline void weigh_value_panels(AttentionScratch& s, int v, const uint8_t* values, int panel, Span span) {
  I32 sum[R][D];
  for (auto& row : sum)
    for (I32& value : row) value = set1(0);
  const uint8_t* at = values + static_cast<int64_t>(panel) * kPage * kLanes + span.begin / 4 * 64;
  for (int j = span.begin / 4 * 4; j < span.end; j += 4, at += 64) {
    Quads x[D];
    for (int c = 0; c < D; ++c) {
      fetch_ahead(at + c * kPage * kLanes, s.ahead);
      x[c] = load_quads(at + c * kPage * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const Quads weights = set1_quad(s.p8[v + r] + j);
      for (int c = 0; c < D; ++c) sum[r][c] = dot_us(sum[r][c], weights, x[c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < D; ++c)
      store(s.tile_o[v + r] + (panel + c) * kLanes, mul(to_float(sum[r][c]), set1(s.p_scale[v + r])));
}

template <int R>
inline void weigh_values_int8(AttentionScratch& s, int v, const uint8_t* block, int head_dim, Span span) {
  const uint8_t* values = block + kPage * 4;
  constexpr int D = micro_panels(R);
  const int panels = padded_head(head_dim) / kLanes;
  int panel = 0;
  for (; panel + D <= panels; panel += D) weigh_value_panels<R, D>(s, v, values, panel, span);
  for (; D > 2 && panel + 2 <= panels; panel += 2) weigh_value_panels<R, 2>(s, v, values, panel, span);
  for (; panel < panels; ++panel) weigh_value_panels<R, 1>(s, v, values, panel, span);
}

template <int R>
inline void weigh_values(AttentionScratch& s, const CacheLayer& layer, int v, const uint8_t* block, Span span) {
  switch (layer.format) {
    case SNELLO_F32: return weigh_values_float<KeepsF32, R>(s, v, block, layer.head_dim);
    case SNELLO_F16: return weigh_values_float<KeepsF16, R>(s, v, block, layer.head_dim);
    case SNELLO_BF16: return weigh_values_float<KeepsBF16, R>(s, v, block, layer.head_dim);
    default: return weigh_values_int8<R>(s, v, block, layer.head_dim, span);
  }
}

// Calls f(first vector, count as a type) for [v, v + n) in groups of at most kMicroVectors, as even as they come.
template <int R>
struct Count {
  static constexpr int value = R;
};
template <class Function>
inline void for_groups(int n, Function f) {
  for (int v = 0; v < n;) {
    const int groups = (n - v + kMicroVectors - 1) / kMicroVectors, size = (n - v + groups - 1) / groups;
    switch (size) {
      case 1: f(v, Count<1>{}); break;
      case 2: f(v, Count<2>{}); break;
      case 3: f(v, Count<kMicroVectors >= 3 ? 3 : 1>{}); break;
      case 4: f(v, Count<kMicroVectors >= 4 ? 4 : 1>{}); break;
      case 5: f(v, Count<kMicroVectors >= 5 ? 5 : 1>{}); break;
      default: f(v, Count<kMicroVectors >= 6 ? 6 : 1>{});
    }
    v += size;
  }
}

// How a tile's products are computed: scores of all n vectors with the keys of `span`, and their sums of its values.
// Instruction sets with two-dimensional registers have a way of their own (attention_tiles.inl).
struct VectorProducts {
  static void begin(int) {}
  static void end() {}
  static inline void scores(const AttentionTask& task, AttentionScratch& s, int n, const uint8_t* block, Span span) {
    for_groups(n, [&](int v, auto count) { dot_some_keys<count.value>(s, task.cache, v, block, span); });
  }
  static inline void values(const AttentionTask& task, AttentionScratch& s, int n, const uint8_t* block, Span span) {
    const uint8_t* values = block + task.cache.value_offset;
    for_groups(n, [&](int v, auto count) { weigh_values<count.value>(s, task.cache, v, values, span); });
  }
};

// ---- tiles ----

// Merges the tile into what came before: vectors that saw nothing of the tile keep what they have.
inline void merge_tile(AttentionScratch& s, int n, int head_dim, bool* started) {
  const F32 old_m = load(s.m), tile_m = load(s.tile_m), m = max(old_m, tile_m), unit = load(s.unit);
  store(s.keep, exp(mul(sub(old_m, m), unit)));
  store(s.take, exp(mul(sub(tile_m, m), unit)));
  for (int v = 0; v < n; ++v) {
    if (s.sinks[v].empty() && s.rest[v].empty()) continue;
    if (!started[v]) {
      started[v] = true;
      s.m[v] = s.tile_m[v];
      s.l[v] = s.tile_l[v];
      for (int d = 0; d < head_dim; d += kLanes) store(s.o[v] + d, load(s.tile_o[v] + d));
      continue;
    }
    const F32 keep = set1(s.keep[v]), take = set1(s.take[v]);
    s.l[v] = s.l[v] * s.keep[v] + s.tile_l[v] * s.take[v];
    s.m[v] = s.m[v] > s.tile_m[v] ? s.m[v] : s.tile_m[v];
    for (int d = 0; d < head_dim; d += kLanes)
      store(s.o[v] + d, add(mul(load(s.o[v] + d), keep), mul(load(s.tile_o[v] + d), take)));
  }
}

// What a row at `position` sees of the whole sequence.
struct Sight {
  int sinks, begin, end;
};
LANES Sight sight(const AttentionTask& task, int position, int length) {
  const int end = task.causal ? position + 1 : length;
  if (task.window <= 0) return {0, 0, end};
  const int begin = position - task.window + 1 > 0 ? position - task.window + 1 : 0;
  const int last = task.causal || task.window > end - position ? end : position + task.window;
  const int sinks = task.sinks < end ? task.sinks : end;
  return {sinks, begin > sinks ? begin : sinks, last};
}

LANES Span clip(int begin, int end, int tile) {
  const int base = tile * kPage;
  return {begin - base < 0 ? 0 : begin - base, end - base > kPage ? kPage : end - base};
}

LANES Span hull(Span a, Span b) {
  if (b.empty()) return a;
  return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

// One tile for all n vectors. False if none of them sees anything of it.
template <class Products>
inline bool attend_tile(const AttentionTask& task, AttentionScratch& s, const Sight* sights, int n, int sequence, int h,
                        int tile) {
  Span all{kPage, 0};
  for (int v = 0; v < n; ++v) {
    s.sinks[v] = clip(0, sights[v].sinks, tile);
    s.rest[v] = clip(sights[v].begin, sights[v].end, tile);
    all = hull(hull(all, s.sinks[v]), s.rest[v]);
  }
  if (all.empty()) return false;

  const uint8_t* block = head_block(task, sequence, tile, h);
  if (task.cache.format == SNELLO_INT8) fetch_scales(task.cache, block, s.ahead);
  Products::scores(task, s, n, block, all);
  const int begin = all.begin / kPanel * kPanel, end = (all.end + kPanel - 1) / kPanel * kPanel;
  weigh(task, s, n, block, begin, end);
  Products::values(task, s, n, block, all);
  return true;
}

// Vectors of rows [m0, m1) of one sequence and query heads [g0, g1) of kv head h; at most kVectors of them.
template <class Products>
inline void attend_block(const AttentionTask& task, int h, int g0, int g1, int m0, int m1, AttentionScratch& s) {
  const int head_dim = task.cache.head_dim, group = task.num_heads / task.cache.num_kv_heads;
  const int sequence = task.sequences[m0], length = task.lengths[sequence];
  const int heads = g1 - g0, n = (m1 - m0) * heads;
  Sight sights[kVectors];
  bool started[kVectors] = {};
  int last_tile = 0;
  for (int v = 0; v < n; ++v) {
    const int m = m0 + v / heads, g = g0 + v % heads;
    const float* q = task.queries.row(m) + static_cast<int64_t>(h * group + g) * head_dim;
    if (task.cache.format == SNELLO_INT8) {
      if (!quantize_head(q, head_dim, true, s.q8[v], &s.q_scale[v]) && task.not_finite)
        __atomic_store_n(task.not_finite + m, uint8_t{1}, __ATOMIC_RELAXED);
      I32 sum = set1(0);
      for (int d = 0; d < padded_head(head_dim); d += kLanes) sum = add(sum, load_s8(s.q8[v] + d));
      s.q_bias[v] = kWeightBias * reduce_add(sum);
      s.unit[v] = task.soft_cap != 0.0f ? 1.0f : s.q_scale[v] * task.scale;
    } else {
      s.unit[v] = 1.0f;
      for (int d = 0; d < head_dim; d += kLanes) store(s.q[v] + d, load_columns(q, d, head_dim));
    }
    sights[v] = sight(task, task.positions[m], length);
    const int end = sights[v].end > sights[v].sinks ? sights[v].end : sights[v].sinks;
    last_tile = (end - 1) / kPage > last_tile ? (end - 1) / kPage : last_tile;
  }
  for (int v = 0; v < kVectors; ++v) s.m[v] = s.tile_m[v] = 0.0f;
  for (int v = n; v < kVectors; ++v) s.unit[v] = s.l[v] = s.p_scale[v] = s.value_scale[v] = 1.0f;

  // Rows ascend, so the first one's window begins first; between the sinks' tiles and it there is nothing to see.
  const Sight first = sight(task, task.positions[m0], length);
  const int sink_tiles = (first.sinks + kPage - 1) / kPage, first_tile = first.begin / kPage;
  Products::begin(n);
  for (int tile = sink_tiles > 0 ? 0 : first_tile; tile <= last_tile; ++tile) {
    if (tile >= sink_tiles && tile < first_tile) tile = first_tile;
    const int next = tile + 1 >= sink_tiles && tile + 1 < first_tile ? first_tile : tile + 1;
    s.ahead = next > last_tile ? 0 : head_block(task, sequence, next, h) - head_block(task, sequence, tile, h);
    if (attend_tile<Products>(task, s, sights, n, sequence, h, tile)) merge_tile(s, n, head_dim, started);
  }
  Products::end();

  store(s.l, div(set1(1.0f), load(s.l)));
  for (int v = 0; v < n; ++v) {
    float* out = task.output.row(m0 + v / heads) + static_cast<int64_t>(h * group + g0 + v % heads) * head_dim;
    const F32 inverse = set1(s.l[v]);
    for (int d = 0; d < head_dim; d += kLanes) store_columns(out, mul(load(s.o[v] + d), inverse), d, head_dim);
  }
}

template <class Products>
inline void attend_with(const AttentionTask& task, int h, int m0, int m1, void* scratch) {
  AttentionScratch& s = *static_cast<AttentionScratch*>(scratch);
  const int group = task.num_heads / task.cache.num_kv_heads;
  const int rows = group >= kVectors ? 1 : kVectors / group, heads = group < kVectors ? group : kVectors;
  for (int m = m0; m < m1;) {
    int end = m + 1;
    while (end < m1 && end < m + rows && task.sequences[end] == task.sequences[m]) ++end;
    for (int g = 0; g < group; g += heads)
      attend_block<Products>(task, h, g, g + heads < group ? g + heads : group, m, end, s);
    m = end;
  }
}

inline void attend(const AttentionTask& task, int h, int m0, int m1, void* scratch) {
  attend_with<VectorProducts>(task, h, m0, m1, scratch);
}

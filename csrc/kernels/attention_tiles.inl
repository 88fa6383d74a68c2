// Attention over INT8 keys and values on tiles. Vectors are a tile of rows; 16 positions of keys are a tile of weights
// for each 64 values of a head, and so are 16 values of a head for each 64 positions: the pages hold both as they are
// needed. Integer sums are exact, so they are the same to the last bit.
#pragma once

struct TileProducts {
  static bool fits(const CacheLayer& cache) {
    return cache.format == SNELLO_INT8 && cache.head_dim % kTileColumns == 0 && cache.head_dim <= kMaxHead;
  }

  static void begin(int n) { begin_tiles(n, n); }
  static void end() { end_tiles(); }

  static inline void scores(const AttentionTask& task, AttentionScratch& s, int, const uint8_t* block, Span span) {
    const int end = (span.end + kPanel - 1) / kPanel;
    int panel = span.begin / kPanel;
    for (; panel + 2 <= end; panel += 2) dot_panels<2>(s, block, task.cache.head_dim, panel);
    if (panel < end) dot_panels<1>(s, block, task.cache.head_dim, panel);
  }

  static inline void values(const AttentionTask& task, AttentionScratch& s, int n, const uint8_t* block, Span span) {
    const uint8_t* values = block + task.cache.value_offset + kPage * 4;
    if (span.begin < kTileColumns) load_tile<4>(s.p8, kTileStride);
    if (span.end > kTileColumns) load_tile<5>(s.p8[0] + kTileColumns, kTileStride);
    for (int d = 0; d < task.cache.head_dim; d += 2 * kLanes) add_panels(s, values, d, span);
    for (int v = 0; v < n; ++v) {
      const F32 scale = set1(s.p_scale[v]);
      for (int d = 0; d < task.cache.head_dim; d += kLanes)
        store(s.tile_o[v] + d, mul(to_float(load(reinterpret_cast<const int32_t*>(s.tile_o[v]) + d)), scale));
    }
  }

 private:
  static LANES void fetch_tile(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileBytes; i += kLineBytes) fetch_ahead(p + i, ahead);
  }

  template <int panels>
  static LANES void dot_panels(AttentionScratch& s, const uint8_t* block, int head_dim, int panel) {
    const int64_t stride = key_panel_bytes(head_dim);
    const uint8_t* keys = block + panel * stride + kPanel * 4;
    zero_tile<0>();
    if constexpr (panels == 2) zero_tile<1>();
    for (int d = 0; d < head_dim; d += kTileColumns, keys += kTileBytes) {
      fetch_tile(keys, s.ahead);
      load_tile<4>(s.q8[0] + d, kHeadStride);
      load_tile<6>(keys, kLineBytes);
      dot_tiles<0, 4, 6>();
      if constexpr (panels == 2) {
        fetch_tile(keys + stride, s.ahead);
        load_tile<7>(keys + stride, kLineBytes);
        dot_tiles<1, 4, 7>();
      }
    }
    store_tile<0>(s.score[0] + panel * kPanel, kTileStride * 4);
    if constexpr (panels == 2) store_tile<1>(s.score[0] + (panel + 1) * kPanel, kTileStride * 4);
  }

  // Columns [d, d + 32) of the sums.
  static LANES void add_panels(AttentionScratch& s, const uint8_t* values, int d, Span span) {
    const uint8_t *left = values + static_cast<int64_t>(d) * kPage, *right = left + kPage * kLanes;
    zero_tile<0>();
    zero_tile<1>();
    if (span.begin < kTileColumns) {
      fetch_tile(left, s.ahead);
      fetch_tile(right, s.ahead);
      load_tile<6>(left, kLineBytes);
      dot_tiles_us<0, 4, 6>();
      load_tile<7>(right, kLineBytes);
      dot_tiles_us<1, 4, 7>();
    }
    if (span.end > kTileColumns) {
      fetch_tile(left + kTileBytes, s.ahead);
      fetch_tile(right + kTileBytes, s.ahead);
      load_tile<6>(left + kTileBytes, kLineBytes);
      dot_tiles_us<0, 5, 6>();
      load_tile<7>(right + kTileBytes, kLineBytes);
      dot_tiles_us<1, 5, 7>();
    }
    store_tile<0>(s.tile_o[0] + d, kHeadStride * 4);
    store_tile<1>(s.tile_o[0] + d + kLanes, kHeadStride * 4);
  }
};

inline void attend_on_tiles(const AttentionTask& task, int h, int m0, int m1, void* scratch) {
  if (TileProducts::fits(task.cache)) return attend_with<TileProducts>(task, h, m0, m1, scratch);
  attend(task, h, m0, m1, scratch);
}

// `plain`: the table without tiles, which one row may do better without.
constexpr Kernels with_tiles(const Kernels& plain) {
  Kernels kernels = plain;
  kernels.for_one_row = &plain;
  kernels.linear = linear_on_tiles;
  kernels.multiply = multiply_in_cache<TileInt8>;
  kernels.multiply_halves = multiply_in_cache<TileHalves>;
  kernels.multiplies_halves = halves_on_tiles;
  kernels.attend = attend_on_tiles;
  kernels.few_rows = kTileBlockRows;
  kernels.few_panels = kTilePair;
  kernels.group_panels = kTileGroupPanels;
  kernels.enough_rows = 0;  // they are unpacked for up to kTileSuperRows at once
  kernels.gates = true;
  return kernels;
}

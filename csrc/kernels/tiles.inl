// Matrix products of quantized and of BF16 rows on tiles: what instruction sets with two-dimensional registers put in
// the place of linear.inl's and halves.inl's, at every number of rows. Integer sums are exact, and those of BF16 have
// the order in which tiles add, so they are the same to the last bit.
//
// 64 columns of a panel, unpacked, or 32 of BF16, are one tile of weights; 16 rows' 64 bytes are one tile of rows, used
// where they are. Two tiles of rows times two panels share four tiles of sums, which stay in registers over all
// columns. The first 32 rows unpack the panels as they go, a few tiles ahead of the multiplications, so that memory,
// vectors and tiles are busy at once: up to there a product takes the time of reading its weights. Rows that follow
// find the panels unpacked in the second cache, and write the block of results before theirs between two of their own
// steps.
#pragma once

constexpr int kTileBytes = kTileRows * kTileColumns;
constexpr int kTilePair = 2;
constexpr int kTileBlockRows = 2 * kTileRows;
constexpr int kTileFetchBytes = 4096;  // how far ahead each of the two panels is fetched
constexpr int kTileLead = 2;           // tiles unpacked ahead of their use
constexpr int kTileRing = 4;           // tiles kept where nobody needs them twice
constexpr int kTileMostSteps = 128;    // columns / 64 that a panel keeps unpacked; longer rows park their sums
constexpr int kTileSuperRows = 512;    // rows that share unpacked panels: at most these, and these bytes, which the
constexpr int64_t kTileSuperBytes = 1100 << 10;  // second cache holds next to the panels
constexpr int kTileGroupPanels = 8;

using TileSums = int32_t[kTilePair * kPanel];  // of one row
constexpr int64_t kTileSumsStride = sizeof(TileSums);

struct TileScratch {
  alignas(64) uint8_t weights[kTilePair][kTileMostSteps * kTileBytes];
  alignas(64) TileSums sums[kTileSuperRows];
  int shaped_for = 0;  // rows
};

// ---- where a tile of weights comes from ----
//
// unpack() writes the columns of a tile, as 16 lines, to `out`, unless they are used in place, and fetches what lies at
// `fetch`. kBytes: of a tile in the panel. What differs between integers and BF16 is in the two bases: the columns of a
// tile, the rows that it multiplies, the product, and what a sum is.

struct TileIntegers {
  static constexpr int kColumns = kBlock;
  LANES static const int8_t* row(const LinearTask& task, int m) { return task.quant.row(m); }
  LANES static int64_t stride(const LinearTask& task) { return task.quant.stride; }
  template <int sums, int rows, int weights>
  LANES static void dot() {
    dot_tiles<sums, rows, weights>();
  }
  LANES static F32 row_scale(const Panel& panel) { return load(panel.row_scale()); }
  // What finish_integer() does before there is a bias.
  LANES static F32 value(const LinearTask& task, int m, F32 scale, const int32_t* sums) {
    return mul(to_float(load(sums)), mul(set1(task.quant.scale[m]), scale));
  }
};

struct TileHalves {
  static constexpr int kColumns = kHalfColumns, kBytes = kTileBytes;
  static constexpr bool kInPlace = true;
  LANES static const int8_t* row(const LinearTask& task, int m) {
    return reinterpret_cast<const int8_t*>(task.halves.row(m));
  }
  LANES static int64_t stride(const LinearTask& task) { return task.halves.stride * int64_t{sizeof(uint16_t)}; }
  template <int sums, int rows, int weights>
  LANES static void dot() {
    dot_tiles_bf16<sums, rows, weights>();
  }
  LANES static F32 row_scale(const Panel&) { return set1(1.0f); }
  LANES static F32 value(const LinearTask&, int, F32, const int32_t* sums) {
    return load(reinterpret_cast<const float*>(sums));
  }
  static LANES void unpack(const Panel&, int, const uint8_t* fetch, uint8_t*) {
#pragma GCC unroll 16
    for (int i = 0; i < kBytes; i += kLineBytes) prefetch(fetch + i);
  }
};

struct TileInt8 : TileIntegers {
  static constexpr int kBytes = kTileBytes;
  static constexpr bool kInPlace = true;
  static LANES void unpack(const Panel&, int, const uint8_t* fetch, uint8_t*) {
#pragma GCC unroll 16
    for (int i = 0; i < kBytes; i += kLineBytes) prefetch(fetch + i);
  }
};

template <int group>
struct TileInt4 : TileIntegers {
  static constexpr int kBytes = kTileBytes / 2;
  static constexpr bool kInPlace = false;
  static LANES NibbleScale scale(const Panel& panel, int k) {
    return nibble_scale(panel.scales + k / group * panel.scale_stride);
  }
  static LANES void unpack(const Panel& panel, int step, const uint8_t* fetch, uint8_t* out) {
    const uint8_t* at = panel.lines + static_cast<int64_t>(step) * kBytes;
    const NibbleScale low = scale(panel, step * kBlock);
    const NibbleScale high = group >= kBlock ? low : scale(panel, step * kBlock + kSumColumns);
#pragma GCC unroll 8
    for (int i = 0; i < kBytes; i += kLineBytes) {
      prefetch(fetch + i);
      store_quads(out + i, scaled_nibbles<0>(at + i, low));
      store_quads(out + i + kBytes, scaled_nibbles<1>(at + i, high));
    }
  }
};

struct TileInt3 : TileIntegers {
  static constexpr int kBytes = kTileBytes * 3 / 8;
  static constexpr bool kInPlace = false;
  static LANES void unpack(const Panel& panel, int step, const uint8_t* fetch, uint8_t* out) {
    for (int i = 0; i < kBytes; i += kLineBytes) prefetch(fetch + i);
    unpack_octals<0>(panel, step * kBlock, out);
    unpack_octals<0>(panel, step * kBlock + kSumColumns, out + kTileBytes / 2);
  }
};

struct TileChannels : TileIntegers {
  static constexpr int kBytes = 0;
  static constexpr bool kInPlace = false;
  static LANES void unpack(const Panel& panel, int step, const uint8_t*, uint8_t* out) {
    unpack_channels(panel, step * kBlock, kBlock, out);
  }
};

// The panels that one pass multiplies: neighbours, or the same one of two matrices.
LANES int pass_panels(const LinearTask& task) { return task.up ? 1 : kTilePair; }
template <int panels>
inline void find_panels(const LinearTask& task, int p, Panel (&panel)[panels]) {
  panel[0] = panel_at(*task.weights, p);
  if constexpr (panels == 2) panel[1] = task.up ? panel_at(*task.up, p) : panel_at(*task.weights, p + 1);
}

// One or two panels, tile after tile. `skip`: bytes from a panel's end to the panel that the next pass reads.
template <class Source, int panels>
class TileReader {
 public:
  LANES TileReader(const LinearTask& task, const Panel (&panel)[panels], int first) : panel_(panel), step_(first) {
    const int steps = task.weights->columns / Source::kColumns;
    skip_ = panels == 2 && !task.up ? panel[1].base - panel[0].base : 0;
    for (int i = 0; i < panels; ++i) {
      fetch_[i] = panel[i].lines + static_cast<int64_t>(first) * Source::kBytes + kTileFetchBytes;
      end_[i] = panel[i].lines + static_cast<int64_t>(steps) * Source::kBytes;
    }
  }
  // The next tile of each panel, at `out` bytes into its scratch.
  LANES void next(TileScratch& scratch, int64_t out) {
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) {
      Source::unpack(panel_[i], step_, fetch_[i] < end_[i] ? fetch_[i] : fetch_[i] + skip_, scratch.weights[i] + out);
      fetch_[i] += Source::kBytes;
    }
    ++step_;
  }

 private:
  const Panel (&panel_)[panels];
  const uint8_t *fetch_[panels], *end_[panels];
  int64_t skip_;
  int step_;
};

// ---- tiles of sums ----

template <bool bottom, int panels>
LANES void load_sums(const TileSums* from) {
  load_tile<0>(from[0], kTileSumsStride);
  if constexpr (panels == 2) load_tile<1>(from[0] + kPanel, kTileSumsStride);
  if constexpr (bottom) load_tile<2>(from[kTileRows], kTileSumsStride);
  if constexpr (bottom && panels == 2) load_tile<3>(from[kTileRows] + kPanel, kTileSumsStride);
}
template <bool bottom, int panels>
LANES void zero_sums() {
  zero_tile<0>();
  if constexpr (panels == 2) zero_tile<1>();
  if constexpr (bottom) zero_tile<2>();
  if constexpr (bottom && panels == 2) zero_tile<3>();
}
template <bool bottom, int panels>
LANES void store_sums(TileSums* to) {
  store_tile<0>(to[0], kTileSumsStride);
  if constexpr (panels == 2) store_tile<1>(to[0] + kPanel, kTileSumsStride);
  if constexpr (bottom) store_tile<2>(to[kTileRows], kTileSumsStride);
  if constexpr (bottom && panels == 2) store_tile<3>(to[kTileRows] + kPanel, kTileSumsStride);
}

// An operand that is read `once` while the first cache could hold it is not to be kept there.
template <bool once, int tile>
LANES void load_operand(const void* p, int64_t stride) {
  if constexpr (once) {
    load_tile_once<tile>(p, stride);
  } else {
    load_tile<tile>(p, stride);
  }
}

// The sums of two tiles of rows (one, if not `bottom`) and one or two tiles of weights, plus their products.
template <class Source, bool once, bool bottom, int panels>
LANES void multiply_tiles(const uint8_t* const (&weights)[panels], int64_t at, const int8_t* rows, int64_t stride) {
  load_operand<once, 6>(weights[0] + at, kLineBytes);
  load_operand<once, 4>(rows, stride);
  Source::template dot<0, 4, 6>();
  if constexpr (panels == 2) {
    load_operand<once, 7>(weights[1] + at, kLineBytes);
    Source::template dot<1, 4, 7>();
  }
  if constexpr (bottom) {
    load_operand<once, 5>(rows + kTileRows * stride, stride);
    Source::template dot<2, 5, 6>();
    if constexpr (panels == 2) Source::template dot<3, 5, 7>();
  }
}

// ---- rows times panels ----

// Results that are summed and not yet written.
template <class Source, int panels>
class TileResults {
 public:
  LANES TileResults(const LinearTask& task, const Panel (&panel)[panels], int p) : task_(task), panel_(panel), p_(p) {
    plain_ = !task.bias && task.weights->rows >= (p + (task.up ? 1 : panels)) * kPanel;
    for (int i = 0; i < panels; ++i) scale_[i] = Source::row_scale(panel[i]);
  }

  LANES void take(const TileSums* sums, int m, int rows) {
    sums_ = sums;
    m_ = m;
    left_ = rows;
  }
  LANES void write(int rows) {
    for (; rows > 0 && left_ > 0; --rows, --left_, ++m_, ++sums_) {
      if (task_.up) {
        if constexpr (panels == 2) write_gated();
      } else if (plain_) {
        write_plain();
      } else {
        for (int i = 0; i < panels; ++i) write_output(task_, m_, p_ + i, result(i));
      }
    }
  }
  // Where the results of row m are going to be written.
  LANES void fetch(int m) const {
    const float* out = task_.output.row(m) + p_ * kPanel;
    for (int i = 0; i < panels && i < pass_panels(task_); ++i) __builtin_prefetch(out + i * kPanel, 1, 3);
  }

 private:
  LANES F32 result(int i) const { return Source::value(task_, m_, scale_[i], *sums_ + i * kPanel); }
  // What write_output() does, where there is no bias and no column is missing.
  LANES void write_plain() const {
    float* out = task_.output.row(m_) + p_ * kPanel;
    for (int i = 0; i < panels; ++i, out += kPanel)
      store(out, task_.accumulate ? add(load(out), result(i)) : result(i));
  }
  // What activate() makes of two products.
  void write_gated() const {
    const F32 y = mul(activation_of(task_.activation, result(0)), result(1));
    if (plain_) return store(task_.output.row(m_) + p_ * kPanel, y);
    store_columns(task_.output.row(m_), y, p_ * kPanel, task_.weights->rows);
  }

  const LinearTask& task_;
  const Panel (&panel_)[panels];
  int p_, m_ = 0, left_ = 0;
  bool plain_;
  F32 scale_[panels];
  const TileSums* sums_ = nullptr;
};

// One or two panels from p on times rows, 32 at a time.
template <class Source, int panels>
class TileProduct {
 public:
  LANES TileProduct(const LinearTask& task, TileScratch& scratch, int p) : task_(task), scratch_(scratch), p_(p) {
    find_panels(task, p, panel_);
  }

  // At most 32 rows: a tile of weights is forgotten when it was used.
  template <bool bottom>
  LANES void run_few() {
    const int steps = task_.weights->columns / Source::kColumns;
    zero_sums<bottom, panels>();
    multiply_first<bottom, kTileRing>(0, 0, steps);
    store_sums<bottom, panels>(scratch_.sums);
    TileResults<Source, panels> results(task_, panel_, p_);
    results.take(scratch_.sums, 0, task_.num_rows);
    results.write(task_.num_rows);
  }

  // Rows [m0, m1), at most kTileSuperRows of them.
  void run(int m0, int m1) {
    const int all = task_.weights->columns / Source::kColumns;
    const bool parked = all > kTileMostSteps;
    TileResults<Source, panels> results(task_, panel_, p_);
    for (int first = 0; first < all; first += kTileMostSteps) {
      const int steps = all - first < kTileMostSteps ? all - first : kTileMostSteps;
      for (int m = m0; m < m1; m += kTileBlockRows) {
        const int rows = m1 - m < kTileBlockRows ? m1 - m : kTileBlockRows;
        TileSums* sums = scratch_.sums + (parked ? m - m0 : (m - m0) % (2 * kTileBlockRows));
        shape(rows);
        if (rows > kTileRows) {
          multiply<true>(results, sums, m0, m, first, steps);
        } else {
          multiply<false>(results, sums, m0, m, first, steps);
        }
        if (first + steps < all) continue;
        results.write(kTileBlockRows);
        results.take(sums, m, rows);
      }
    }
    results.write(kTileBlockRows);
  }

 private:
  void shape(int rows) {
    if (rows == scratch_.shaped_for) return;
    begin_tiles(rows < kTileRows ? rows : kTileRows, rows > kTileRows ? rows - kTileRows : 0);
    scratch_.shaped_for = rows;
  }

  template <bool bottom>
  LANES void multiply(TileResults<Source, panels>& results, TileSums* sums, int m0, int m, int first, int steps) {
    if (first == 0) {
      zero_sums<bottom, panels>();
    } else {
      load_sums<bottom, panels>(sums);
    }
    if (m == m0) {
      multiply_first<bottom, kTileMostSteps>(m, first, steps);
    } else {
      multiply_next<bottom>(results, m, first, steps);
    }
    store_sums<bottom, panels>(sums);
  }

  template <bool bottom, int ring>
  LANES void multiply_first(int m, int first, int steps) {
    TileReader<Source, panels> reader(task_, panel_, first);
    const int8_t* x = Source::row(task_, m) + first * kTileColumns;
    const uint8_t* weights[panels];
    set_weights(weights, first);
    constexpr int kLead = Source::kInPlace ? 0 : kTileLead;
    for (int step = 0; step < kLead && step < steps; ++step) reader.next(scratch_, step % ring * kTileBytes);
    for (int step = 0; step < steps; ++step, x += kTileColumns) {
      const int ahead = step + kLead, place = Source::kInPlace ? step : step % ring;
      if (ahead < steps) reader.next(scratch_, int64_t{ahead % ring} * kTileBytes);
      multiply_tiles<Source, false, bottom, panels>(weights, int64_t{place} * kTileBytes, x, Source::stride(task_));
    }
  }

  template <bool bottom>
  LANES void multiply_next(TileResults<Source, panels>& results, int m, int first, int steps) {
    const int each = (kTileBlockRows + steps - 1) / steps;
    const int rows = bottom ? kTileBlockRows : kTileRows;
    const int8_t* x = Source::row(task_, m) + first * kTileColumns;
    const uint8_t* weights[panels];
    set_weights(weights, first);
    for (int step = 0; step < steps; ++step, x += kTileColumns) {
      if (step < rows) results.fetch(m + step);
      results.write(each);
      multiply_tiles<Source, true, bottom, panels>(weights, int64_t{step} * kTileBytes, x, Source::stride(task_));
    }
  }

  LANES void set_weights(const uint8_t* (&weights)[panels], int first) const {
    for (int i = 0; i < panels; ++i)
      weights[i] = Source::kInPlace ? panel_[i].lines + int64_t{first} * kTileBytes : scratch_.weights[i];
  }

  const LinearTask& task_;
  TileScratch& scratch_;
  int p_;
  Panel panel_[panels];
};

// ---- the operation ----

template <class Source, bool bottom>
inline void few_rows_on_tiles(const LinearTask& task, TileScratch& scratch, int p0, int p1) {
  begin_tiles(bottom ? kTileRows : task.num_rows, bottom ? task.num_rows - kTileRows : 0);
  int p = p0;
  const int each = pass_panels(task);
  for (; p + each <= p1; p += each) TileProduct<Source, 2>(task, scratch, p).template run_few<bottom>();
  if (p < p1) TileProduct<Source, 1>(task, scratch, p).template run_few<bottom>();
}

template <class Source>
inline void on_tiles(const LinearTask& task, int p0, int p1) {
  TileScratch scratch;
  if (task.num_rows <= kTileRows) return few_rows_on_tiles<Source, false>(task, scratch, p0, p1);
  if (task.num_rows <= kTileBlockRows) return few_rows_on_tiles<Source, true>(task, scratch, p0, p1);
  const int64_t fit = kTileSuperBytes / Source::stride(task);
  const int most = fit > kTileSuperRows   ? kTileSuperRows
                   : fit < kTileBlockRows ? kTileBlockRows
                                          : static_cast<int>(fit);
  for (int m = 0, size; m < task.num_rows; m += size) {
    size = (tile_rows(task.num_rows - m, most / kTileBlockRows * kTileBlockRows) + kTileBlockRows - 1) /
           kTileBlockRows * kTileBlockRows;
    const int end = m + size < task.num_rows ? m + size : task.num_rows;
    int p = p0;
    const int each = pass_panels(task);
    for (; p + each <= p1; p += each) TileProduct<Source, 2>(task, scratch, p).run(m, end);
    if (p < p1) TileProduct<Source, 1>(task, scratch, p).run(m, end);
  }
}

inline void linear_on_tiles(const LinearTask& task, int p0, int p1) {
  const snello_tensor& w = *task.weights;
  const bool halves = task.halves.data && w.columns % kHalfColumns == 0 && halves_on_tiles();
  if (task.num_rows <= 0 || (!task.quantized && !halves)) return linear(task, p0, p1);
  if (halves) {
    on_tiles<TileHalves>(task, p0, p1);
  } else if (by_channel(w.format)) {
    if (task.num_rows <= kDirectRowsChannels) return linear(task, p0, p1);
    on_tiles<TileChannels>(task, p0, p1);
  } else if (w.format == SNELLO_INT8) {
    on_tiles<TileInt8>(task, p0, p1);
  } else if (w.format == SNELLO_INT3) {
    on_tiles<TileInt3>(task, p0, p1);
  } else if (w.group_size == 32) {
    on_tiles<TileInt4<32>>(task, p0, p1);
  } else if (w.group_size == 64) {
    on_tiles<TileInt4<64>>(task, p0, p1);
  } else {
    on_tiles<TileInt4<128>>(task, p0, p1);
  }
  end_tiles();
}

// Two tiles of rows times two of weights, over as many columns as the first cache holds with room to spare. Operands
// are numbers like any: products of zeros take less power, and a processor clocks higher for them.
template <class Source>
inline int64_t multiply_in_cache(int passes) {
  constexpr int kSteps = 8;
  alignas(64) uint8_t rows[kTileBlockRows * kSteps * kTileColumns], weights[kTilePair][kSteps * kTileBytes];
  TileSums sums[kTileBlockRows];
  uint32_t state = 1;
  const auto fill = [&state](uint8_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
    if constexpr (Source::kColumns == kHalfColumns)  // sign and mantissa at random, magnitudes near 1
      for (int64_t i = 1; i < count; i += 2) to[i] = static_cast<uint8_t>((to[i] & 0x80) | 0x3f);
  };
  fill(rows, sizeof rows);
  fill(weights[0], sizeof weights);
  const uint8_t* const panels[kTilePair] = {weights[0], weights[1]};
  begin_tiles(kTileRows, kTileRows);
  zero_sums<true, kTilePair>();
  for (int pass = 0; pass < passes; ++pass)
    for (int step = 0; step < kSteps; ++step)
      multiply_tiles<Source, false, true, kTilePair>(panels, int64_t{step} * kTileBytes,
                                                     reinterpret_cast<const int8_t*>(rows) + step * kTileColumns,
                                                     kSteps * kTileColumns);
  store_sums<true, kTilePair>(sums);
  end_tiles();
  return 2 * int64_t{kTileBlockRows} * kTilePair * kPanel * Source::kColumns * kSteps * passes;
}

// Matrix products of quantized rows on tiles: what instruction sets with two-dimensional registers put in the place of
// linear.inl's many rows. Integer sums are exact, so they are the same to the last bit.
//
// 64 columns of a panel, unpacked, are one tile of weights; 16 rows' 64 bytes are one tile of rows, used where they
// are. Two tiles of rows times two panels share four tiles of sums, which stay in registers over a chunk of columns
// whose weights stay in L1, and are parked between chunks. A group of panels takes the same rows one after the other,
// so that they are read from far away once. With few rows the weights are what is far away: they are read in their own
// order.
#pragma once

constexpr int kTileBytes = kTileRows * kTileColumns;
constexpr int kTileLeastRows = 5;  // fewer go straight from packed lines
constexpr int kTileFewRows = 32;   // as long as reading the weights takes longer than multiplying
constexpr int kTileStepColumns = 1024;
constexpr int kTileSuperRows = 512;
constexpr int kTileGroupPanels = 8;
constexpr int kTilePair = 2;

struct TileScratch {
  alignas(64) uint8_t weights[kTilePair][kTileStepColumns * kPanel];
  alignas(64) int32_t result[2 * kTileRows][kTilePair * kPanel];
  alignas(64) int32_t sums[kTileGroupPanels / kTilePair][kTileSuperRows][kTilePair * kPanel];
};
constexpr int64_t kTileSumsStride = kTilePair * kPanel * sizeof(int32_t);

inline const uint8_t* copy_lines(const uint8_t* from, int count, uint8_t* out) {
  for (int i = 0; i < count * kPanel; i += kLineBytes) {
    prefetch(from + i + kPrefetchBytes);
    store_quads(out + i, load_quads(from + i));
  }
  return out;
}

// Two tiles of rows (one, if `bottom` is false) and one or two panels: where they are.
struct TileOperands {
  const int8_t* rows;
  int64_t stride;
  const uint8_t* weights[kTilePair];
  int columns;
};

template <bool bottom, int panels>
inline void load_sums(const int32_t* from) {
  load_tile<0>(from, kTileSumsStride);
  if constexpr (panels == 2) load_tile<1>(from + kPanel, kTileSumsStride);
  const int32_t* below = from + kTileRows * kTilePair * kPanel;
  if constexpr (bottom) load_tile<2>(below, kTileSumsStride);
  if constexpr (bottom && panels == 2) load_tile<3>(below + kPanel, kTileSumsStride);
}
template <bool bottom, int panels>
inline void zero_sums() {
  zero_tile<0>();
  if constexpr (panels == 2) zero_tile<1>();
  if constexpr (bottom) zero_tile<2>();
  if constexpr (bottom && panels == 2) zero_tile<3>();
}
template <bool bottom, int panels>
inline void store_sums(int32_t* to) {
  store_tile<0>(to, kTileSumsStride);
  if constexpr (panels == 2) store_tile<1>(to + kPanel, kTileSumsStride);
  int32_t* below = to + kTileRows * kTilePair * kPanel;
  if constexpr (bottom) store_tile<2>(below, kTileSumsStride);
  if constexpr (bottom && panels == 2) store_tile<3>(below + kPanel, kTileSumsStride);
}

// Sums from `before` (null: 0) plus these columns' products, to `after`.
template <bool bottom, int panels>
inline void multiply_tiles(const TileOperands& x, const int32_t* before, int32_t* after) {
  if (before) {
    load_sums<bottom, panels>(before);
  } else {
    zero_sums<bottom, panels>();
  }
  const int8_t* below = x.rows + kTileRows * x.stride;
  for (int k = 0; k < x.columns; k += kTileColumns) {
    load_tile<6>(x.weights[0] + k * kPanel, kLineBytes);
    load_tile<4>(x.rows + k, x.stride);
    dot_tiles<0, 4, 6>();
    if constexpr (panels == 2) {
      load_tile<7>(x.weights[1] + k * kPanel, kLineBytes);
      dot_tiles<1, 4, 7>();
    }
    if constexpr (bottom) {
      load_tile<5>(below + k, x.stride);
      dot_tiles<2, 5, 6>();
      if constexpr (panels == 2) dot_tiles<3, 5, 7>();
    }
  }
  store_sums<bottom, panels>(after);
}

inline void multiply_tiles(const TileOperands& x, int rows, int panels, const int32_t* before, int32_t* after) {
  const bool bottom = rows > kTileRows;
  if (panels == 2)
    return bottom ? multiply_tiles<true, 2>(x, before, after) : multiply_tiles<false, 2>(x, before, after);
  return bottom ? multiply_tiles<true, 1>(x, before, after) : multiply_tiles<false, 1>(x, before, after);
}

// Rows [m0, m0 + rows) x panels [p, p + panels), at most kTileSuperRows and kTileGroupPanels.
class TileBlock {
 public:
  TileBlock(const LinearTask& task, TileScratch& scratch, int m0, int rows)
      : task_(task), scratch_(scratch), m0_(m0), rows_(rows) {}

  void run(int p, int panels) {
    for (int k = 0; k < task_.weights->columns; k += kTileStepColumns)
      for (int i = 0; i < panels; i += kTilePair)
        run_columns(p + i, panels - i < kTilePair ? panels - i : kTilePair, k, scratch_.sums[i / kTilePair]);
  }

 private:
  // Columns from k on of one or two panels, over all rows.
  void run_columns(int p, int panels, int k, int32_t (*sums)[kTilePair * kPanel]) {
    const int left = task_.weights->columns - k, count = left < kTileStepColumns ? left : kTileStepColumns;
    TileOperands x{nullptr, task_.quant.stride, {}, count};
    for (int i = 0; i < panels; ++i) x.weights[i] = unpack(panel_at(*task_.weights, p + i), k, count, i);
    for (int m = 0; m < rows_; m += 2 * kTileRows) {
      const int rows = rows_ - m < 2 * kTileRows ? rows_ - m : 2 * kTileRows;
      shape(rows);
      x.rows = task_.quant.row(m0_ + m) + k;
      const bool last = count == left;
      multiply_tiles(x, rows, panels, k > 0 ? sums[m] : nullptr, last ? scratch_.result[0] : sums[m]);
      if (last) finish(m0_ + m, rows, p, panels);
    }
  }

  const uint8_t* unpack(const Panel& panel, int k, int count, int place) {
    if (panel.format == SNELLO_INT8 && panel.stride == 0 && rows_ <= kTileFewRows)
      return copy_lines(panel.lines + static_cast<int64_t>(k) * kPanel, count, scratch_.weights[place]);
    return unpack_integer<kPrefetchBytes>(panel, k, count, scratch_.weights[place]);
  }

  void shape(int rows) {
    if (rows == shaped_for_) return;
    begin_tiles(rows < kTileRows ? rows : kTileRows, rows > kTileRows ? rows - kTileRows : 0);
    shaped_for_ = rows;
  }

  void finish(int m, int rows, int p, int panels) {
    for (int i = 0; i < panels; ++i) {
      const Panel panel = panel_at(*task_.weights, p + i);
      for (int r = 0; r < rows; ++r) finish_integer(task_, m + r, p + i, panel, load(scratch_.result[r] + i * kPanel));
    }
  }

  const LinearTask& task_;
  TileScratch& scratch_;
  int m0_, rows_, shaped_for_ = 0;
};

inline void linear_on_tiles(const LinearTask& task, int p0, int p1) {
  if (!task.quantized || task.num_rows < kTileLeastRows) return linear(task, p0, p1);
  TileScratch scratch;
  const int group = task.num_rows <= kTileFewRows ? 1 : kTileGroupPanels;
  for (int m = 0, size; m < task.num_rows; m += size) {
    size = tile_rows(task.num_rows - m, kTileSuperRows);
    TileBlock block(task, scratch, m, size);
    for (int p = p0; p < p1; p += group) block.run(p, p1 - p < group ? p1 - p : group);
  }
  end_tiles();
}

constexpr Kernels with_tiles(Kernels kernels) {
  kernels.linear = linear_on_tiles;
  kernels.few_rows = kTileFewRows;
  kernels.group_panels = kTileGroupPanels;
  return kernels;
}

// Matrix products: rows of activations times packed weights, for every format and both kinds of input.
//
// Two ways lead to the same bits. A few rows ("direct") unpack each packed line straight into registers, and are
// bound by memory as long as they can. More rows ("blocked") unpack a few panels' chunk of columns into a cache-sized
// scratch, then run register tiles of kRowBlock rows x kPanelBlock panels over it, parking partial sums between chunks.
// Integer sums are exact and a float output is one ascending chain over k, so neither the way nor the tile can change a
// result.
#pragma once

constexpr int kLineBytes = 64;
// How far ahead weights are fetched. One row needs them as fast as memory gives: over a page ahead, into L1, where the
// hardware stops at the end of a page and nothing else asks in time. With more rows there is time: L2, further ahead.
constexpr int kPrefetchBytes = 8192, kPrefetchBytesL1 = 6144;
constexpr int kSuperRows = 96;        // rows whose partial sums are parked at once
constexpr int kGroupPanels = 4;       // panels unpacked at once
constexpr int kIntegerColumns = 256;  // columns unpacked at once, for INT8 and for FP32 operands
constexpr int kFloatColumns = 256;
constexpr int kRowGap = 64;  // bytes between copied rows, so that they do not share cache sets

// One panel of a packed matrix: where its parts are (docs/numerics.md, Layout).
struct Panel {
  const uint8_t* base;
  const uint8_t* lines;   // weights
  const uint8_t* scales;  // of groups
  int format;             // of the integers, however they are stored
  int group_shift;        // groups of 2^group_shift columns
  int64_t scale_stride;
  int64_t stride;  // bytes from channel to channel where the matrix is stored by channel, else 0
  int part;        // then: which 16 rows of the lines
  const float* row_scale() const { return reinterpret_cast<const float*>(base); }
  const uint8_t* group_scale(int column) const { return scales + (column >> group_shift) * scale_stride; }
};

LANES ChannelLayout channel_layout_of(const snello_tensor& w) {
  return channel_layout(w.format, w.rows, w.columns, w.group_size);
}

// 31, which is one group, where there are none.
LANES int group_shift(const snello_tensor& w) { return __builtin_ctz(static_cast<unsigned>(w.group_size) | 1u << 31); }

inline Panel panel_by_channel(const snello_tensor& w, int p) {
  const ChannelLayout layout = channel_layout_of(w);
  const int64_t row = static_cast<int64_t>(p) * kPanel, slab = row / layout.slab_rows;
  const ChannelBlock block = layout.block(slab / kBlockSlabs);
  const int64_t in_block = row % (kBlockSlabs * layout.slab_rows);
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + block.offset;
  return {base + 4 * in_block,
          base + block.lines + slab % kBlockSlabs * kSlabBytes,
          base + block.scales + in_block,
          integers_of(w.format),
          group_shift(w),
          block.rows,
          block.stride,
          static_cast<int>(row % layout.slab_rows / kPanel)};
}

LANES int64_t panel_bytes(const snello_tensor& w) {
  return static_cast<int64_t>(w.bytes) / ((w.rows + kPanel - 1) / kPanel);
}

inline Panel panel_at(const snello_tensor& w, int p) {
  if (by_channel(w.format)) return panel_by_channel(w, p);
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + p * panel_bytes(w);
  int header = 0;
  if (w.format == SNELLO_INT8) header = 2 * kLineBytes;  // scales, sums
  if (w.format > SNELLO_INT8) {
    const int groups = (w.columns + w.group_size - 1) / w.group_size;
    header = kLineBytes + (groups * kPanel + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
  return {base, base + header, base + kLineBytes, w.format, group_shift(w), kPanel, 0, 0};
}

LANES void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// A line of weights that `rows` rows will use.
template <int rows>
LANES void prefetch_direct(const uint8_t* line) {
  if constexpr (rows == 1) return __builtin_prefetch(line + kPrefetchBytesL1, 0, 3);
  prefetch(line + kPrefetchBytes);
}

// Calls tile.run<n>() for the n in 1..most that equals `rows`.
template <int most, class Tile>
inline void with_rows(int rows, const Tile& tile) {
  if (rows == most) return tile.template run<most>();
  if constexpr (most > 1) with_rows<most - 1>(rows, tile);
}

// Rows [m, m + size) of the next tile: tiles of nearly equal size, at most `most`.
inline int tile_rows(int left, int most) {
  const int tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// ---- epilogue ----

inline void write_output(const LinearTask& task, int m, int p, F32 y) {
  const int column = p * kPanel, left = task.weights->rows - column;
  float* out = task.output.row(m) + column;
  if (task.bias) y = add(y, load_columns(task.bias, column, task.weights->rows));
  if (task.accumulate) y = add(load_columns(task.output.row(m), column, task.weights->rows), y);
  if (left >= kLanes) return store(out, y);
  store_partial(out, y, left);
}

inline void finish_integer(const LinearTask& task, int m, int p, const Panel& panel, I32 acc) {
  const F32 scale = mul(set1(task.quant.scale[m]), load(panel.row_scale()));
  write_output(task, m, p, mul(to_float(acc), scale));
}

inline void finish_float(const LinearTask& task, int m, int p, const Panel& panel, F32 acc) {
  const bool scaled = panel.format >= SNELLO_INT8;
  write_output(task, m, p, scaled ? mul(acc, load(panel.row_scale())) : acc);
}

// What dot_weights() put on top of a row's sums.
inline int32_t weight_bias(const LinearTask& task, int m) {
  if (kWeightBias == 0) return 0;
  const int blocks = task.quant.width / kSumColumns;
  const int32_t* sums = task.quant.row_sums(m);
  int32_t total = 0;
  for (int b = 0; b < blocks; ++b) total += sums[b];
  return total * kWeightBias;
}

#include "kernels/direct.inl"
#include "kernels/channels.inl"

inline bool many_integer_rows(const LinearTask& task) {
  if (!task.quantized) return false;
  return by_channel(task.weights->format) ? task.num_rows > kDirectRowsChannels : !few_integer_rows(task);
}

// ---- quantized input, many rows ----

struct IntegerScratch {
  alignas(64) uint8_t weights[kGroupPanels][kIntegerColumns * kPanel];
  alignas(64) int32_t sums[kSuperRows][kGroupPanels][kPanel];
  int32_t start[kSuperRows];  // what takes the bias of the weights off
};

// The same of a matrix that is stored by channel: four lines are interleaved, and this panel's part is kept.
inline const uint8_t* unpack_channels(const Panel& panel, int k, int count, uint8_t* out) {
  alignas(64) uint8_t quads[kLineBytes];
  for (int i = 0; i < count; i += 4) {
    const uint8_t* at = panel.lines + (k + i) * panel.stride;
    const Interleaved lines = interleave(at, at + panel.stride, at + 2 * panel.stride, at + 3 * panel.stride);
    uint8_t* to = out + i * kPanel;
    if (panel.format == SNELLO_INT8) {
      store_quads(to, lines.v[panel.part]);
      continue;
    }
    store_quads(quads, lines.v[panel.part % 4]);
    const NibbleScale scale = nibble_scale(panel.group_scale(k + i));
    store_quads(to, panel.part < 4 ? scaled_nibbles<0>(quads, scale) : scaled_nibbles<1>(quads, scale));
  }
  return out;
}

// The 32 columns from k on of a panel of INT3, as 8 lines of signed bytes.
template <int line = 0>
LANES void store_octals(const Octals& octals, const OctalScale& scale, uint8_t* out) {
  store_quads(out + line * kLineBytes, scaled_octals<line>(octals, scale));
  if constexpr (line < 7) store_octals<line + 1>(octals, scale, out);
}
template <int fetch_bytes>
LANES void unpack_octals(const Panel& panel, int k, uint8_t* out) {
  const uint8_t* at = panel.lines + static_cast<int64_t>(k / kSumColumns) * 3 * kLineBytes;
  if constexpr (fetch_bytes > 0)
    for (int i = 0; i < 3; ++i) prefetch(at + fetch_bytes + i * kLineBytes);
  store_octals(load_octals(at), octal_scale(panel.group_scale(k)), out);
}

// Columns [k, k + count) of a panel as signed bytes; INT8 weights are used where they are.
template <int fetch_bytes>
inline const uint8_t* unpack_integer(const Panel& panel, int k, int count, uint8_t* out) {
  if (panel.stride) return unpack_channels(panel, k, count, out);
  if (panel.format == SNELLO_INT8) return panel.lines + static_cast<int64_t>(k) * kPanel;
  if (panel.format == SNELLO_INT3) {
    for (int b = 0; b < count; b += kSumColumns) unpack_octals<fetch_bytes>(panel, k + b, out + b * kPanel);
    return out;
  }
  for (int b = 0; b < count; b += kBlock) {
    const uint8_t* at = panel.lines + static_cast<int64_t>((k + b) / kBlock) * 8 * kLineBytes;
    const NibbleScale low = nibble_scale(panel.group_scale(k + b));
    const NibbleScale high = nibble_scale(panel.group_scale(k + b + kSumColumns));
    for (int i = 0; i < 8; ++i, at += kLineBytes) {
      if constexpr (fetch_bytes > 0) prefetch(at + fetch_bytes);
      store_quads(out + b * kPanel + kLineBytes * i, scaled_nibbles<0>(at, low));
      store_quads(out + b * kPanel + kLineBytes * (i + 8), scaled_nibbles<1>(at, high));
    }
  }
  return out;
}

// A chunk of columns of some panels: the weights to multiply, and where the next chunk's lie. Unpacking is a burst that
// memory cannot follow, so while one chunk is multiplied the next is fetched, a little with each line.
struct IntegerChunk {
  int columns;
  const uint8_t* weights[kGroupPanels];
  const uint8_t* next[kGroupPanels];
  int next_bytes;  // of the next chunk for each line of this one
};

struct IntegerTile {
  static constexpr int kRows = kRowBlock;
  IntegerScratch& scratch;
  const IntegerChunk& chunk;
  const int8_t* x;  // first row, first column
  int64_t stride;
  int row, panel, panels_left;  // first row of the sums, first panel of the group
  template <int rows>
  void run() const {
    if (panels_left >= kPanelBlock) return run_panels<rows, kPanelBlock>();
    run_panels<rows, 1>();
  }
  template <int rows, int panels>
  void run_panels() const {
    I32 acc[rows][panels];
    const uint8_t *at[panels], *next[panels];
    for (int p = 0; p < panels; ++p) at[p] = chunk.weights[panel + p];
    for (int p = 0; p < panels; ++p) next[p] = chunk.next[panel + p];
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) acc[r][p] = load(scratch.sums[row + r][panel + p]);
    for (int line = 0; line < chunk.columns / 4; ++line) {
      Quads w[panels];
      for (int p = 0; p < panels; ++p) {
        prefetch(next[p] + line * chunk.next_bytes);
        w[p] = as_weights(load_quads(at[p] + line * kLineBytes));
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Quads q = set1_quad(x + r * stride + 4 * line);
        for (int p = 0; p < panels; ++p) acc[r][p] = dot_weights(acc[r][p], w[p], q);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) store(scratch.sums[row + r][panel + p], acc[r][p]);
  }
};

// Lines are shared by the panels of a slab: each panel fetches every fourth of the next chunk's channels.
inline IntegerChunk chunk_by_channel(const snello_tensor& w, IntegerScratch& scratch, int p, int panels, int k,
                                     int count) {
  IntegerChunk chunk;
  chunk.columns = count;
  const int following = k + count < w.columns ? k + count : 0;
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(w, p + i);
    chunk.weights[i] = unpack_integer<0>(panel, k, count, scratch.weights[i]);
    chunk.next[i] = panel.lines + (following + i % 4) * panel.stride;
    chunk.next_bytes = static_cast<int>(4 * panel.stride);
  }
  return chunk;
}

inline IntegerChunk chunk_at(const snello_tensor& w, IntegerScratch& scratch, int p, int panels, int k) {
  const int left = w.columns - k, count = left < kIntegerColumns ? left : kIntegerColumns;
  IntegerChunk chunk;
  chunk.columns = count;
  if (by_channel(w.format)) return chunk_by_channel(w, scratch, p, panels, k, count);
  chunk.next_bytes = w.format == SNELLO_INT8   ? kLineBytes
                     : w.format == SNELLO_INT4 ? kLineBytes / 2
                                               : kLineBytes * 3 / 8;
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(w, p + i);
    chunk.weights[i] = unpack_integer<0>(panel, k, count, scratch.weights[i]);
    const uint8_t* following = left > count ? panel.lines : panel_at(w, p + i + panels).lines;
    chunk.next[i] = following + static_cast<int64_t>(left > count ? k + count : 0) / 4 * chunk.next_bytes;
  }
  return chunk;
}

// Rows [m0, m0 + rows) x panels [p, p + panels), panels at most kGroupPanels, rows at most kSuperRows.
template <class Tile>
inline void blocked_integer(const LinearTask& task, IntegerScratch& scratch, int m0, int rows, int p, int panels) {
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < panels; ++i) store(scratch.sums[m][i], set1(scratch.start[m]));
  for (int k = 0; k < task.weights->columns; k += kIntegerColumns) {
    const IntegerChunk chunk = chunk_at(*task.weights, scratch, p, panels, k);
    for (int m = 0, size; m < rows; m += size) {
      size = tile_rows(rows - m, Tile::kRows);
      const int8_t* x = task.quant.row(m0 + m) + k;
      for (int i = 0; i < panels; i += kPanelBlock)
        with_rows<Tile::kRows>(size, Tile{scratch, chunk, x, task.quant.stride, m, i, panels - i});
    }
  }
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(*task.weights, p + i);
    for (int m = 0; m < rows; ++m) finish_integer(task, m0 + m, p + i, panel, load(scratch.sums[m][i]));
  }
}

template <class Tile>
inline void blocked_integer(const LinearTask& task, int p0, int p1) {
  IntegerScratch scratch;
  for (int m = 0, size; m < task.num_rows; m += size) {
    size = tile_rows(task.num_rows - m, kSuperRows);
    for (int r = 0; r < size; ++r) scratch.start[r] = -weight_bias(task, m + r);
    for (int p = p0; p < p1; p += kGroupPanels)
      blocked_integer<Tile>(task, scratch, m, size, p, p1 - p < kGroupPanels ? p1 - p : kGroupPanels);
  }
}

// ---- float input: where FP32 weights come from ----
//
// A source gives column k + i of a chunk as 16 lanes; kStep columns come from one read.

struct SourceF32 {
  static constexpr int kStep = 1;
  const float* at;
  template <int i>
  LANES F32 column(int k) const {
    return load(at + static_cast<int64_t>(k) * kPanel);
  }
};
struct SourceF16 {
  static constexpr int kStep = 1;
  const uint16_t* at;
  template <int i>
  LANES F32 column(int k) const {
    return load_f16(at + static_cast<int64_t>(k) * kPanel);
  }
};
struct SourceBf16 {
  static constexpr int kStep = 2;
  const uint16_t* at;
  template <int i>
  LANES F32 column(int k) const {
    const I32 pairs = load(reinterpret_cast<const int32_t*>(at + static_cast<int64_t>(k) * kPanel));
    return i == 0 ? low_bf16(pairs) : high_bf16(pairs);
  }
};
struct SourceInt8 {
  static constexpr int kStep = 4;
  const uint8_t* at;
  template <int i>
  LANES F32 column(int k) const {
    return byte_to_float<i>(load(reinterpret_cast<const int32_t*>(at + static_cast<int64_t>(k) * kPanel)));
  }
};
// One half (32 columns) of a block of nibbles.
template <int half>
struct SourceInt4 {
  static constexpr int kStep = 4;
  const uint8_t* at;
  F32 scale;
  template <int i>
  LANES F32 column(int k) const {
    return mul(nibble_to_float<8 * i + 4 * half>(load(reinterpret_cast<const int32_t*>(at + k * kPanel))), scale);
  }
};

template <class Source>
inline Source source_of(const Panel& panel, int k) {
  if constexpr (__is_same(Source, SourceF32)) {
    return {reinterpret_cast<const float*>(panel.lines) + static_cast<int64_t>(k) * kPanel};
  } else if constexpr (__is_same(Source, SourceInt8)) {
    return {panel.lines + static_cast<int64_t>(k) * kPanel};
  } else {
    return {reinterpret_cast<const uint16_t*>(panel.lines) + static_cast<int64_t>(k) * kPanel};
  }
}
template <int half>
LANES SourceInt4<half> int4_source(const Panel& panel, int k) {
  return {panel.lines + static_cast<int64_t>(k / kBlock) * 8 * kLineBytes,
          to_float(load_u8(panel.group_scale(k + half * kSumColumns)))};
}

// ---- float input, few rows ----

template <int rows, int panels>
struct FloatSums {
  F32 v[rows][panels];
};

// acc[r][p] = fma(x[r][k], w[p][k], acc[r][p]) for k ascending.
template <int i, class Source, int rows, int panels>
LANES void multiply_column(FloatSums<rows, panels>& acc, const Source (&w)[panels], const float* x, int64_t stride,
                           int k) {
  F32 column[panels];
  for (int p = 0; p < panels; ++p) column[p] = w[p].template column<i>(k);
  for (int r = 0; r < rows; ++r) {
    const F32 value = set1(x[r * stride + k + i]);
    for (int p = 0; p < panels; ++p) acc.v[r][p] = fma(value, column[p], acc.v[r][p]);
  }
}

template <class Source, int rows, int panels>
LANES void multiply_columns(FloatSums<rows, panels>& acc, const Source (&w)[panels], const float* x, int64_t stride,
                            int count) {
  int k = 0;
  for (; k + Source::kStep <= count; k += Source::kStep) {
    multiply_column<0>(acc, w, x, stride, k);
    if constexpr (Source::kStep > 1) multiply_column<1>(acc, w, x, stride, k);
    if constexpr (Source::kStep == 4) {
      multiply_column<2>(acc, w, x, stride, k);
      multiply_column<3>(acc, w, x, stride, k);
    }
  }
  if (k < count) multiply_column<0>(acc, w, x, stride, k);  // the last of an odd number
}

template <int half, int rows, int panels>
LANES void multiply_half_block(FloatSums<rows, panels>& acc, const Panel (&w)[panels], const float* x, int64_t stride,
                               int k) {
  SourceInt4<half> source[panels];
  for (int p = 0; p < panels; ++p) source[p] = int4_source<half>(w[p], k);
  multiply_columns(acc, source, x + k + half * kSumColumns, stride, kSumColumns);
}

template <class Source, int rows, int panels>
LANES void multiply_all(FloatSums<rows, panels>& acc, const Panel (&w)[panels], const float* x, int64_t stride,
                        int count) {
  Source source[panels];
  for (int p = 0; p < panels; ++p) source[p] = source_of<Source>(w[p], 0);
  multiply_columns(acc, source, x, stride, count);
}

// Codes of three bits come out of a line eight at a time, so they are unpacked to bytes first.
template <int rows, int panels>
LANES void multiply_octals(FloatSums<rows, panels>& acc, const Panel (&w)[panels], const float* x, int64_t stride,
                           int count) {
  alignas(64) uint8_t lines[panels][kSumColumns * kPanel];
  SourceInt8 source[panels];
  for (int p = 0; p < panels; ++p) source[p] = {lines[p]};
  for (int k = 0; k < count; k += kSumColumns) {
    for (int p = 0; p < panels; ++p) unpack_octals<0>(w[p], k, lines[p]);
    multiply_columns(acc, source, x + k, stride, kSumColumns);
  }
}

struct DirectFloat {
  const LinearTask& task;
  int p0, p1;
  template <int rows>
  void run() const {
    constexpr int kPanels = kDirectAccumulators / rows < 1   ? 1
                            : kDirectAccumulators / rows > 4 ? 4
                                                             : kDirectAccumulators / rows;
    int p = p0;
    for (; p + kPanels <= p1; p += kPanels) run_panels<rows, kPanels>(p);
    for (; p < p1; ++p) run_panels<rows, 1>(p);
  }
  template <int rows, int panels>
  void run_panels(int p) const {
    Panel w[panels];
    for (int i = 0; i < panels; ++i) w[i] = panel_at(*task.weights, p + i);
    FloatSums<rows, panels> acc;
    for (auto& row : acc.v)
      for (F32& value : row) value = set1(0.0f);
    multiply(acc, w);
    for (int i = 0; i < panels; ++i)
      for (int r = 0; r < rows; ++r) finish_float(task, r, p + i, w[i], acc.v[r][i]);
  }
  template <int rows, int panels>
  void multiply(FloatSums<rows, panels>& acc, const Panel (&w)[panels]) const {
    const float* x = task.input.data;
    const int64_t stride = task.input.stride;
    const int count = task.weights->columns;
    if (w[0].format == SNELLO_F32) return multiply_all<SourceF32>(acc, w, x, stride, count);
    if (w[0].format == SNELLO_F16) return multiply_all<SourceF16>(acc, w, x, stride, count);
    if (w[0].format == SNELLO_BF16) return multiply_all<SourceBf16>(acc, w, x, stride, count);
    if (w[0].format == SNELLO_INT8) return multiply_all<SourceInt8>(acc, w, x, stride, count);
    if (w[0].format == SNELLO_INT3) return multiply_octals(acc, w, x, stride, count);
    for (int k = 0; k < count; k += kBlock) {
      multiply_half_block<0>(acc, w, x, stride, k);
      multiply_half_block<1>(acc, w, x, stride, k);
    }
  }
};

// ---- float input, many rows ----

// Unpacking is a burst that memory cannot follow, so while one chunk of columns is multiplied the next is fetched.
struct FloatScratch {
  const uint8_t* next[kGroupPanels];  // of each panel
  int next_bytes;                     // of a column
  alignas(64) float weights[kGroupPanels][kFloatColumns * kPanel];
  alignas(64) float rows[kRowBlock][kFloatColumns + kRowGap / 4];
  alignas(64) float sums[kSuperRows][kGroupPanels][kPanel];
};

template <class Source>
LANES void widen_columns(const Source& source, int count, float* out) {
  for (int k = 0; k < count; k += Source::kStep, out += kPanel * Source::kStep) {
    store(out, source.template column<0>(k));
    if constexpr (Source::kStep > 1) store(out + kPanel, source.template column<1>(k));
    if constexpr (Source::kStep == 4) {
      store(out + 2 * kPanel, source.template column<2>(k));
      store(out + 3 * kPanel, source.template column<3>(k));
    }
  }
}

// Columns [k, k + count) of a panel in FP32; FP32 weights are used where they are.
inline const float* widen_panel(const Panel& panel, int k, int count, float* out) {
  if (panel.format == SNELLO_F32) return source_of<SourceF32>(panel, k).at;
  if (panel.format == SNELLO_F16) widen_columns(source_of<SourceF16>(panel, k), count, out);
  if (panel.format == SNELLO_BF16) widen_columns(source_of<SourceBf16>(panel, k), count, out);
  if (panel.format == SNELLO_INT8) widen_columns(source_of<SourceInt8>(panel, k), count, out);
  if (panel.format == SNELLO_INT3) {
    alignas(64) uint8_t lines[kSumColumns * kPanel];
    for (int b = 0; b < count; b += kSumColumns) {
      unpack_octals<0>(panel, k + b, lines);
      widen_columns(SourceInt8{lines}, kSumColumns, out + b * kPanel);
    }
  }
  if (panel.format == SNELLO_INT4) {
    for (int b = 0; b < count; b += kBlock) {
      widen_columns(int4_source<0>(panel, k + b), kSumColumns, out + b * kPanel);
      widen_columns(int4_source<1>(panel, k + b), kSumColumns, out + (b + kSumColumns) * kPanel);
    }
  }
  return out;
}

// acc[r][p] = fma(x[r][k], w[p][k], acc[r][p]) over every `step`th column k of [first, end).
template <int step, int rows, int panels>
LANES void multiply_unpacked(F32 (&acc)[rows][panels], const float* const* weights, const FloatScratch& scratch,
                             int panel, int first, int end) {
  for (int k = first; k < end; k += step) {
    F32 w[panels];
    for (int p = 0; p < panels; ++p) {
      prefetch(scratch.next[panel + p] + k * scratch.next_bytes);
      w[p] = load(weights[panel + p] + k * kPanel);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const F32 x = set1(scratch.rows[r][k]);
      for (int p = 0; p < panels; ++p) acc[r][p] = fma(x, w[p], acc[r][p]);
    }
  }
}

struct FloatTile {
  FloatScratch& scratch;
  const float* const* weights;  // per panel of the group
  int row, panel, panels_left, count;
  template <int rows>
  void run() const {
    if (panels_left >= kPanelBlock) return run_panels<rows, kPanelBlock>();
    run_panels<rows, 1>();
  }
  template <int rows, int panels>
  void run_panels() const {
    F32 acc[rows][panels];
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) acc[r][p] = load(scratch.sums[row + r][panel + p]);
    multiply_unpacked<1>(acc, weights, scratch, panel, 0, count);
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p) store(scratch.sums[row + r][panel + p], acc[r][p]);
  }
};

inline void copy_row(const float* from, int count, float* to) {
  for (int j = 0; j < count; j += kLanes) store_columns(to, load_columns(from, j, count), j, count);
}

struct FloatInput {
  static constexpr int kRows = kRowBlock;
  using Tile = FloatTile;
  static void copy(const LinearTask& task, int m, int k, int count, float* to) {
    copy_row(task.input.row(m) + k, count, to);
  }
};

// Of a column of a panel's lines.
LANES int column_bytes(int format) {
  constexpr int kBytes[] = {64, 32, 32, 16, 8, 6};
  return kBytes[integers_of(format)];
}

template <class Input>
inline void blocked(const LinearTask& task, int m0, int rows, int p, int panels) {
  FloatScratch scratch;
  scratch.next_bytes = column_bytes(task.weights->format);
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < panels; ++i) store(scratch.sums[m][i], set1(0.0f));
  for (int k = 0; k < task.weights->columns; k += kFloatColumns) {
    const int left = task.weights->columns - k, count = left < kFloatColumns ? left : kFloatColumns;
    const float* weights[kGroupPanels];
    for (int i = 0; i < panels; ++i) {
      const Panel panel = panel_at(*task.weights, p + i);
      weights[i] = widen_panel(panel, k, count, scratch.weights[i]);
      const uint8_t* following = left > count ? panel.lines : panel_at(*task.weights, p + i + panels).lines;
      scratch.next[i] = following + (left > count ? k + count : 0) * int64_t{scratch.next_bytes};
    }
    for (int m = 0, size; m < rows; m += size) {
      size = tile_rows(rows - m, Input::kRows);
      for (int r = 0; r < size; ++r) Input::copy(task, m0 + m + r, k, count, scratch.rows[r]);
      for (int i = 0; i < panels; i += kPanelBlock)
        with_rows<Input::kRows>(size, typename Input::Tile{scratch, weights, m, i, panels - i, count});
    }
  }
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_at(*task.weights, p + i);
    for (int m = 0; m < rows; ++m) finish_float(task, m0 + m, p + i, panel, load(scratch.sums[m][i]));
  }
}

template <class Input>
inline void blocked(const LinearTask& task, int p0, int p1) {
  for (int p = p0; p < p1; p += kGroupPanels) {
    const int panels = p1 - p < kGroupPanels ? p1 - p : kGroupPanels;
    for (int m = 0, size; m < task.num_rows; m += size) {
      size = tile_rows(task.num_rows - m, kSuperRows);
      blocked<Input>(task, m, size, p, panels);
    }
  }
}

#include "kernels/halves.inl"

// ---- the operation ----

inline void linear(const LinearTask& task, int p0, int p1) {
  if (task.num_rows <= 0) return;
  if (task.halves.data) return linear_halves(task, p0, p1);
  if (by_channel(task.weights->format) && task.num_rows <= kDirectRowsChannels)
    return with_rows<kDirectRowsChannels>(task.num_rows, DirectChannels{task, p0, p1});
  if (task.quantized && few_integer_rows(task)) return direct_integer(task, p0, p1);
  if (!task.quantized && task.num_rows <= kDirectRowsFloat)
    return with_rows<kDirectRowsFloat>(task.num_rows, DirectFloat{task, p0, p1});
  if (task.quantized) return blocked_integer<IntegerTile>(task, p0, p1);
  blocked<FloatInput>(task, p0, p1);
}

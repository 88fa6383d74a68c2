// The table of kernels that one instruction set provides, and the plain structures they work on.
//
// Each file in isa/ compiles the same sources (kernels/*.inl over one lanes/*.h) with its own flags in its own
// namespace and exports one table. Kernels get raw pointers and ranges; they never allocate, lock or know what a
// program is. A range is what one worker does; disjoint ranges write disjoint memory, so how work is divided never
// changes a bit.
#pragma once

#include <cstdint>

#include "snello.h"

namespace snello {

constexpr int kPanel = SNELLO_PANEL_ROWS;     // N per panel = lanes
constexpr int kBlock = SNELLO_BLOCK_COLUMNS;  // K per integer block
constexpr int kPage = SNELLO_PAGE_POSITIONS;  // positions per page = attention tile
constexpr int kSumColumns = 32;               // activations are summed per this many columns
constexpr int kMaxExperts = 1024;             // of one layer
// Eight tiles of 16 rows x 64 bytes. 0 to 3 hold sums (0, 1: of the top rows; 2, 3: of the bottom rows), 4 and 5 the
// top and the bottom rows, 6 and 7 weights.
constexpr int kTileRows = 16, kTileColumns = 64;
constexpr int rows_of_tile(int tile, int top_rows, int bottom_rows) {
  if (tile == 0 || tile == 1 || tile == 4) return top_rows;
  return tile < 6 ? bottom_rows : kTileRows;
}

constexpr bool by_channel(int format) { return format == SNELLO_INT8_CHANNELS || format == SNELLO_INT4_CHANNELS; }
constexpr bool is_format(int format) { return (format >= SNELLO_F32 && format <= SNELLO_INT3) || by_channel(format); }
// INT8, INT4 or INT3, however the matrix is stored.
constexpr int integers_of(int format) {
  return format == SNELLO_INT8_CHANNELS ? SNELLO_INT8 : format == SNELLO_INT4_CHANNELS ? SNELLO_INT4 : format;
}
constexpr int kSlabPanels = 8;       // whole slabs of a matrix stored by channel are work for one thread
constexpr int kMaxChannels = 32768;  // columns of a matrix stored by channel

// INT8 rows: q [rows, width] s8 with a stride in bytes, scale [rows], sums [rows, width / 32] of q.
struct QuantRows {
  int8_t* q;
  float* scale;
  int32_t* sums;
  int32_t width;  // multiple of 64
  int64_t stride;
  int8_t* row(int64_t m) const { return q + m * stride; }
  int32_t* row_sums(int64_t m) const { return sums + m * (width / kSumColumns); }
};

// BF16 rows with a stride in values, padded with zeros to a multiple of 64 columns.
struct HalfRows {
  uint16_t* data;
  int64_t stride;
  uint16_t* row(int64_t m) const { return data + m * stride; }
};

// Plain FP32 rows with a stride in floats.
struct FloatRows {
  float* data;
  int64_t stride;
  float* row(int64_t m) const { return data + m * stride; }
};

struct LinearTask {
  const snello_tensor* weights;
  QuantRows quant;  // input if the input is quantized
  FloatRows input;  // else
  bool quantized;
  FloatRows output;   // first column already applied
  const float* bias;  // [rows] or null
  bool accumulate;    // output += instead of =
  int32_t num_rows;   // M
  // A second matrix like the first one, or null: then output = activation(rows x weights) * (rows x up), without bias.
  const snello_tensor* up = nullptr;
  int32_t activation = 0;  // as in ActivateTask
  HalfRows halves{};       // data not null: the input, of BF16 weights
};

struct TransformTask {
  FloatRows input;
  int32_t input_width;
  const float* multiplier;  // [input_width] or null
  int32_t rotate_block;     // 0, 64, 128
  FloatRows output;         // when not quantized: [.., width]
  QuantRows quant;          // when quantized
  bool quantized;
  int32_t width;           // padded width of the output
  uint8_t* not_finite;     // [rows]: set to 1 for a row with Inf or NaN
  float step;              // when quantized: the scale of every row; 0: each row's own
  const float* threshold;  // [width] or null: smaller magnitudes become 0
  HalfRows halves{};       // data not null: where the output goes, as BF16
};

struct NormTask {
  FloatRows input, output;
  int32_t width, segment;  // segment 0: width
  bool centered;           // mean and variance instead of RMS
  const float *gain, *bias;
  float epsilon, gain_offset;
};

struct EmbedTask {
  const snello_tensor* weights;
  const snello_tensor* more;  // rows of ids from weights->rows on, or null
  const int32_t* ids;         // [rows], already offset
  const float* undo;          // multiplier after the Hadamard, or null
  int32_t rotate_block;
  float multiplier;
  bool accumulate;
  FloatRows output;
  int32_t width;  // columns of the output
};

struct RopeTask {
  FloatRows rows;
  const int32_t* positions;
  int32_t num_heads, head_dim, rotary_dims;
  bool interleaved;
  const float *cosines, *sines;  // [positions, rotary_dims / 2]
};

// Where the keys and values of one layer live. A page of one (kv head): see docs/numerics.md, Attention.
struct CacheLayer {
  uint8_t* data;         // [page][kv head]{K block, V block}
  int64_t page_stride;   // bytes between pages of this layer
  int64_t head_stride;   // bytes between kv heads
  int64_t value_offset;  // of the V block inside a head's block
  int32_t num_kv_heads, head_dim, format;
  int32_t state_rows;  // 0, or [page][position % state_rows] FP32 rows of head_dim values and nothing else

  float* state(int64_t page, int position) const {
    return reinterpret_cast<float*>(data + page * page_stride) + int64_t{position % state_rows} * head_dim;
  }
};

struct StoreTask {
  CacheLayer cache;
  FloatRows keys, values;
  const int32_t *positions, *sequences, *page_tables;
  int32_t pages_per_sequence;
  uint8_t* not_finite;
};

struct AttentionTask {
  CacheLayer cache;
  FloatRows queries, output;
  const int32_t *positions, *sequences, *page_tables, *lengths;
  int32_t pages_per_sequence;
  int32_t num_heads;
  int32_t window, sinks;
  bool causal;
  float scale, soft_cap;
  uint8_t* not_finite;
};

struct ConvolveTask {
  CacheLayer cache;
  FloatRows gate, input, output_gate, output;
  const float *taps, *bias;  // [kernel, width]; bias [width] or null
  const int32_t *positions, *sequences, *page_tables;
  int32_t pages_per_sequence, num_rows;
  int32_t kernel, width;
};

struct ActivateTask {
  FloatRows gate, up, output;  // up.data null: no product
  int32_t kind, width;
};

struct RouteTask {
  FloatRows logits, output;  // output: [rows, 2 * num_active], numbers, then weights
  int32_t num_experts, num_active;
  bool normalized;  // weights over the chosen experts, else over all
};

struct CombineTask {
  FloatRows parts, routes, output;
  const int32_t* places;  // [rows, num_active]: which row of parts an expert's answer is
  int32_t num_active, width;
  bool accumulate;
};

struct Kernels {
  const char* name;
  // quantized rows that a product takes in the time that reading its weights takes, or nearly
  int few_rows;
  // panels that a product of so few rows reads at once
  int few_panels;
  // panels that a product of more rows treats together
  int group_panels;
  // rows that are worth unpacking all weights for: of twice as many, two threads take half of the rows each, of fewer
  // half of the panels; 0: always of the panels
  int enough_rows;
  // whether `linear` takes quantized rows times two matrices at once (LinearTask::up)
  bool gates;
  // the same kernels with another `linear`, the same to the last bit, that may be the faster one for one row, or null
  const Kernels* for_one_row;
  // rows [m0, m1) of everything that works row by row
  void (*embed)(const EmbedTask&, int m0, int m1);
  void (*norm)(const NormTask&, int m0, int m1);
  void (*transform)(const TransformTask&, int m0, int m1);
  void (*rope)(const RopeTask&, int m0, int m1);
  void (*activate)(const ActivateTask&, int m0, int m1);
  void (*add)(const FloatRows& a, const FloatRows& b, float f, const FloatRows& out, int width, int m0, int m1);
  void (*scale)(const FloatRows& in, float factor, float cap, const FloatRows& out, int width, int m0, int m1);
  void (*route)(const RouteTask&, int m0, int m1);
  void (*combine)(const CombineTask&, int m0, int m1);
  // rows [m0, m1): all of them are convolved before one is stored
  void (*convolve)(const ConvolveTask&, int m0, int m1);
  void (*store_state)(const ConvolveTask&, int m0, int m1);
  // all rows, output panels [p0, p1)
  void (*linear)(const LinearTask&, int p0, int p1);
  // the inner loop of `linear` over integers, on operands that stay in the first cache: operations done. Null: `linear`
  // itself, on such operands, is the measure
  int64_t (*multiply)(int passes);
  // the same over BF16 rows and weights; null as there
  int64_t (*multiply_halves)(int passes);
  // whether `linear` multiplies BF16 as it is, on tiles or in pairs, so that a few rows cost what one does; null: no
  bool (*multiplies_halves)();
  // store keys and values of rows [m0, m1), kv head h
  void (*store_kv)(const StoreTask&, int h, int m0, int m1);
  // rows [m0, m1), the query heads of kv head h; scratch: attention_scratch_bytes() of this worker's own
  void (*attend)(const AttentionTask&, int h, int m0, int m1, void* scratch);
  // log-sum-exp pieces over one row of logits: maximum, sum of exp(x - maximum), and the first index of the maximum
  void (*softmax_stats)(const float* logits, int n, float* maximum, float* sum, int* argmax);
  // KL(a || b) of one row given both log-sum-exps
  float (*divergence)(const float* a, float lse_a, const float* b, float lse_b, int n);
  // to = from / divisor, unless `to` is null (it may be `from`), and the largest of every 64 of them
  void (*by_temperature)(const float* from, float divisor, int n, float* to, float* maxima);
  // the words that the 64 tokens from 4 * quad on are drawn with, [4][16], and which have `least` in their upper 24
  // bits
  uint64_t (*noise)(uint64_t seed, uint32_t quad, uint64_t position, uint32_t least, uint32_t* words);
  // sum of all 64-byte lines: for the bandwidth probe
  uint64_t (*read)(const void* data, uint64_t bytes);
};

constexpr int64_t kAttentionScratchBytes = 256 * 1024;

// Tables, one per translation unit in isa/. Null if not compiled for this architecture.
extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvxVnniEvexKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512VnniFmaKernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonI8mmKernels;
extern const Kernels kNeonDotprodKernels;
#endif
extern const Kernels kAmxEmulatedKernels;
extern const Kernels kBf16EmulatedKernels;

const Kernels& kernels();             // the selected set (cpu.cpp)
const char* select_isa(const char*);  // see snello_isa_select
const char* available_isas();

// amx.cpp: whether this machine multiplies tiles, and keeps them while others use the processor; found out once
enum class Amx : uint8_t { kAbsent, kRefused, kFailed, kTrusted };
Amx trust_in_amx();
// whether its products of BF16 are, to the bit, those of docs/numerics.md; never where it is not trusted
bool trust_in_bf16_tiles();

// cpu.cpp: whether this machine has dot products of BF16, with the bits of docs/numerics.md; found out once
bool trust_in_half_dots();

#if defined(__x86_64__)
// isa/avx512vnni.cpp: whether they have these bits
bool half_dots_agree();
// isa/amx.cpp: multiplies tiles for so many seconds; false if a product was ever wrong
bool tiles_hold(double seconds);
// the same file: whether products of BF16 on tiles have the bits of those on vectors
bool bf16_tiles_agree();
#endif

// layout.cpp
uint64_t packed_bytes(int format, int64_t rows, int64_t columns, int group_size);
int check_shape(int format, int64_t rows, int64_t columns, int group_size);

// error.cpp: remembers one line for snello_last_error and returns -1
int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace snello

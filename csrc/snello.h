/* The whole C ABI of the native core.
 *
 * The core knows no model. It is given packed matrices, a list of operations over row registers, pages for keys and
 * values, and batches of rows (token, sequence, position); it gives back rows of numbers. Everything it computes is
 * stated in docs/numerics.md and is byte-identical for any number of rows, chunking, number of threads and instruction
 * set. All pointers handed in are borrowed: the caller keeps them alive and unchanged as long as the object that uses
 * them. No call throws, prints or reads the environment, but snello_isa_select(NULL), which reads SNELLO_ISA.
 *
 * Calls that can fail return NULL or a negative number; snello_last_error() then holds one line for that thread. That
 * goes for memory that is not there, too: a step that failed for it can be run again.
 */
#ifndef SNELLO_H
#define SNELLO_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SNELLO_API __attribute__((visibility("default")))
#define SNELLO_ABI_VERSION 12
#define SNELLO_PANEL_ROWS 16      /* output rows of one panel of a packed matrix */
#define SNELLO_BLOCK_COLUMNS 64   /* integer matrices pad their columns to this */
#define SNELLO_PAGE_POSITIONS 128 /* positions of one page of keys and values; also the attention tile */

/* ---- numbers ---- */

enum snello_format {
  SNELLO_F32 = 0,
  SNELLO_F16 = 1,
  SNELLO_BF16 = 2,
  SNELLO_INT8 = 3,
  SNELLO_INT4 = 4,
  SNELLO_INT3 = 5,
  /* The same integers, stored channel by channel: a channel whose inputs are all 0 is not read. */
  SNELLO_INT8_CHANNELS = 6,
  SNELLO_INT4_CHANNELS = 7
};

/* A packed matrix [rows, columns] (see docs/numerics.md, Layout), or, where an operation asks for a vector,
 * `columns` plain FP32 values (format F32, rows 1). `columns` of an integer matrix is a multiple of 64. */
typedef struct snello_tensor {
  const void* data;   /* 64-byte aligned */
  uint64_t bytes;     /* must equal snello_packed_bytes(...), or 4 * columns for a vector */
  int32_t format;     /* enum snello_format */
  int32_t rows;       /* N: outputs */
  int32_t columns;    /* K: inputs */
  int32_t group_size; /* INT4, INT3: 32, 64 or 128; else 0 */
} snello_tensor;

SNELLO_API int32_t snello_abi_version(void);
SNELLO_API const char* snello_last_error(void);

/* Selects the instruction set for the whole process: "scalar", "avx2", "avxvnni", "avx512vnni", "amx", or for tests
 * "avxvnni-evex" (by AVX-512's encoding), "avx512vnni-fma" (without BF16's dot products), "amx-emulated" and
 * "bf16-emulated" (tiles, and those dot products, in plain C++); NULL: SNELLO_ISA if set, else the
 * best that this CPU runs. Returns the selected name, or NULL (unknown, or this CPU cannot run it). */
SNELLO_API const char* snello_isa_select(const char* name);
/* Comma-separated names of the sets that this CPU can run, best first. */
SNELLO_API const char* snello_isa_available(void);
/* AMX on this machine: "absent", "refused" (by the operating system), "failed" (products were wrong, or faulted) or
 * "trusted". The first call takes some 40 ms where there is AMX. */
SNELLO_API const char* snello_amx(void);
/* 1: the selected set multiplies BF16 rows with BF16 weights as they are, on tiles or in pairs, for a trial gave the
 * bits that docs/numerics.md states; 0: widened to FP32, which gives the same bits. */
SNELLO_API int32_t snello_multiplies_bf16(void);

/* ---- packing ---- */

SNELLO_API uint64_t snello_packed_bytes(int32_t format, int32_t rows, int32_t columns, int32_t group_size);
/* Plain row-major matrix of `source_format` (F32, F16, BF16) -> packed matrix of `format` (F32, F16, BF16; a narrowing
 * rounds to nearest even). */
SNELLO_API int32_t snello_pack_float(int32_t format, int32_t source_format, const void* source, int32_t rows,
                                     int32_t columns, void* packed);
/* q [rows, columns] in -127..127, row_scale [rows]. */
SNELLO_API int32_t snello_pack_int8(const int8_t* q, const float* row_scale, int32_t rows, int32_t columns,
                                    void* packed);
/* q [rows, columns] in 0..15, group_scale [rows, ceil(columns / group_size)] in 1..15, row_scale [rows]. */
SNELLO_API int32_t snello_pack_int4(const uint8_t* q, const uint8_t* group_scale, const float* row_scale, int32_t rows,
                                    int32_t columns, int32_t group_size, void* packed);
/* q [rows, columns] in 0..7, group_scale [rows, ceil(columns / group_size)] in -15..15 but not 0, row_scale [rows]. */
SNELLO_API int32_t snello_pack_int3(const uint8_t* q, const int8_t* group_scale, const float* row_scale, int32_t rows,
                                    int32_t columns, int32_t group_size, void* packed);
/* The inverses, of what is stored by panel; any output pointer may be NULL. `values` [rows, columns] FP32 is the
 * dequantized matrix; q4 and group_scale (of INT3 as signed bytes) are those of INT4 and INT3. */
SNELLO_API int32_t snello_unpack(const snello_tensor* tensor, float* values, int8_t* q8, uint8_t* q4,
                                 uint8_t* group_scale, float* row_scale);

/* A packed INT8 or INT4 matrix -> the same stored by channel (at most 32,768 columns), and back. Nothing is rounded.
 * `bytes` of the result: snello_packed_bytes(its format, rows, columns, group_size). */
SNELLO_API int32_t snello_to_channels(const snello_tensor* matrix, void* packed);
SNELLO_API int32_t snello_from_channels(const snello_tensor* matrix, void* packed);

/* ---- threads ---- */

typedef struct snello_pool snello_pool;
SNELLO_API snello_pool* snello_pool_create(int32_t num_threads); /* the caller is one of them */
SNELLO_API void snello_pool_destroy(snello_pool* pool);

/* ---- keys and values ---- */

typedef struct snello_cache snello_cache;
typedef struct snello_cache_layer {
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t format; /* F32, F16, BF16 or INT8 */
  /* 0: keys and values of every position.  Else the state of a convolution: one FP32 row of head_dim values (format
   * F32, one kv head) for each of the last state_rows positions of a page, a power of two up to 128. */
  int32_t state_rows;
} snello_cache_layer;
SNELLO_API snello_cache* snello_cache_create(const snello_cache_layer* layers, int32_t num_layers, int32_t num_pages);
SNELLO_API void snello_cache_destroy(snello_cache* cache);
SNELLO_API uint64_t snello_cache_page_bytes(const snello_cache_layer* layers, int32_t num_layers);
SNELLO_API int32_t snello_cache_copy_page(snello_cache* cache, int32_t destination, int32_t source);
/* The snello_cache_page_bytes bytes of a page, to be read or written between steps; NULL: there is no such page. The
 * layout is the same for every instruction set (docs/numerics.md, Attention). */
SNELLO_API void* snello_cache_page(snello_cache* cache, int32_t page);

/* ---- programs ---- */

enum snello_rows {
  SNELLO_ROWS_F32 = 0,
  SNELLO_ROWS_INT8 = 1, /* with a scale, and sums per 32 columns */
  SNELLO_ROWS_BF16 = 2
};

/* A register holds one row of `width` values per batch row. Widths of INT8 and BF16 registers are multiples of 64. What
 * DISPATCH writes, and what is made from that, holds one row per batch row and chosen expert instead, sorted by expert,
 * then by row. */
typedef struct snello_register {
  int32_t width;
  int32_t rows; /* enum snello_rows */
} snello_register;

enum snello_op_kind {
  /* out = or += multiplier * row of tensor[0].
   * i0 id source: 0 tokens, 1 positions + i1, 2 token types.  i2: 1 adds into out.  i3: rotate block 0, 64, 128 and
   * tensor[1] [padded columns]: undo the input transform of a shared head matrix: hadamard(row) * tensor[1].
   * tensor[2] or -1: rows of ids past tensor[0]'s, a float matrix of as many columns as out, taken as they are.
   * f0 multiplier. */
  SNELLO_OP_EMBED = 0,
  /* out = norm(in0).  i0 kind: 0 RMS, 1 mean and variance.  i1 segment: 0 the whole row, else normalized in segments of
   * i1 columns (q/k norms; gains have i1 values).  tensor[0] gain or -1, tensor[1] bias or -1.  f0 epsilon.
   * f1 added to the gain (Gemma: 1). in0 may be out. */
  SNELLO_OP_NORM = 1,
  /* out = hadamard(in0 * tensor[0]), zero-padded to the width of out.  tensor[0] multiplier vector (Hadamard's
   * normalization inside) or -1.  i0 rotate block 0, 64, 128.  An INT8 or BF16 out is rounded to that.  f0, of INT8:
   * the scale of every row, or 0: each row has its own, absmax / 127.  i1: of dispatched rows, 1 says that each expert
   * has a multiplier of its own: tensor[0] + its number.  tensor[1] thresholds [width of out] or -1: an INT8 value is 0
   * where the magnitude before rounding is below its column's. */
  SNELLO_OP_TRANSFORM = 2,
  /* out[:, i1 : i1 + rows] = or += in0 * tensor[0]^T + tensor[1].  INT8 in0 needs an integer matrix; FP32 in0 takes
   * any that is not stored by channel; BF16 in0, of the matrix's columns padded to 64, needs a BF16 one.  tensor[1]
   * bias or -1.  i0: 1 adds into out (the residual). */
  SNELLO_OP_LINEAR = 3,
  /* Rotary embedding in place on in0 == out.  i0 heads, i1 head_dim, i2 rotary dims (the first of each head),
   * i3: 0 halves, 1 interleaved pairs.  tensor[0] cosines, tensor[1] sines, each a plain FP32 matrix
   * [positions, rotary dims / 2] (format F32, rows positions). */
  SNELLO_OP_ROPE = 4,
  /* out = attention(in0) to what is stored: STORE comes before it.  i0 cache layer, i1 heads, i2 kv heads, i3 head_dim,
   * i4 window (0: none; row p sees positions > p - window), i5 sinks (first positions always seen; with a window only),
   * i6: 1 causal, 0 sees all positions < lengths[sequence].  f0 score scale, f1 soft cap (0: none).  i7: only rows at
   * positions < i7 attend and are written, over an out that has been written; 0: all. */
  SNELLO_OP_ATTENTION = 5,
  /* out = activation(in0) * in1, or activation(in0) where in1 is -1.  i0: 0 SiLU, 1 GELU tanh, 2 GELU erf, 3 ReLU,
   * 4 ReLU squared, 5 tanh.  in0 may be out. */
  SNELLO_OP_ACTIVATE = 6,
  /* out = in0 + in1 * f0. in0 may be out. */
  SNELLO_OP_ADD = 7,
  /* From here on the rows are the batch's output rows: those of in0, in1 and in2 (float registers, -1: none), in place.
   * What other registers hold means nothing any more. out: -1. Exactly one in a program. */
  SNELLO_OP_GATHER = 8,
  /* out = f1 == 0 ? in0 * f0 : f1 * tanh(in0 * f0 / f1).  Logit scale and soft cap. */
  SNELLO_OP_SCALE = 9,
  /* Which experts a row goes to.  in0 router logits, one column per expert.  out [2 * i0]: the i0 experts with the
   * largest logits (ties: the lowest number), as numbers in ascending order, then their weights: of a softmax over all
   * (i1 = 0) or over the chosen (i1 = 1). */
  SNELLO_OP_ROUTE = 10,
  /* out = rows of in0, one for each expert that in1 (what ROUTE wrote) chose.  out holds values of the same kind.
   */
  SNELLO_OP_DISPATCH = 11,
  /* LINEAR of dispatched rows in0, each by its own expert's matrix: tensor[0] + its number, so the experts' matrices
   * are consecutive tensors of one shape.  i1 as there; there is no bias. */
  SNELLO_OP_EXPERTS = 12,
  /* out = or += (i0 = 1) the sum over a row's experts, in ascending order, of weight * its row of in0 (dispatched).
   * in1: what ROUTE wrote. */
  SNELLO_OP_COMBINE = 13,
  /* Of rows with an adapter: out[:, i1 : i1 + rows] = or += (i0 = 1) in0 * matrix^T. The matrix is the adapter's own,
   * of i2 float matrices from tensor[0] on, which may differ in rows and columns; it takes the first columns of in0.
   * One without rows and data: that adapter does nothing here. Nothing else of out is written. */
  SNELLO_OP_ADAPT = 14,
  /* Gated short convolution: u = in0 * in1, y[p] = sum over k of tensor[0][k] * u[p - i1 + 1 + k], and
   * out = (y + tensor[1]) * in2; u before position 0 is 0.  i0 cache layer, which keeps u, i1 kernel: 1 to state_rows.
   * tensor[0] taps, a plain FP32 matrix [i1, width], tensor[1] bias [width] or -1.  A step begins where the sequence
   * ended, or at most state_rows - i1 + 1 positions before that on the same page, or at a page's first position. */
  SNELLO_OP_CONVOLVE = 15,
  /* From here on the rows are output rows, at most head_rows of them at a time: out = in0. Exactly one in a program,
   * after GATHER; registers belong to one side of it. */
  SNELLO_OP_HEAD = 16,
  /* Keys in0 and values in1 of these rows go into cache layer i0, which has one STORE. out: -1. Before GATHER. */
  SNELLO_OP_STORE = 17
};

typedef struct snello_op {
  int32_t kind;
  int32_t in[3];     /* registers, -1: none */
  int32_t out;       /* register */
  int32_t tensor[3]; /* tensors, -1: none */
  int32_t i[8];
  float f[4];
} snello_op;

typedef struct snello_program snello_program;
/* The last op's `out` register is the program's output. max_rows: rows of one step. head_rows: output rows that the ops
 * after HEAD treat at once (they are replayed block by block, so logits of many rows are never all in memory). What
 * lies between GATHER and HEAD treats all output rows at once: the end of the last layer, which no other row needs. */
SNELLO_API snello_program* snello_program_create(snello_pool* pool, const snello_op* ops, int32_t num_ops,
                                                 const snello_tensor* tensors, int32_t num_tensors,
                                                 const snello_register* registers, int32_t num_registers,
                                                 snello_cache* cache, int32_t max_rows, int32_t head_rows);
SNELLO_API void snello_program_destroy(snello_program* program);
SNELLO_API int32_t snello_program_output_width(const snello_program* program);
SNELLO_API uint64_t snello_program_arena_bytes(const snello_program* program);

/* Prefill, decode, verification and scoring are all this. Rows of one sequence are consecutive, positions ascending. */
typedef struct snello_batch {
  int32_t num_rows;
  int32_t num_sequences;
  int32_t pages_per_sequence;
  int32_t num_outputs;
  const int32_t* tokens;      /* [num_rows] */
  const int32_t* types;       /* [num_rows] or NULL (zeros) */
  const int32_t* positions;   /* [num_rows] absolute */
  const int32_t* sequences;   /* [num_rows] index into page_tables */
  const int32_t* page_tables; /* [num_sequences, pages_per_sequence]; position p lives in entry p / 128 */
  const int32_t* lengths;     /* [num_sequences] positions stored after this step */
  const int32_t* output_rows; /* [num_outputs] ascending */
  const int32_t* adapters;    /* [num_rows] number of the row's adapter, -1: none; NULL: no row has one. Neighbours with
                                 the same are treated together, so sort by it. */
} snello_batch;

/* outputs [num_outputs, output width]. Returns 0; or 1 + the first row whose activations are not finite (that row's
 * outputs, and those of its sequence, mean nothing; other sequences' are right); or negative: an error. */
SNELLO_API int32_t snello_step(snello_program* program, const snello_batch* batch, float* outputs);
/* The same for programs that end in logits, without materializing them: log_probability [num_outputs] of
 * targets [num_outputs], and the most likely token top1 [num_outputs] (may be NULL). */
SNELLO_API int32_t snello_score(snello_program* program, const snello_batch* batch, const int32_t* targets,
                                float* log_probability, int32_t* top1);
/* How products of one row are done where there are tiles: the first steps of one row take tiles and vectors in turn,
 * with the same bytes, and all later ones what was faster. seconds [2]: the median step of each, 0 as long as
 * undecided. */
enum snello_one_row_way { SNELLO_ONE_ROW_UNDECIDED = 0, SNELLO_ONE_ROW_TILES = 1, SNELLO_ONE_ROW_VECTORS = 2 };
SNELLO_API int32_t snello_one_row(const snello_program* program, double* seconds);
/* Seconds spent in each op since the last call with reset, [num_ops]; the measuring itself is always on for
 * snello_profile(program, 1, ...) until (program, 0, ...). */
SNELLO_API int32_t snello_profile(snello_program* program, int32_t enable, double* seconds);

/* ---- logits to tokens ---- */

typedef struct snello_sampling {
  float temperature;        /* 0: the most likely */
  float top_p;              /* 1: all */
  float min_p;              /* 0: all */
  float repetition_penalty; /* 1: none; over prompt and answer */
  float presence_penalty;   /* over the answer */
  float frequency_penalty;  /* over the answer */
  int32_t top_k;            /* 0: all */
  int32_t num_biases;
  const int32_t* bias_tokens;
  const float* bias_values;
  uint64_t seed;
} snello_sampling;

/* Order: bias, penalties, temperature, top-k, top-p, min-p, then Gumbel-max with Philox(seed, position, token id); ties
 * go to the lowest id. logits [vocabulary] is not changed. history = prompt then answer. position: absolute position of
 * the token to be drawn. log_probability (may be NULL): of the drawn token under the raw logits. Negative: an error
 * (nothing finite to choose from). */
SNELLO_API int32_t snello_sample(const float* logits, int32_t vocabulary, const snello_sampling* sampling,
                                 const int32_t* history, int32_t num_history, int32_t num_prompt, int64_t position,
                                 float* log_probability);
/* The `count` most likely tokens of logits [vocabulary], most likely first, ties to the lowest id, and their
 * log-probabilities, of the same bits as snello_sample's; both [count]. Returns how many: count, or vocabulary if that
 * is less. Negative: an error (a logit is NaN, or none is finite). */
SNELLO_API int32_t snello_top(const float* logits, int32_t vocabulary, int32_t count, int32_t* tokens,
                              float* log_probabilities);
/* Two sets of logits [rows, vocabulary] for the same rows: per row log-probability of the target under a and b,
 * KL(a || b) in nats, and both most likely tokens. Any output may be NULL. */
SNELLO_API int32_t snello_compare(const float* a, const float* b, int32_t rows, int32_t vocabulary,
                                  const int32_t* targets, float* log_probability_a, float* log_probability_b,
                                  float* divergence, int32_t* top1_a, int32_t* top1_b);

/* ---- the machine ---- */

/* GB/s (1e9) of reading `bytes` of resident memory with all threads of the pool, the best of `repeats`. */
SNELLO_API double snello_probe_bandwidth(snello_pool* pool, uint64_t bytes, int32_t repeats);
/* 1e9 multiply-adds x 2 a second of this format's inner loop on cached operands, all threads: integers and BF16 times
 * rows of INT8 and BF16, F32 and F16 times FP32 rows. */
SNELLO_API double snello_probe_compute(snello_pool* pool, int32_t format, int32_t repeats);

#ifdef __cplusplus
}
#endif
#endif

// A program: operations over row registers, checked once and replayed for every batch.
//
// What comes before GATHER runs over all rows of a batch, what comes after it over the batch's output rows, what comes
// after HEAD over these a block at a time. Each part is a list of stages, and a stage is what the threads do between
// two barriers: adjacent operations that work row by row (each thread takes rows and runs all of them on its rows while
// they are in its cache), adjacent products that do not depend on each other, or one attention.
//
// Between DISPATCH and COMBINE a row is there once for each expert that it goes to, sorted by expert: so an expert's
// rows lie together, and its matrices are read once for all of them. Matrices of experts that nobody chose are not
// read. Rows with adapters are grouped alike where they lie; those without have no part in ADAPT.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "trial.h"

namespace snello {

// What a program is made from, as the caller gave it.
struct ProgramSpec {
  std::vector<snello_op> ops;
  std::vector<snello_tensor> tensors;
  std::vector<snello_register> registers;
  const snello_cache* cache;
  int max_rows, head_rows;
};

// What the checks find out. The side of a register: rows of the batch, before GATHER all of them; rows dispatched to
// experts; or a block of output rows.
enum class Side : uint8_t { kUnused, kRows, kDispatched, kOutputs };
struct ProgramFacts {
  int gather = -1, head = -1;
  int most_experts = 0, most_active = 0;  // of any layer; active: that a row goes to
  std::vector<Side> sides;
};

// 0, or -1 and one line in snello_last_error() that names the first mistake.
int check_program(const ProgramSpec& spec, ProgramFacts* facts);
int check_batch(const ProgramSpec& spec, const snello_batch& batch);

const char* op_name(int kind);

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part of an operation that one thread can do alone: a convolution is convolving (row by row), a barrier, storing its
// state.
struct Action {
  enum Kind : uint8_t { kRow, kLinear, kAttend, kStoreState };
  Kind kind;
  int op;
};

// Actions [begin, end), all of one kind but for those that work row by row, which mix; kStoreState only begins a stage.
// `gate`: the operation that these two products are for, and nothing else: ACTIVATE, which begins the next stage.
struct Stage {
  int begin, end, gate = -1;
};

struct Part {
  std::vector<Action> actions;
  std::vector<Stage> stages, single_stages;  // single: one action each, for measuring
};

// One register's memory: FP32 rows, INT8 rows with scales and sums, or BF16 rows.
struct RegisterMemory {
  FloatRows rows{};
  QuantRows quant{};
  HalfRows halves{};
};

// Rows [begin, end) that take the matrices of one expert, or of one adapter; none is empty.
struct RowGroup {
  int number, begin, end;
};

// A product as part of a job that several share: which units of the job are its own.
struct LinearShare {
  LinearTask task;
  int64_t first, end;
};

// Some rows of one sequence that attention takes at once.
struct RowBlock {
  int begin, end;
};

// A row of a convolution's state as it was before the step.
struct SavedState {
  float* place;
  int width;
};

}  // namespace snello

struct snello_program {
 public:
  // The spec has passed check_program.
  snello_program(snello::Pool& pool, snello::ProgramSpec spec, const snello::ProgramFacts& facts);

  int step(const snello_batch& batch, float* outputs);
  int score(const snello_batch& batch, const int32_t* targets, float* log_probability, int32_t* top1);
  int one_row(double* seconds) const;
  void profile(bool enable, double* seconds);
  int output_width() const { return spec_.registers[static_cast<size_t>(output_)].width; }
  uint64_t arena_bytes() const { return arena_.bytes(); }
  const snello::ProgramSpec& spec() const { return spec_; }
  snello::Pool& pool() { return pool_; }

 private:
  struct Linears;
  // Rows that a part runs over: `count` of them; for the part after HEAD, output rows from `first` on.
  struct Rows {
    int first, count;
    uint8_t* not_finite;
  };

  bool dispatched(const snello_op& op) const {
    return op.out >= 0 && sides_[static_cast<size_t>(op.out)] == snello::Side::kDispatched;
  }
  Rows dispatched_rows() { return {0, num_dispatched_, expert_not_finite_.data()}; }
  const snello_op& op(int index) const { return spec_.ops[static_cast<size_t>(index)]; }
  const snello_tensor* tensor(int index) const {
    return index < 0 ? nullptr : &spec_.tensors[static_cast<size_t>(index)];
  }
  const float* vector(int index) const { return index < 0 ? nullptr : static_cast<const float*>(tensor(index)->data); }
  int width(int reg) const { return spec_.registers[static_cast<size_t>(reg)].width; }
  bool quantized(int reg) const { return spec_.registers[static_cast<size_t>(reg)].rows == SNELLO_ROWS_INT8; }
  const snello::FloatRows& rows(int reg) const { return memory_[static_cast<size_t>(reg)].rows; }

  snello::Part plan(int begin, int end) const;
  bool can_join(const snello::Part& part, const snello::Stage& stage, const snello::Action& next) const;
  bool side_by_side(const snello::Part& part, const snello::Stage& stage, const snello_op& next) const;
  bool independent(const snello_op& before, const snello_op& after) const;
  std::pair<const snello_op&, const snello_op&> gate_and_up(const snello::Part& part, const snello::Stage& stage,
                                                            const snello_op& activate) const;
  int gate_of(const snello::Part& part, const snello::Stage& stage, const snello::Stage& next) const;
  bool forgotten(int reg, int after) const;
  bool runs_gated(const snello::Stage& stage) const;
  snello::Memory lay_out(const snello::ProgramFacts& facts);

  static bool has_two_ways(const snello_batch& batch);
  void begin(const snello_batch& batch);
  void look_at(const snello_batch& batch);
  void gather(const snello_batch& batch);
  void run(const snello::Part& part, const Rows& rows);
  void run_stage(const snello::Part& part, const snello::Stage& stage, const Rows& rows);
  void run_rows(const snello::Part& part, const snello::Stage& stage, const Rows& rows);
  void run_row_action(const snello::Action& action, const Rows& rows, int m0, int m1);
  void run_linears(const snello::Part& part, const snello::Stage& stage, const Rows& rows);
  void run_attend(const snello_op& op, const Rows& rows);
  void group_by_expert(const snello_op& op, int num_rows);
  void dispatch(const snello_op& op, int m0, int m1);
  void transform_by_expert(snello::TransformTask task, const snello_op& op, int m0, int m1);
  void combine(const snello_op& op, const Rows& rows, int m0, int m1);
  void add_linear(Linears* job, const snello_op& op, const Rows& rows) const;
  void add_group(Linears* job, snello::LinearTask task, const snello_tensor* weights,
                 const snello::RowGroup& group) const;
  void group_by_adapter(const snello_batch& batch);
  snello::LinearTask linear_task(const snello_op& op, const Rows& rows) const;
  snello::LinearTask gated_task(const snello::Part& part, const snello::Stage& stage, const Rows& rows) const;
  snello::TransformTask transform_task(const snello_op& op, const Rows& rows) const;
  snello::AttentionTask attention_task(const snello_op& op, const Rows& rows) const;
  snello::StoreTask store_task(const snello_op& op, const Rows& rows) const;
  snello::ConvolveTask convolve_task(const snello_op& op) const;
  void save_states(const snello_batch& batch);
  void restore_states();
  void divide_rows(int rows_per_block, int before);
  int64_t row_cost(const snello::Part& part, const snello::Stage& stage) const;
  void flag_infinite_outputs(const Rows& rows);
  int spread_not_finite(const snello_batch& batch);

  template <typename Place, typename Treat>
  int replay(const snello_batch& batch, Place place, Treat treat);

  snello::Pool& pool_;
  snello::ProgramSpec spec_;
  int output_;
  bool check_outputs_;
  std::vector<snello::Side> sides_;
  std::vector<snello::RegisterMemory> memory_;
  uint64_t touched_bytes_ = 0;
  uint8_t* scratch_ = nullptr;  // attention's, one per thread
  snello::Memory arena_;
  int gather_;
  snello::Part over_rows_, over_outputs_, over_blocks_;

  // Of the step under way; sized once. `batch_` is what was given, and from GATHER on `outputs_`, its output rows, if
  // these are not all.
  const snello_batch* batch_ = nullptr;
  snello_batch outputs_{};
  std::vector<int32_t> output_positions_, output_sequences_, output_adapters_;
  int64_t positions_seen_ = 0;  // by all rows together
  std::vector<uint8_t> not_finite_, output_not_finite_;
  std::vector<int32_t> zeros_;
  std::vector<std::vector<int32_t>> shifted_positions_;  // per op: EMBED of positions + i1
  std::vector<snello::RowBlock> blocks_;
  int blocks_for_ = 0;     // rows per block that blocks_ was made for; 0: none
  int blocks_before_ = 0;  // and the position before which rows are in them
  std::vector<snello::LinearShare> shares_;
  std::vector<snello::RowGroup> adapted_;  // rows with adapters
  std::vector<snello::SavedState> saved_;  // `saved_values_` holds the rows themselves, one after the other
  std::vector<float> saved_values_;

  // Of the DISPATCH under way; sized once. `source_`: the row that a dispatched one comes from; `places_`: where the
  // choices of each row went.
  int num_dispatched_ = 0;
  std::vector<snello::RowGroup> groups_;
  std::vector<int32_t> source_, places_, cursor_;
  std::vector<uint8_t> expert_not_finite_;

  // Which products steps of one row take, and those of the step under way.
  static constexpr int kForOneRow = 1;  // the way of Kernels::for_one_row
  snello::Trial one_row_;
  const snello::Kernels* products_ = nullptr;

  bool profiling_ = false;
  std::vector<double> seconds_;
};

// Running a program: see program.h. A step decides only how work is divided, never what is computed, so every choice of
// chunk and every threshold below is free to change.
#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <utility>

#include "guard.h"
#include "score.h"

using snello::Action;
using snello::fail;
using snello::FloatRows;
using snello::Part;
using snello::Stage;

namespace snello {
namespace {

constexpr int kMaxJoinedLinears = 8;

// Work is shared in pieces that take several microseconds: a barrier costs about one, a claim a tenth.
constexpr int64_t kRowPiece = 8192;  // columns, weighted by how much each costs

bool row_like(Action::Kind kind) { return kind == Action::kRow || kind == Action::kStoreState; }

// What a column costs, next to an addition.
int column_cost(int kind) {
  switch (kind) {
    case SNELLO_OP_NORM: return 3;
    case SNELLO_OP_TRANSFORM: return 6;
    case SNELLO_OP_ACTIVATE: return 6;
    case SNELLO_OP_EMBED: return 4;
    case SNELLO_OP_STORE: return 12;
    case SNELLO_OP_CONVOLVE: return 6;
    default: return 1;
  }
}

// Whether a row of this operation reads other rows of its inputs: they must be complete before it begins.
bool reads_neighbours(const snello_op& op) { return op.kind == SNELLO_OP_CONVOLVE; }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace
}  // namespace snello

// ---- making ----

snello_program::snello_program(snello::Pool& pool, snello::ProgramSpec spec, const snello::ProgramFacts& facts)
    : pool_(pool),
      spec_(std::move(spec)),
      output_(spec_.ops.back().out),
      check_outputs_(true),
      sides_(facts.sides),
      memory_(spec_.registers.size()),
      arena_(lay_out(facts)),
      gather_(facts.gather),
      over_rows_(plan(0, facts.gather)),
      over_outputs_(plan(facts.gather + 1, facts.head)),
      over_blocks_(plan(facts.head, static_cast<int>(spec_.ops.size()))) {
  // Rows that an integer product takes have been checked when they were quantized.
  for (const snello_op& op : spec_.ops)
    if (op.kind == SNELLO_OP_LINEAR) check_outputs_ = !quantized(op.in[0]);
  const auto max_rows = static_cast<size_t>(spec_.max_rows);
  not_finite_.resize(max_rows);
  output_not_finite_.resize(max_rows);
  output_positions_.resize(max_rows);
  output_sequences_.resize(max_rows);
  output_adapters_.resize(max_rows);
  zeros_.resize(max_rows);
  blocks_.reserve(max_rows);
  adapted_.reserve(max_rows);
  const auto experts = static_cast<size_t>(facts.most_experts);
  const size_t most_dispatched = max_rows * static_cast<size_t>(facts.most_active);
  const int enough = snello::kernels().enough_rows, parts = enough > 0 ? spec_.max_rows / enough : 1;
  const auto most_parts = static_cast<size_t>(std::clamp(parts, 1, pool_.num_threads()));
  shares_.reserve(snello::kMaxJoinedLinears * std::max<size_t>(experts, 1) * most_parts);
  groups_.reserve(experts);
  cursor_.resize(experts);
  source_.resize(most_dispatched);
  places_.resize(most_dispatched);
  expert_not_finite_.resize(most_dispatched);
  seconds_.resize(spec_.ops.size());
  shifted_positions_.resize(spec_.ops.size());
  for (size_t i = 0; i < spec_.ops.size(); ++i)
    if (spec_.ops[i].kind == SNELLO_OP_EMBED && spec_.ops[i].i[0] == 1) shifted_positions_[i].resize(max_rows);
}

Part snello_program::plan(int begin, int end) const {
  Part part;
  for (int i = begin; i < end; ++i) {
    if (op(i).kind == SNELLO_OP_LINEAR || op(i).kind == SNELLO_OP_EXPERTS || op(i).kind == SNELLO_OP_ADAPT) {
      part.actions.push_back({Action::kLinear, i});
    } else if (op(i).kind == SNELLO_OP_ATTENTION) {
      part.actions.push_back({Action::kAttend, i});
    } else {
      part.actions.push_back({Action::kRow, i});
      if (op(i).kind == SNELLO_OP_CONVOLVE) part.actions.push_back({Action::kStoreState, i});
    }
  }
  for (int a = 0; a < static_cast<int>(part.actions.size()); ++a) {
    part.single_stages.push_back({a, a + 1});
    if (!part.stages.empty() && can_join(part, part.stages.back(), part.actions[static_cast<size_t>(a)]))
      ++part.stages.back().end;
    else
      part.stages.push_back({a, a + 1});
  }
  for (size_t s = 0; s + 1 < part.stages.size(); ++s)
    part.stages[s].gate = gate_of(part, part.stages[s], part.stages[s + 1]);
  return part;
}

bool snello_program::can_join(const Part& part, const Stage& stage, const Action& next) const {
  const Action::Kind kind = part.actions[static_cast<size_t>(stage.begin)].kind;
  const snello_op& before = op(part.actions[static_cast<size_t>(stage.begin)].op);
  if (dispatched(before) != dispatched(op(next.op)) || op(next.op).kind == SNELLO_OP_DISPATCH) return false;
  if (next.kind == Action::kStoreState || (next.kind == Action::kRow && snello::reads_neighbours(op(next.op))))
    return false;
  if (snello::row_like(kind)) return snello::row_like(next.kind);
  return kind == Action::kLinear && next.kind == Action::kLinear && side_by_side(part, stage, op(next.op));
}

bool snello_program::side_by_side(const Part& part, const Stage& stage, const snello_op& next) const {
  if (stage.end - stage.begin >= snello::kMaxJoinedLinears) return false;
  for (int a = stage.begin; a < stage.end; ++a)
    if (!independent(op(part.actions[static_cast<size_t>(a)].op), next)) return false;
  return true;
}

// Two products that may run at once: neither reads what the other writes, and they write different columns.
bool snello_program::independent(const snello_op& before, const snello_op& after) const {
  if (after.in[0] == before.out || before.in[0] == after.out) return false;
  if (before.out != after.out) return true;
  if (before.kind == SNELLO_OP_ADAPT || after.kind == SNELLO_OP_ADAPT) return false;
  const int end_before = before.i[1] + tensor(before.tensor[0])->rows;
  const int end_after = after.i[1] + tensor(after.tensor[0])->rows;
  return before.i[1] >= end_after || after.i[1] >= end_before;
}

// ---- one step ----

int snello_program::step(const snello_batch& batch, float* outputs) {
  const int columns = output_width();
  FloatRows& place = memory_[static_cast<size_t>(output_)].rows;
  struct Lent {
    FloatRows& place;
    const FloatRows own;
    ~Lent() { place = own; }
  };
  const Lent lent{place, place};  // to the caller's memory, until the end of this step
  const int result = replay(
      batch, [&](int first) { place = {outputs + int64_t{first} * columns, columns}; },
      [&](const Rows& rows) {
        if (check_outputs_) flag_infinite_outputs(rows);
      });
  if (result <= 0) return result;
  for (int i = 0; i < batch.num_outputs; ++i)
    if (not_finite_[static_cast<size_t>(batch.output_rows[i])])
      std::fill_n(outputs + int64_t{i} * columns, columns, std::numeric_limits<float>::quiet_NaN());
  return result;
}

int snello_program::score(const snello_batch& batch, const int32_t* targets, float* log_probability, int32_t* top1) {
  const int columns = output_width();
  const int result = replay(
      batch, [](int) {},
      [&](const Rows& block) {
        snello::parallel_for(pool_, block.count, 1, [&](int, int64_t begin, int64_t end) {
          for (int64_t m = begin; m < end; ++m) {
            const float* logits = rows(output_).row(m);
            const snello::LogitRow row = snello::logit_row(logits, columns);
            const int64_t output = block.first + m;
            if (!row.finite()) block.not_finite[m] = 1;
            log_probability[output] = row.log_probability(logits[targets[output]]);
            if (top1 != nullptr) top1[output] = row.argmax;
          }
        });
      });
  for (int i = 0; result > 0 && i < batch.num_outputs; ++i) {
    if (!not_finite_[static_cast<size_t>(batch.output_rows[i])]) continue;
    log_probability[i] = std::numeric_limits<float>::quiet_NaN();
    if (top1 != nullptr) top1[i] = -1;
  }
  return result;
}

// All rows, then the output rows, then these block by block: `place(first)` before a block, `treat(rows)` after it.
template <typename Place, typename Treat>
int snello_program::replay(const snello_batch& batch, Place place, Treat treat) {
  const std::lock_guard<std::mutex> lock(pool_.mutex());
  const snello::FloatEnvironment environment;
  pool_.wake();
  const auto start = std::chrono::steady_clock::now();
  begin(batch);
  save_states(batch);
  try {
    run(over_rows_, {0, batch.num_rows, not_finite_.data()});
    if (batch.num_outputs > 0) {
      gather(batch);
      run(over_outputs_, {0, batch.num_outputs, output_not_finite_.data()});
    }
    for (int first = 0; first < batch.num_outputs; first += spec_.head_rows) {
      const Rows rows{first, std::min(spec_.head_rows, batch.num_outputs - first), output_not_finite_.data() + first};
      place(first);
      run(over_blocks_, rows);
      treat(rows);
    }
  } catch (...) {  // out of memory: the same step can be run again
    restore_states();
    throw;
  }
  if (has_two_ways(batch) && !profiling_) one_row_.took(snello::seconds_since(start));
  for (int i = 0; i < batch.num_outputs; ++i)
    if (output_not_finite_[static_cast<size_t>(i)]) not_finite_[static_cast<size_t>(batch.output_rows[i])] = 1;
  batch_ = nullptr;
  const int result = spread_not_finite(batch);
  if (result > 0) restore_states();
  return result;
}

// Whether the products of this batch can be done in two ways: `one_row_` finds out which is faster.
bool snello_program::has_two_ways(const snello_batch& batch) {
  return batch.num_rows == 1 && snello::kernels().for_one_row != nullptr;
}

void snello_program::begin(const snello_batch& batch) {
  products_ = &snello::kernels();
  if (has_two_ways(batch) && one_row_.way() == kForOneRow) products_ = products_->for_one_row;
  look_at(batch);
  std::fill_n(not_finite_.begin(), batch.num_rows, uint8_t{0});
  std::fill_n(output_not_finite_.begin(), batch.num_outputs, uint8_t{0});
  for (size_t i = 0; i < shifted_positions_.size(); ++i)
    if (!shifted_positions_[i].empty())
      for (int m = 0; m < batch.num_rows; ++m)
        shifted_positions_[i][static_cast<size_t>(m)] = batch.positions[m] + spec_.ops[i].i[1];
}

// What follows runs over the rows of this batch.
void snello_program::look_at(const snello_batch& batch) {
  batch_ = &batch;
  blocks_for_ = 0;
  positions_seen_ = 0;
  for (int m = 0; m < batch.num_rows; ++m) positions_seen_ += batch.positions[m] + 1;
  group_by_adapter(batch);
}

void snello_program::gather(const snello_batch& batch) {
  const int count = batch.num_outputs;
  if (count == batch.num_rows) return;
  const auto start = std::chrono::steady_clock::now();
  for (const int reg : op(gather_).in) {
    if (reg < 0) continue;
    const FloatRows& moved = rows(reg);
    for (int i = 0; i < count; ++i)  // they ascend, so none is overwritten before it has moved
      if (batch.output_rows[i] != i) std::copy_n(moved.row(batch.output_rows[i]), width(reg), moved.row(i));
  }
  for (int i = 0; i < count; ++i) {
    const int m = batch.output_rows[i];
    const auto at = static_cast<size_t>(i);
    output_positions_[at] = batch.positions[m];
    output_sequences_[at] = batch.sequences[m];
    if (batch.adapters != nullptr) output_adapters_[at] = batch.adapters[m];
  }
  outputs_ = batch;
  outputs_.num_rows = count;
  outputs_.tokens = outputs_.types = nullptr;
  outputs_.positions = output_positions_.data();
  outputs_.sequences = output_sequences_.data();
  if (batch.adapters != nullptr) outputs_.adapters = output_adapters_.data();
  look_at(outputs_);
  if (profiling_) seconds_[static_cast<size_t>(gather_)] += snello::seconds_since(start);
}

void snello_program::group_by_adapter(const snello_batch& batch) {
  adapted_.clear();
  if (batch.adapters == nullptr) return;
  for (int m = 0, end; m < batch.num_rows; m = end) {
    for (end = m + 1; end < batch.num_rows && batch.adapters[end] == batch.adapters[m];) ++end;
    if (batch.adapters[m] >= 0) adapted_.push_back({batch.adapters[m], m, end});
  }
}

// 1 + the first row that is not finite, or 0. Every row of its sequence is marked along with it.
int snello_program::spread_not_finite(const snello_batch& batch) {
  int result = 0;
  for (int m = 0; m < batch.num_rows;) {
    int end = m, first = -1;
    for (; end < batch.num_rows && batch.sequences[end] == batch.sequences[m]; ++end)
      if (first < 0 && not_finite_[static_cast<size_t>(end)]) first = end;
    if (first >= 0) {
      std::fill(not_finite_.begin() + m, not_finite_.begin() + end, uint8_t{1});
      if (result == 0) result = 1 + first;
    }
    m = end;
  }
  return result;
}

void snello_program::run(const Part& part, const Rows& rows) {
  if (!profiling_) {
    for (size_t s = 0; s < part.stages.size(); ++s) {
      run_stage(part, part.stages[s], rows);
      if (!runs_gated(part.stages[s])) continue;
      Stage rest = part.stages[++s];
      if (++rest.begin < rest.end) run_stage(part, rest, rows);
    }
    return;
  }
  for (const Stage& stage : part.single_stages) {
    const auto start = std::chrono::steady_clock::now();
    run_stage(part, stage, rows);
    seconds_[static_cast<size_t>(part.actions[static_cast<size_t>(stage.begin)].op)] += snello::seconds_since(start);
  }
}

void snello_program::run_stage(const Part& part, const Stage& stage, const Rows& rows) {
  const Action& action = part.actions[static_cast<size_t>(stage.begin)];
  const snello_op& first = op(action.op);
  if (first.kind == SNELLO_OP_DISPATCH) group_by_expert(first, rows.count);
  const Rows own = dispatched(first) ? dispatched_rows() : rows;
  if (snello::row_like(action.kind)) return run_rows(part, stage, own);
  if (action.kind == Action::kLinear) return run_linears(part, stage, own);
  run_attend(first, rows);
}

// ---- row by row ----

int64_t snello_program::row_cost(const Part& part, const Stage& stage) const {
  int64_t cost = 0;
  for (int a = stage.begin; a < stage.end; ++a) {
    const snello_op& o = op(part.actions[static_cast<size_t>(a)].op);
    cost += int64_t{width(o.out >= 0 ? o.out : o.in[0])} * snello::column_cost(o.kind);
  }
  return cost;
}

void snello_program::run_rows(const Part& part, const Stage& stage, const Rows& rows) {
  const int64_t per_row = row_cost(part, stage);
  const int64_t chunk = std::max<int64_t>(1, snello::kRowPiece / per_row);
  const auto run_range = [&](int, int64_t begin, int64_t end) {
    for (int a = stage.begin; a < stage.end; ++a)
      run_row_action(part.actions[static_cast<size_t>(a)], rows, static_cast<int>(begin), static_cast<int>(end));
  };
  if (per_row * rows.count <= 2 * snello::kRowPiece) return run_range(0, 0, rows.count);
  snello::parallel_for(pool_, rows.count, chunk, run_range);
}

void snello_program::run_row_action(const Action& action, const Rows& r, int m0, int m1) {
  const snello::Kernels& k = snello::kernels();
  const snello_op& o = op(action.op);
  const FloatRows none{};
  const FloatRows& out = o.out >= 0 ? rows(o.out) : none;
  const FloatRows& in0 = o.in[0] >= 0 ? rows(o.in[0]) : none;
  const snello_tensor* t = tensor(o.tensor[0]);
  if (action.kind == Action::kStoreState) return k.store_state(convolve_task(o), m0, m1);
  switch (o.kind) {
    case SNELLO_OP_CONVOLVE: return k.convolve(convolve_task(o), m0, m1);
    case SNELLO_OP_STORE: {
      const snello::StoreTask task = store_task(o, r);
      for (int h = 0; h < task.cache.num_kv_heads; ++h) k.store_kv(task, h, m0, m1);
      return;
    }
    case SNELLO_OP_EMBED: {
      const int32_t* types = batch_->types ? batch_->types : zeros_.data();
      const int32_t* ids = o.i[0] == 0   ? batch_->tokens
                           : o.i[0] == 1 ? shifted_positions_[static_cast<size_t>(action.op)].data()
                                         : types;
      const snello_tensor* more = o.tensor[2] >= 0 ? tensor(o.tensor[2]) : nullptr;
      return k.embed({t, more, ids, vector(o.tensor[1]), o.i[3], o.f[0], o.i[2] == 1, out, width(o.out)}, m0, m1);
    }
    case SNELLO_OP_NORM:
      return k.norm(
          {in0, out, width(o.out), o.i[1], o.i[0] == 1, vector(o.tensor[0]), vector(o.tensor[1]), o.f[0], o.f[1]}, m0,
          m1);
    case SNELLO_OP_TRANSFORM:
      if (o.i[1] == 1) return transform_by_expert(transform_task(o, r), o, m0, m1);
      return k.transform(transform_task(o, r), m0, m1);
    case SNELLO_OP_ROPE:
      return k.rope(
          {out, batch_->positions, o.i[0], o.i[1], o.i[2], o.i[3] == 1, vector(o.tensor[0]), vector(o.tensor[1])}, m0,
          m1);
    case SNELLO_OP_ACTIVATE:
      return k.activate({in0, o.in[1] >= 0 ? rows(o.in[1]) : none, out, o.i[0], width(o.out)}, m0, m1);
    case SNELLO_OP_ADD: return k.add(in0, rows(o.in[1]), o.f[0], out, width(o.out), m0, m1);
    case SNELLO_OP_SCALE: return k.scale(in0, o.f[0], o.f[1], out, width(o.out), m0, m1);
    case SNELLO_OP_ROUTE: return k.route({in0, out, width(o.in[0]), o.i[0], o.i[1] == 1}, m0, m1);
    case SNELLO_OP_DISPATCH: return dispatch(o, m0, m1);
    case SNELLO_OP_COMBINE: return combine(o, r, m0, m1);
    default:  // HEAD
      for (int m = m0; m < m1; ++m) std::copy_n(in0.row(r.first + m), width(o.out), out.row(m));
  }
}

snello::TransformTask snello_program::transform_task(const snello_op& o, const Rows& r) const {
  const auto out = static_cast<size_t>(o.out);
  const FloatRows& in = rows(o.in[0]);
  return {in,
          width(o.in[0]),
          vector(o.tensor[0]),
          o.i[0],
          rows(o.out),
          memory_[out].quant,
          quantized(o.out),
          width(o.out),
          r.not_finite,
          o.f[0],
          vector(o.tensor[1]),
          memory_[out].halves};
}

// ---- outputs ----

void snello_program::flag_infinite_outputs(const Rows& r) {
  constexpr int64_t kColumns = 16384;
  constexpr uint32_t kExponent = 0x7f800000;
  const FloatRows& out = rows(output_);
  const int64_t columns = output_width(), pieces = snello::divide_up(columns, kColumns);
  snello::parallel_for(pool_, pieces * r.count, 2, [&](int, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t m = item / pieces, at = item % pieces * kColumns;
      const float* row = out.row(m);
      uint32_t infinite = 0;
      for (int64_t i = at; i < std::min(at + kColumns, columns); ++i)
        infinite |= (std::bit_cast<uint32_t>(row[i]) & kExponent) == kExponent;
      if (infinite) __atomic_store_n(r.not_finite + m, uint8_t{1}, __ATOMIC_RELAXED);
    }
  });
}

int snello_program::one_row(double* seconds) const {
  const std::lock_guard<std::mutex> lock(pool_.mutex());
  for (const int way : {0, kForOneRow}) seconds[way] = one_row_.decided() ? one_row_.median(way) : 0.0;
  if (!one_row_.decided()) return SNELLO_ONE_ROW_UNDECIDED;
  return one_row_.way() == kForOneRow ? SNELLO_ONE_ROW_VECTORS : SNELLO_ONE_ROW_TILES;
}

void snello_program::profile(bool enable, double* seconds) {
  const std::lock_guard<std::mutex> lock(pool_.mutex());
  if (seconds != nullptr) std::copy(seconds_.begin(), seconds_.end(), seconds);
  std::fill(seconds_.begin(), seconds_.end(), 0.0);
  profiling_ = enable;
}

// ---- the C ABI ----

extern "C" {

snello_program* snello_program_create(snello_pool* pool, const snello_op* ops, int32_t num_ops,
                                      const snello_tensor* tensors, int32_t num_tensors,
                                      const snello_register* registers, int32_t num_registers, snello_cache* cache,
                                      int32_t max_rows, int32_t head_rows) {
  const auto given = [](const void* array, int32_t count) { return count == 0 || (count > 0 && array != nullptr); };
  if (pool == nullptr) return fail("a program needs a pool"), nullptr;
  if (!given(ops, num_ops) || !given(tensors, num_tensors) || !given(registers, num_registers))
    return fail("%d operations, %d tensors, %d registers: an array is missing", num_ops, num_tensors, num_registers),
           nullptr;
  snello_program* made = nullptr;
  snello::guarded("cannot make the program", [&] {
    snello::ProgramSpec spec{{ops, ops + num_ops},
                             {tensors, tensors + num_tensors},
                             {registers, registers + num_registers},
                             cache,
                             max_rows,
                             head_rows};
    snello::ProgramFacts facts;
    if (snello::check_program(spec, &facts) != 0) return -1;
    made = new snello_program(pool->pool, std::move(spec), facts);
    return 0;
  });
  return made;
}

void snello_program_destroy(snello_program* program) { delete program; }

int32_t snello_program_output_width(const snello_program* program) {
  return program == nullptr ? fail("output width: no program") : program->output_width();
}

uint64_t snello_program_arena_bytes(const snello_program* program) {
  return program == nullptr ? 0 : program->arena_bytes();
}

int32_t snello_step(snello_program* program, const snello_batch* batch, float* outputs) {
  if (program == nullptr || batch == nullptr) return fail("step: no program or no batch");
  if (snello::check_batch(program->spec(), *batch) != 0) return -1;
  if (batch->num_outputs > 0 && outputs == nullptr) return fail("step: %d outputs and no memory", batch->num_outputs);
  return snello::guarded("step", [&] { return program->step(*batch, outputs); });
}

int32_t snello_score(snello_program* program, const snello_batch* batch, const int32_t* targets, float* log_probability,
                     int32_t* top1) {
  if (program == nullptr || batch == nullptr) return fail("score: no program or no batch");
  if (snello::check_batch(program->spec(), *batch) != 0) return -1;
  if (batch->num_outputs > 0 && (targets == nullptr || log_probability == nullptr))
    return fail("score: %d outputs and no targets or no memory", batch->num_outputs);
  for (int32_t i = 0; i < batch->num_outputs; ++i)
    if (targets[i] < 0 || targets[i] >= program->output_width())
      return fail("score: target %d is token %d of %d", i, targets[i], program->output_width());
  return snello::guarded("score", [&] { return program->score(*batch, targets, log_probability, top1); });
}

int32_t snello_one_row(const snello_program* program, double* seconds) {
  if (program == nullptr || seconds == nullptr) return fail("one row: no program or no memory");
  return snello::guarded("one row", [&] { return program->one_row(seconds); });
}

int32_t snello_profile(snello_program* program, int32_t enable, double* seconds) {
  if (program == nullptr) return fail("profile: no program");
  return snello::guarded("profile", [&] {
    program->profile(enable != 0, seconds);
    return 0;
  });
}

}  // extern "C"

// What brings positions of a sequence together: attention, and short convolutions (see program.h). Both meet in pages
// what earlier steps left there, and leave there what later ones need.
#include <algorithm>
#include <limits>

#include "program.h"

using snello::AttentionTask;

namespace snello {
namespace {

constexpr int kAttendVectors = 16;         // rows times query heads of a kv head that attend() treats at once
constexpr int64_t kAttendPiece = 1 << 17;  // multiply-adds of a piece of shared work

// Which positions of which sequences a task's rows are, and where these live.
template <typename Task>
void locate(Task* task, const snello_batch& batch) {
  task->positions = batch.positions;
  task->sequences = batch.sequences;
  task->page_tables = batch.page_tables;
  task->pages_per_sequence = batch.pages_per_sequence;
}

}  // namespace
}  // namespace snello

// ---- attention ----

snello::StoreTask snello_program::store_task(const snello_op& o, const Rows& r) const {
  snello::StoreTask task{};
  task.cache = spec_.cache->layers[static_cast<size_t>(o.i[0])];
  task.keys = rows(o.in[0]);
  task.values = rows(o.in[1]);
  snello::locate(&task, *batch_);
  task.not_finite = r.not_finite;
  return task;
}

AttentionTask snello_program::attention_task(const snello_op& o, const Rows& r) const {
  AttentionTask task{};
  task.cache = spec_.cache->layers[static_cast<size_t>(o.i[0])];
  task.queries = rows(o.in[0]);
  task.output = rows(o.out);
  snello::locate(&task, *batch_);
  task.lengths = batch_->lengths;
  task.num_heads = o.i[1];
  task.window = o.i[4];
  task.sinks = o.i[5];
  task.causal = o.i[6] == 1;
  task.scale = o.f[0];
  task.soft_cap = o.f[1];
  task.not_finite = r.not_finite;
  return task;
}

// Blocks of rows at positions below `before` that attention treats at once: of one sequence, and not across a tile's
// edge.
void snello_program::divide_rows(int rows_per_block, int before) {
  if (blocks_for_ == rows_per_block && blocks_before_ == before) return;
  blocks_for_ = rows_per_block;
  blocks_before_ = before;
  blocks_.clear();
  for (int m = 0; m < batch_->num_rows;) {
    int end = m + 1;
    while (end < batch_->num_rows && end < m + rows_per_block && batch_->sequences[end] == batch_->sequences[m] &&
           batch_->positions[end] < before &&
           batch_->positions[end] / snello::kPage == batch_->positions[m] / snello::kPage)
      ++end;
    if (batch_->positions[m] < before) blocks_.push_back({m, end});
    m = end;
  }
}

void snello_program::run_attend(const snello_op& o, const Rows& r) {
  const AttentionTask task = attention_task(o, r);
  const int kv_heads = o.i[2], group = o.i[1] / kv_heads;
  divide_rows(std::max(1, snello::kAttendVectors / group), o.i[7] > 0 ? o.i[7] : std::numeric_limits<int>::max());
  if (blocks_.empty()) return;
  const auto blocks = static_cast<int64_t>(blocks_.size()), items = blocks * kv_heads;
  const int64_t work = 2 * positions_seen_ * o.i[1] * o.i[3];
  const snello::Kernels& k = snello::kernels();
  // One kv head after the other, its longest rows first: they reuse its keys, and what is left for the end is short.
  const auto run_items = [&](int worker, int64_t begin, int64_t end) {
    uint8_t* scratch = scratch_ + int64_t{worker} * snello::kAttentionScratchBytes;
    for (int64_t item = begin; item < end; ++item) {
      const snello::RowBlock& block = blocks_[static_cast<size_t>(blocks - 1 - item % blocks)];
      k.attend(task, static_cast<int>(item / blocks), block.begin, block.end, scratch);
    }
  };
  if (work <= snello::kAttendPiece) return run_items(0, 0, items);
  const int64_t wanted = snello::kAttendPiece * items / work;
  const int64_t most = items / (4 * pool_.num_threads());
  snello::parallel_for(pool_, items, std::max<int64_t>(1, std::min(wanted, most)), run_items);
}

// ---- convolutions ----

snello::ConvolveTask snello_program::convolve_task(const snello_op& o) const {
  snello::ConvolveTask task{};
  task.cache = spec_.cache->layers[static_cast<size_t>(o.i[0])];
  task.gate = rows(o.in[0]);
  task.input = rows(o.in[1]);
  task.output_gate = rows(o.in[2]);
  task.output = rows(o.out);
  task.taps = vector(o.tensor[0]);
  task.bias = vector(o.tensor[1]);
  snello::locate(&task, *batch_);
  task.num_rows = batch_->num_rows;
  task.kernel = o.i[1];
  task.width = width(o.out);
  return task;
}

// A step that fails is run again without the sequence that failed, so the rows of state that the others began with must
// still be there. Only a step of many rows takes their slots.
void snello_program::save_states(const snello_batch& b) {
  saved_.clear();
  saved_values_.clear();
  for (const snello_op& o : spec_.ops) {
    if (o.kind != SNELLO_OP_CONVOLVE) continue;
    const snello::CacheLayer& layer = spec_.cache->layers[static_cast<size_t>(o.i[0])];
    for (int m = 0; m < b.num_rows; ++m) {
      if (m > 0 && b.sequences[m] == b.sequences[m - 1]) continue;
      const int last = m + layer.state_rows - o.i[1] + 1;  // the first row that may take the slot of one before m
      if (last >= b.num_rows || b.sequences[last] != b.sequences[m]) continue;
      const int32_t* pages = b.page_tables + int64_t{b.sequences[m]} * b.pages_per_sequence;
      for (int p = std::max(0, b.positions[m] - o.i[1] + 1); p < b.positions[m]; ++p) {
        float* place = layer.state(pages[p / snello::kPage], p);
        saved_.push_back({place, layer.head_dim});
        saved_values_.insert(saved_values_.end(), place, place + layer.head_dim);
      }
    }
  }
}

void snello_program::restore_states() {
  const float* values = saved_values_.data();
  for (const snello::SavedState& saved : saved_) {
    std::copy_n(values, saved.width, saved.place);
    values += saved.width;
  }
}

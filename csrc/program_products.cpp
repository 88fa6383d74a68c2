// Matrix products (see program.h): products that run at once are one job, whose units the threads share. Few rows are
// bound by memory, so threads read long runs of weights; of many rows each takes some panels; of very many, some rows.
#include <algorithm>
#include <limits>

#include "program.h"

using snello::FloatRows;
using snello::LinearTask;
using snello::Part;
using snello::Stage;

namespace snello {
namespace {

// Work is shared in pieces that take several microseconds.
constexpr int64_t kLinearPieceFew = 32 << 10;  // bytes of weights, for few rows and for many
constexpr int64_t kLinearPieceMany = 128 << 10;
constexpr int64_t kLinearPieceWork = 8 << 20;  // and then bytes times rows
constexpr int kFewRowsFloat = 4;

int64_t panels_of(const snello_tensor& weights) { return divide_up(weights.rows, kPanel); }

// Rows that cost about what one does.
int few_rows(const Kernels& k, const LinearTask& task) {
  const bool as_halves = task.halves.data && k.multiplies_halves != nullptr && k.multiplies_halves();
  return task.quantized || as_halves ? k.few_rows : kFewRowsFloat;
}

// The product of rows [begin, end) of a task.
LinearTask rows_of(LinearTask task, int begin, int end) {
  task.num_rows = end - begin;
  task.output.data = task.output.row(begin);
  if (task.quantized) {
    const QuantRows quant = task.quant;
    task.quant.q = quant.row(begin);
    task.quant.scale = quant.scale + begin;
    task.quant.sums = quant.row_sums(begin);
  } else if (task.halves.data) {
    task.halves.data = task.halves.row(begin);
  } else {
    task.input.data = task.input.row(begin);
  }
  return task;
}

}  // namespace
}  // namespace snello

LinearTask snello_program::linear_task(const snello_op& o, const Rows& r) const {
  const auto in = static_cast<size_t>(o.in[0]);
  const FloatRows& out = rows(o.out);
  return {tensor(o.tensor[0]),
          memory_[in].quant,
          memory_[in].rows,
          quantized(o.in[0]),
          {out.data + o.i[1], out.stride},
          vector(o.tensor[1]),
          o.i[0] == 1,
          r.count,
          nullptr,
          0,
          memory_[in].halves};
}

// Products that run at once, as one job. Its unit is as many panels as belong together.
struct snello_program::Linears {
  const snello::Kernels& kernels;
  std::vector<snello::LinearShare>& shares;
  int unit = 1, most_rows = 0, least_rows = std::numeric_limits<int>::max();
  int64_t units = 0, bytes = 0, work = 0;  // work: bytes times rows

  void add(const LinearTask& task) {
    shares.push_back({task, 0, 0});
    most_rows = std::max(most_rows, task.num_rows);
    least_rows = std::min(least_rows, task.num_rows);
    const auto read = static_cast<int64_t>(task.weights->bytes + (task.up ? task.up->bytes : 0));
    bytes += read;
    work += read * task.num_rows;
  }
  // The first of `parts` stretches of rows of all products, then the second one, and so on.
  void divide_rows(int parts) {
    const auto whole = static_cast<int>(shares.size());
    shares.resize(static_cast<size_t>(whole * parts));
    for (int i = parts - 1; i >= 0; --i)
      for (int s = 0; s < whole; ++s) {
        const LinearTask& task = shares[static_cast<size_t>(s)].task;
        const int rows = task.num_rows;
        shares[static_cast<size_t>(i * whole + s)].task =
            snello::rows_of(task, rows * i / parts, rows * (i + 1) / parts);
      }
    bytes *= parts;
  }
  bool by_channel() const {
    return std::any_of(shares.begin(), shares.end(),
                       [](const snello::LinearShare& share) { return snello::by_channel(share.task.weights->format); });
  }
  void divide(int panels) {
    unit = panels;
    for (snello::LinearShare& share : shares) {
      share.first = units;
      units += snello::divide_up(snello::panels_of(*share.task.weights), unit);
      share.end = units;
    }
  }
  void run(int64_t begin, int64_t end) const {
    for (const snello::LinearShare& share : shares) {
      const int64_t from = std::max(begin, share.first) - share.first, to = std::min(end, share.end) - share.first;
      if (from >= to) continue;
      const int64_t last = std::min(to * unit, snello::panels_of(*share.task.weights));
      kernels.linear(share.task, static_cast<int>(from * unit), static_cast<int>(last));
    }
  }
};

// An expert's product, or an adapter's, is that of its rows alone; who has none has no part in the job.
void snello_program::add_linear(Linears* job, const snello_op& o, const Rows& r) const {
  const LinearTask task = linear_task(o, r);
  if (o.kind == SNELLO_OP_LINEAR) return job->add(task);
  for (const snello::RowGroup& group : o.kind == SNELLO_OP_EXPERTS ? groups_ : adapted_)
    add_group(job, task, tensor(o.tensor[0] + group.number), group);
}

void snello_program::add_group(Linears* job, LinearTask task, const snello_tensor* weights,
                               const snello::RowGroup& group) const {
  if (weights->rows == 0) return;
  task.weights = weights;
  job->add(snello::rows_of(task, group.begin, group.end));
}

void snello_program::run_linears(const Part& part, const Stage& stage, const Rows& r) {
  shares_.clear();
  Linears job{*products_, shares_};
  if (runs_gated(stage))
    job.add(gated_task(part, stage, r));
  else
    for (int a = stage.begin; a < stage.end; ++a) add_linear(&job, op(part.actions[static_cast<size_t>(a)].op), r);
  if (shares_.empty()) return;
  // Of very many, each thread takes some alone: they stay in its cache from one operation to the next.
  const int enough = job.kernels.enough_rows, parts = enough > 0 ? job.least_rows / enough : 1;
  if (parts > 1) job.divide_rows(std::min(parts, pool_.num_threads()));
  // Few rows are bound by memory, which is read fastest in long runs; many by arithmetic, which is shared in pieces.
  const bool few = job.most_rows <= snello::few_rows(job.kernels, shares_.front().task);
  const bool by_channel = job.by_channel();
  const int panels = few ? job.kernels.few_panels : job.kernels.group_panels;
  job.divide(by_channel ? std::max(panels, snello::kSlabPanels) : panels);

  const int64_t piece = few ? snello::kLinearPieceFew : snello::kLinearPieceMany;
  if (job.work <= piece) return job.run(0, job.units);
  const int64_t threads = pool_.num_threads(), most = snello::divide_up(job.units, 2 * threads);
  const int64_t wanted = std::min(piece * job.units / job.bytes, snello::kLinearPieceWork * job.units / job.work);
  const int64_t chunk = std::clamp<int64_t>(wanted, 1, most);
  // Of a matrix stored by channel a thread reads a part of every channel, and a smaller part is a shorter run.
  const int64_t whole = snello::divide_up(job.units, threads);
  const int64_t first = few && by_channel ? whole : few ? job.units * 7 / 8 / threads : 0;
  snello::parallel_for(pool_, job.units, chunk, [&](int, int64_t begin, int64_t end) { job.run(begin, end); }, first);
}

// Rows that go to experts, between DISPATCH and COMBINE (see program.h): which rows an expert has, and the way there
// and back. The products between are ordinary ones over an expert's rows (program.cpp).
#include <algorithm>
#include <utility>

#include "program.h"

// Counts, then places: rows keep their order within an expert, and a row's choices ascend.
void snello_program::group_by_expert(const snello_op& o, int num_rows) {
  const snello::FloatRows& routes = rows(o.in[1]);
  const int active = width(o.in[1]) / 2;
  num_dispatched_ = num_rows * active;
  std::fill(cursor_.begin(), cursor_.end(), 0);
  std::fill_n(expert_not_finite_.begin(), num_dispatched_, uint8_t{0});
  for (int m = 0; m < num_rows; ++m)
    for (int k = 0; k < active; ++k) ++cursor_[static_cast<size_t>(routes.row(m)[k])];
  groups_.clear();
  int begin = 0;
  for (int e = 0; e < static_cast<int>(cursor_.size()); ++e) {
    const int count = std::exchange(cursor_[static_cast<size_t>(e)], begin);
    if (count > 0) groups_.push_back({e, begin, begin + count});
    begin += count;
  }
  for (int m = 0; m < num_rows; ++m)
    for (int k = 0; k < active; ++k) {
      const int place = cursor_[static_cast<size_t>(routes.row(m)[k])]++;
      places_[static_cast<size_t>(m * active + k)] = place;
      source_[static_cast<size_t>(place)] = m;
    }
}

void snello_program::dispatch(const snello_op& o, int m0, int m1) {
  const snello::RegisterMemory& from = memory_[static_cast<size_t>(o.in[0])];
  const snello::RegisterMemory& to = memory_[static_cast<size_t>(o.out)];
  const int columns = width(o.out);
  for (int m = m0; m < m1; ++m) {
    const int64_t source = source_[static_cast<size_t>(m)];
    if (quantized(o.out)) {
      std::copy_n(from.quant.row(source), columns, to.quant.row(m));
      std::copy_n(from.quant.row_sums(source), columns / snello::kSumColumns, to.quant.row_sums(m));
      to.quant.scale[m] = from.quant.scale[source];
    } else if (to.halves.data) {
      std::copy_n(from.halves.row(source), columns, to.halves.row(m));
    } else {
      std::copy_n(from.rows.row(source), columns, to.rows.row(m));
    }
  }
}

void snello_program::transform_by_expert(snello::TransformTask task, const snello_op& o, int m0, int m1) {
  for (const snello::RowGroup& group : groups_) {
    const int begin = std::max(m0, group.begin), end = std::min(m1, group.end);
    if (begin >= end) continue;
    task.multiplier = vector(o.tensor[0] + group.number);
    snello::kernels().transform(task, begin, end);
  }
}

// Also tells the row what was not finite at one of its experts.
void snello_program::combine(const snello_op& o, const Rows& r, int m0, int m1) {
  const int active = width(o.in[1]) / 2;
  for (int m = m0; m < m1; ++m)
    for (int k = 0; k < active; ++k)
      if (expert_not_finite_[static_cast<size_t>(places_[static_cast<size_t>(m * active + k)])]) r.not_finite[m] = 1;
  snello::kernels().combine(
      {rows(o.in[0]), rows(o.in[1]), rows(o.out), places_.data(), active, width(o.out), o.i[0] == 1}, m0, m1);
}

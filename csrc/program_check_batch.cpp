// The checks of every batch: its rows, pages, ids and adapters exist. Each mistake is one line that names the row.
#include <algorithm>

#include "program.h"

namespace snello {
namespace {

// Rows of a sequence are consecutive, their positions ascend and lie inside its length, and its pages exist.
int check_rows(const ProgramSpec& spec, const snello_batch& b) {
  const bool convolves =
      std::any_of(spec.ops.begin(), spec.ops.end(), [](const snello_op& op) { return op.kind == SNELLO_OP_CONVOLVE; });
  const int64_t capacity = int64_t{b.pages_per_sequence} * kPage;
  int previous = -1;
  for (int m = 0; m < b.num_rows; ++m) {
    const int sequence = b.sequences[m], position = b.positions[m];
    if (sequence < 0 || sequence >= b.num_sequences)
      return fail("row %d: sequence %d of %d", m, sequence, b.num_sequences);
    if (position < 0 || position >= b.lengths[sequence])
      return fail("row %d: position %d of a sequence of length %d", m, position, b.lengths[sequence]);
    if (sequence == previous) {
      if (position <= b.positions[m - 1])
        return fail("row %d: position %d does not come after position %d", m, position, b.positions[m - 1]);
      if (convolves && position != b.positions[m - 1] + 1)
        return fail("row %d: a convolution passes over no position, from %d to %d", m, b.positions[m - 1], position);
      continue;
    }
    if (sequence < previous) return fail("row %d: sequence %d comes after sequence %d", m, sequence, previous);
    previous = sequence;
    if (spec.cache == nullptr) continue;
    if (b.lengths[sequence] > capacity)
      return fail("sequence %d: length %d does not fit in %d pages", sequence, b.lengths[sequence],
                  b.pages_per_sequence);
    const int32_t* pages = b.page_tables + int64_t{sequence} * b.pages_per_sequence;
    for (int i = 0; i * kPage < b.lengths[sequence]; ++i)
      if (pages[i] < 0 || pages[i] >= spec.cache->num_pages)
        return fail("sequence %d: entry %d is page %d of %d", sequence, i, pages[i], spec.cache->num_pages);
  }
  return 0;
}

int check_ids(const int32_t* ids, int n, int offset, int limit, const char* what) {
  for (int m = 0; m < n; ++m) {
    const int64_t id = (ids ? int64_t{ids[m]} : 0) + offset;
    if (id < 0 || id >= limit) return fail("row %d: %s %lld of %d", m, what, static_cast<long long>(id), limit);
  }
  return 0;
}

int check_tables(const ProgramSpec& spec, const snello_batch& b) {
  for (const snello_op& op : spec.ops) {
    if (op.kind != SNELLO_OP_EMBED && op.kind != SNELLO_OP_ROPE) continue;
    int limit = spec.tensors[static_cast<size_t>(op.tensor[0])].rows;
    if (op.kind == SNELLO_OP_EMBED && op.tensor[2] >= 0) limit += spec.tensors[static_cast<size_t>(op.tensor[2])].rows;
    int error = 0;
    if (op.kind == SNELLO_OP_ROPE) {
      error = check_ids(b.positions, b.num_rows, 0, limit, "rotary position");
    } else if (op.i[0] == 0) {
      if (b.tokens == nullptr) return fail("the batch has no tokens");
      error = check_ids(b.tokens, b.num_rows, 0, limit, "token");
    } else if (op.i[0] == 1) {
      error = check_ids(b.positions, b.num_rows, op.i[1], limit, "embedded position");
    } else {
      error = check_ids(b.types, b.num_rows, 0, limit, "token type");
    }
    if (error) return error;
  }
  return 0;
}

// All ADAPT of a program know equally many.
int check_adapters(const ProgramSpec& spec, const snello_batch& b) {
  if (b.adapters == nullptr) return 0;
  const auto adapts = [](const snello_op& op) { return op.kind == SNELLO_OP_ADAPT; };
  const auto found = std::find_if(spec.ops.begin(), spec.ops.end(), adapts);
  const int count = found == spec.ops.end() ? 0 : found->i[2];
  for (int m = 0; m < b.num_rows; ++m)
    if (b.adapters[m] < -1 || b.adapters[m] >= count) return fail("row %d: adapter %d of %d", m, b.adapters[m], count);
  return 0;
}

}  // namespace

int check_batch(const ProgramSpec& spec, const snello_batch& b) {
  if (b.num_rows < 1 || b.num_rows > spec.max_rows)
    return fail("a batch of %d rows: it must have 1 to %d", b.num_rows, spec.max_rows);
  if (b.num_sequences < 1) return fail("a batch of %d sequences", b.num_sequences);
  if (b.num_outputs < 0 || b.num_outputs > b.num_rows)
    return fail("%d outputs of a batch of %d rows", b.num_outputs, b.num_rows);
  if (b.positions == nullptr || b.sequences == nullptr || b.lengths == nullptr)
    return fail("the batch lacks positions, sequences or lengths");
  if (spec.cache != nullptr && (b.page_tables == nullptr || b.pages_per_sequence < 1))
    return fail("the batch lacks page tables");
  if (b.num_outputs > 0 && b.output_rows == nullptr) return fail("the batch lacks output rows");
  for (int i = 0; i < b.num_outputs; ++i) {
    const int row = b.output_rows[i];
    if (row < 0 || row >= b.num_rows) return fail("output %d: row %d of %d", i, row, b.num_rows);
    if (i > 0 && row <= b.output_rows[i - 1])
      return fail("output %d: row %d does not come after row %d", i, row, b.output_rows[i - 1]);
  }
  if (const int error = check_rows(spec, b)) return error;
  if (const int error = check_adapters(spec, b)) return error;
  return check_tables(spec, b);
}

}  // namespace snello

// Where the registers of a program lie, and the threads' scratch: one arena, made once (see program.h).
#include <algorithm>

#include "program.h"

namespace snello {
namespace {

constexpr uint64_t kAlignment = 64;

// FP32 rows start at cache lines, and not all in the same cache sets.
int64_t row_stride(int width) {
  const int64_t stride = static_cast<int64_t>(round_up(static_cast<uint64_t>(width), kPanel));
  return stride % 256 == 0 ? stride + kPanel : stride;
}

// The same for INT8 and BF16 rows, whose bytes are a multiple of cache lines.
int64_t byte_stride(int64_t bytes) { return bytes % 512 == 0 ? bytes + 64 : bytes; }
int64_t half_stride(int width) { return byte_stride(int64_t{width} * 2) / 2; }

}  // namespace
}  // namespace snello

// Places registers and scratch in the arena and makes them resident; the output register comes last and is left alone,
// since a step writes its outputs where the caller wants them.
snello::Memory snello_program::lay_out(const snello::ProgramFacts& facts) {
  using snello::round_up;
  uint64_t bytes = 0;
  const auto take = [&bytes](uint64_t size) {
    const uint64_t at = bytes;
    bytes += round_up(size, snello::kAlignment);
    return at;
  };
  struct Place {
    uint64_t rows, q, scale, sums;
  };
  std::vector<Place> places(memory_.size());
  const auto place = [&](size_t r) {
    const snello_register& reg = spec_.registers[r];
    const auto width = static_cast<uint64_t>(reg.width);
    auto count = static_cast<uint64_t>(spec_.max_rows);
    if (facts.sides[r] == snello::Side::kOutputs)
      count = static_cast<uint64_t>(std::min(spec_.head_rows, spec_.max_rows));
    if (facts.sides[r] == snello::Side::kDispatched) count *= static_cast<uint64_t>(facts.most_active);
    if (reg.rows == SNELLO_ROWS_INT8)
      places[r] = {0, take(count * static_cast<uint64_t>(snello::byte_stride(reg.width))), take(count * 4),
                   take(count * (width / snello::kSumColumns) * 4)};
    else if (reg.rows == SNELLO_ROWS_BF16)
      places[r].rows = take(count * static_cast<uint64_t>(snello::half_stride(reg.width)) * 2);
    else
      places[r].rows = take(count * static_cast<uint64_t>(snello::row_stride(reg.width)) * 4);
  };
  for (size_t r = 0; r < memory_.size(); ++r)
    if (facts.sides[r] != snello::Side::kUnused && static_cast<int>(r) != output_) place(r);
  const uint64_t scratch = take(static_cast<uint64_t>(pool_.num_threads()) * snello::kAttentionScratchBytes);
  touched_bytes_ = scratch;
  place(static_cast<size_t>(output_));

  snello::Memory arena(bytes);
  arena.touch(touched_bytes_);
  scratch_ = arena.data() + scratch;
  for (size_t r = 0; r < memory_.size(); ++r) {
    if (facts.sides[r] == snello::Side::kUnused) continue;
    const snello_register& reg = spec_.registers[r];
    uint8_t* data = arena.data();
    if (reg.rows == SNELLO_ROWS_INT8)
      memory_[r].quant = {reinterpret_cast<int8_t*>(data + places[r].q),
                          reinterpret_cast<float*>(data + places[r].scale),
                          reinterpret_cast<int32_t*>(data + places[r].sums), reg.width, snello::byte_stride(reg.width)};
    else if (reg.rows == SNELLO_ROWS_BF16)
      memory_[r].halves = {reinterpret_cast<uint16_t*>(data + places[r].rows), snello::half_stride(reg.width)};
    else
      memory_[r].rows = {reinterpret_cast<float*>(data + places[r].rows), snello::row_stride(reg.width)};
  }
  return arena;
}

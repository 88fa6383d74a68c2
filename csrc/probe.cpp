// What this machine can do, measured the way the engine uses it: reading memory with all threads of a pool, and the
// inner loop of the products on operands that stay in the caches. Ceilings are computed from these two.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "guard.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace snello {
namespace {

constexpr uint64_t kReadPiece = 64 << 10;
constexpr double kLeastSeconds = 2e-3;  // of one measurement: short reads are repeated to fill it
constexpr int kRows = 96, kColumns = 1024, kOutputs = 128, kPasses = 5;

template <typename Body>
double timed(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double bandwidth(Pool& pool, uint64_t bytes, int repeats) {
  bytes = std::max(bytes / kReadPiece, uint64_t{1}) * kReadPiece;
  const Memory memory(bytes);
  memory.touch(bytes);
  const auto pieces = static_cast<int64_t>(bytes / kReadPiece);
  std::vector<uint64_t> sums(static_cast<size_t>(pool.num_threads()) * 8);  // a cache line each
  const auto read_all = [&](int64_t passes) {
    for (int64_t pass = 0; pass < passes; ++pass)
      parallel_for(pool, pieces, std::max<int64_t>(1, pieces / (16 * pool.num_threads())),
                   [&](int worker, int64_t begin, int64_t end) {
                     sums[static_cast<size_t>(worker) * 8] +=
                         kernels().read(memory.data() + static_cast<uint64_t>(begin) * kReadPiece,
                                        static_cast<uint64_t>(end - begin) * kReadPiece);
                   });
  };
  const double once = timed([&] { read_all(1); });
  const auto passes = std::clamp<int64_t>(static_cast<int64_t>(kLeastSeconds / std::max(once, 1e-7)), 1, 100000);
  double best = 0.0;
  for (int i = 0; i < repeats; ++i) {
    const double seconds = timed([&] { read_all(passes); });
    best = std::max(best, static_cast<double>(bytes) * static_cast<double>(passes) / seconds);
  }
  return best * 1e-9;
}

// One thread's operands: so many rows that little time goes on unpacking, times a few panels. Zeros multiply as fast as
// anything.
struct Operands {
  explicit Operands(int format)
      : weights_memory(bytes_of(format)), rows(kRows * kColumns * 4), outputs(kRows * kOutputs * 4) {
    weights_memory.touch(weights_memory.bytes());
    rows.touch(rows.bytes());
    outputs.touch(outputs.bytes());
    scale.assign(kRows, 1.0f);
    sums.assign(kRows * kColumns / kSumColumns, 0);
    weights = {weights_memory.data(), weights_memory.bytes(), format, kOutputs, kColumns, group_size(format)};
    task = {};
    task.weights = &weights;
    task.quantized = format >= SNELLO_INT8;
    if (format == SNELLO_BF16) task.halves = {reinterpret_cast<uint16_t*>(rows.data()), kColumns};
    task.quant = {reinterpret_cast<int8_t*>(rows.data()), scale.data(), sums.data(), kColumns, kColumns};
    task.input = {reinterpret_cast<float*>(rows.data()), kColumns};
    task.output = {reinterpret_cast<float*>(outputs.data()), kOutputs};
    task.num_rows = kRows;
  }
  static int group_size(int format) { return format > SNELLO_INT8 ? 128 : 0; }
  static uint64_t bytes_of(int format) { return packed_bytes(format, kOutputs, kColumns, group_size(format)); }

  Memory weights_memory, rows, outputs;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  snello_tensor weights;
  LinearTask task;
};

double multiply(Pool& pool, int64_t (*loop)(int passes), int repeats) {
  constexpr int kLoops = 4000;  // about a millisecond
  const int64_t items = 8 * int64_t{pool.num_threads()};
  double best = 0.0;
  for (int i = 0; i < repeats; ++i) {
    std::vector<int64_t> operations(static_cast<size_t>(pool.num_threads()) * 8);  // a cache line each
    const double seconds = timed([&] {
      parallel_for(pool, items, 1, [&](int worker, int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) operations[static_cast<size_t>(worker) * 8] += loop(kLoops);
      });
    });
    int64_t all = 0;
    for (const int64_t count : operations) all += count;
    best = std::max(best, static_cast<double>(all) / seconds);
  }
  return best * 1e-9;
}

double compute(Pool& pool, int format, int repeats) {
  if (format >= SNELLO_INT8 && kernels().multiply != nullptr) return multiply(pool, kernels().multiply, repeats);
  if (format == SNELLO_BF16 && kernels().multiply_halves != nullptr && kernels().multiplies_halves())
    return multiply(pool, kernels().multiply_halves, repeats);
  std::vector<std::unique_ptr<Operands>> operands;
  for (int i = 0; i < pool.num_threads(); ++i) operands.push_back(std::make_unique<Operands>(format));
  // Twice as many items as threads: a thread that comes late finds one less, and the best repeat is the one without.
  const int64_t items = 2 * int64_t{pool.num_threads()};
  const double operations = 2.0 * kRows * kColumns * kOutputs * kPasses * static_cast<double>(items);
  double best = 0.0;
  for (int i = 0; i < repeats; ++i) {
    const double seconds = timed([&] {
      parallel_for(pool, items, 1, [&](int worker, int64_t begin, int64_t end) {
        for (int64_t pass = 0; pass < (end - begin) * kPasses; ++pass)
          kernels().linear(operands[static_cast<size_t>(worker)]->task, 0, kOutputs / kPanel);
      });
    });
    best = std::max(best, operations / seconds);
  }
  return best * 1e-9;
}

}  // namespace
}  // namespace snello

extern "C" {

double snello_probe_bandwidth(snello_pool* pool, uint64_t bytes, int32_t repeats) {
  if (pool == nullptr || bytes == 0 || repeats < 1) return snello::fail("probe: no pool, bytes or repeats");
  return snello::guarded("probe", [&] {
    const std::lock_guard<std::mutex> lock(pool->pool.mutex());
    return snello::bandwidth(pool->pool, bytes, repeats);
  });
}

double snello_probe_compute(snello_pool* pool, int32_t format, int32_t repeats) {
  if (pool == nullptr || repeats < 1) return snello::fail("probe: no pool or repeats");
  if (format < SNELLO_F32 || format > SNELLO_INT3) return snello::fail("probe: format %d", format);
  return snello::guarded("probe", [&] {
    const std::lock_guard<std::mutex> lock(pool->pool.mutex());
    return snello::compute(pool->pool, format, repeats);
  });
}

}  // extern "C"

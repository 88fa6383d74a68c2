// Threads. The calling thread leads and the workers help: a job is a number of items in chunks, of which every thread
// has a share of neighbours. It works its share off in order, and then takes from the ends of the others' until nothing
// is left: so each reads memory in one long run, and who comes late leaves its share to those that are there. Workers
// spin for a few microseconds between jobs, since the next one usually follows at once, and then sleep on a futex. A
// run allocates nothing, throws nothing, and with one thread or one chunk is a plain call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "snello.h"

namespace snello {

// The floating-point control of this thread, made IEEE (nearest, denormals kept, exceptions masked) for a scope.
class FloatEnvironment {
 public:
  FloatEnvironment() noexcept;
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
  bool changed_;
};

class Pool {
 public:
  // Items [begin, end); `worker` is in [0, num_threads), the caller is 0. Must not throw.
  using Job = void (*)(void* context, int worker, int64_t begin, int64_t end);

  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }
  // Wakes sleeping workers ahead of a job that is about to come.
  void wake() noexcept;
  // Returns when every item is done. One caller at a time: hold mutex(). A thread begins its share with `first` items
  // at once and goes on by `chunk`: few calls for most of the work, and small pieces, which others may take, at its
  // end.
  void run(Job job, void* context, int64_t num_items, int64_t chunk, int64_t first) noexcept;
  std::mutex& mutex() { return mutex_; }

 private:
  void serve(int worker) noexcept;
  void help(int worker) noexcept;
  uint32_t work_off(int worker) noexcept;
  uint32_t take_from(int victim, int worker) noexcept;
  void do_chunks(int worker, uint32_t begin, uint32_t end) noexcept;
  void await_signal(uint32_t seen) noexcept;

  const int num_threads_;  // not of `threads_`, which grows while the first workers are at work
  std::mutex mutex_;
  // Of the job under way. Written by the leader while no chunk is pending, read by whoever has claimed a chunk.
  Job job_ = nullptr;
  void* context_ = nullptr;
  int64_t num_items_ = 0, chunk_ = 1;
  uint32_t first_ = 1, epoch_ = 0;  // `first_` in chunks

  // The job's number in the high half; in the low half the chunks that nobody has claimed yet, [begin, end) in 16 bits
  // each: a worker that comes late either sees no chunk or claims one of the job that is really under way.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };
  std::unique_ptr<Share[]> shares_;               // one for each thread
  alignas(64) std::atomic<uint32_t> pending_{0};  // chunks not finished
  alignas(64) std::atomic<uint32_t> signal_{0};   // changes with every job
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// Calls body(worker, begin, end) for chunks of [0, num_items) on all threads; `first`: see Pool::run, 0: like the
// others.
template <typename Body>
void parallel_for(Pool& pool, int64_t num_items, int64_t chunk, const Body& body, int64_t first = 0) noexcept {
  const auto job = [](void* context, int worker, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(worker, begin, end);
  };
  pool.run(job, const_cast<Body*>(&body), num_items, chunk, std::max(first, chunk));
}

}  // namespace snello

struct snello_pool {
  explicit snello_pool(int num_threads) : pool(num_threads) {}
  snello::Pool pool;
};

// Many jobs of random sizes on one pool: every item exactly once, seen by whoever leads. Prints what was wrong.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "pool.h"

namespace {

constexpr int64_t kMostItems = 150000;  // more than there are numbers for chunks

// Uneven work, so that shares end at different times.
void linger(int64_t turns) {
  for (volatile int64_t i = 0; i < turns; i = i + 1) {
  }
}

}  // namespace

int main(int, char** argv) {
  const int num_threads = std::atoi(argv[1]), num_jobs = std::atoi(argv[2]);
  snello::Pool pool(num_threads);
  std::mt19937 random(static_cast<uint32_t>(num_threads));
  std::vector<int> visits(kMostItems);
  int64_t wrong = 0;
  for (int job = 0; job < num_jobs; ++job) {
    const int64_t items = 1 + random() % (job % 50 == 0 ? kMostItems : 3000);
    const int64_t chunk = 1 + random() % (job % 3 == 0 ? 200 : 4), first = job % 2 == 0 ? 0 : random() % (items + 10);
    std::fill_n(visits.begin(), items, 0);
    const auto visit = [&](int worker, int64_t begin, int64_t end) {
      if (worker < 0 || worker >= num_threads || begin >= end || end > items) std::abort();
      for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
      if (begin % 7 == 0) linger(worker == 0 ? 300 : 30);
    };
    snello::parallel_for(pool, items, chunk, visit, first);
    for (int64_t i = 0; i < items; ++i) wrong += visits[static_cast<size_t>(i)] != 1;
  }
  std::printf("%lld\n", static_cast<long long>(wrong));
  return wrong != 0;
}

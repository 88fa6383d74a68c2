// Which of two ways is the faster one, found out on work that has to be done anyway: both in turn, then the one whose
// median time is smaller. Only for ways that give the same bytes.
#pragma once

#include <algorithm>
#include <array>

namespace snello {

class Trial {
 public:
  static constexpr int kRuns = 16;  // of each way

  // That of the next run, 0 or 1: A B B A, so that what grows from run to run weighs on both alike.
  int way() const { return decided() ? faster_ : static_cast<int>(runs_ % 4 == 1 || runs_ % 4 == 2); }
  bool decided() const { return runs_ == 2 * kRuns; }
  // How long the run took that went way().
  void took(double seconds) {
    if (decided()) return;
    const auto taken = static_cast<size_t>(way());
    seconds_[taken][static_cast<size_t>(runs_ / 2)] = seconds;
    if (++runs_ == 2 * kRuns) faster_ = static_cast<int>(median(1) < median(0));
  }
  // Of all runs of a way, once the trial is decided.
  double median(int way) const {
    auto ordered = seconds_[static_cast<size_t>(way)];
    std::nth_element(ordered.begin(), ordered.begin() + kRuns / 2, ordered.end());
    return ordered[kRuns / 2];
  }

 private:
  std::array<std::array<double, kRuns>, 2> seconds_{};
  int runs_ = 0, faster_ = 0;
};

}  // namespace snello

// Work in phases, each of which reads what the one before wrote, in one call of torch's threads: starting them costs more than a small
// layer computes. A worker that finds no item left waits until the others have finished theirs, and goes on to the next phase.
//
// Nothing depends on how many workers there are, or on their running at once: a worker waits only for items that somebody is computing.
#pragma once
#include <functional>
#include <thread>
#include <vector>

#include "common.h"

namespace kd {

struct Phase {
  int64_t items;
  std::function<void(int64_t item, float* scratch)> run;  // which may not throw
  int64_t together = 1;                                   // as run_items has it
};

class Phases {
 public:
  void add(int64_t items, std::function<void(int64_t, float*)> run, int64_t together = 1) {
    if (items > 0) phases_.push_back({items, std::move(run), together});
  }

  void run(int64_t scratch_floats) const {
    std::vector<Progress> progress(phases_.size());
    const int64_t workers = phases_.empty() ? 0 : static_cast<int64_t>(torch::stable::get_num_threads());
    run_items(workers, scratch_floats, [&](int64_t, float* scratch) {
      for (size_t i = 0; i < phases_.size(); ++i) work(phases_[i], progress[i], workers, scratch);
    });
  }

 private:
  struct alignas(128) Progress {  // two lines, which are fetched together
    std::atomic<int64_t> next{0}, done{0};
  };

  static void work(const Phase& phase, Progress& progress, int64_t workers, float* scratch) {
    const int64_t share = std::max<int64_t>(1, std::min(phase.together, phase.items / (2 * workers)));
    for (int64_t first = progress.next.fetch_add(share); first < phase.items; first = progress.next.fetch_add(share)) {
      const int64_t end = std::min(first + share, phase.items);
      for (int64_t item = first; item < end; ++item) phase.run(item, scratch);
      progress.done.fetch_add(end - first, std::memory_order_release);
    }
    constexpr int kSpins = 2000;  // some 20 us, longer than an item of a small batch
    for (int spins = 0; progress.done.load(std::memory_order_acquire) < phase.items; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

  std::vector<Phase> phases_;
};

}  // namespace kd

// The threads of a decoding step: they share out numbered units of work and wait for each other without sleeping.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

class Team {
 public:
  explicit Team(int size) : size_(size), next_(size) {}

  // Calls use(i) for i < count, each once; returns when all are done. A thread begins with units of its own that lie one
  // behind the other, so that what a unit asks for beyond its end (`AHEAD` in linear.cpp) is what the thread reads next,
  // and then takes what others have left.
  template <typename Use>
  void share(int64_t count, const Use& use) {
    int self = omp_get_thread_num();
    for (int i = 0; i < size_; ++i) {
      int whose = (self + i) % size_;
      int64_t first = count * whose / size_, end = count * (whose + 1) / size_;
      for (int64_t k; (k = first + next_[whose].taken.fetch_add(1, std::memory_order_relaxed)) < end;) use(k);
    }
    wait();
  }

  void wait() {
    if (size_ == 1) return begin();
    int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      begin();
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins > SPINS) std::this_thread::yield();  // the thread that is waited for may need this core
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int SPINS = 4000;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  void begin() {
    for (Counter& counter : next_) counter.taken.store(0, std::memory_order_relaxed);
  }
  int size_;
  std::vector<Counter> next_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

// A pool of threads that split one piece of work at a time.
//
// The steps of a small model take microseconds, so that waking a sleeping thread would cost more
// than it brings: a worker spins for a moment after each step and sleeps only when none follows.
// Work is split statically, one contiguous share a thread, so that the same thread touches the same
// weights every time. A pool belongs to one engine and is used by one thread at a time; different
// pools are independent.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace squat {

class ThreadPool {
 public:
  // `threads` includes the caller's; values below 1 count as 1, which starts no thread at all.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) for thread = 0 .. size()-1, each on a thread of its own (0 is the caller),
  // and returns when all have returned. The body must not throw, and must not use the pool.
  template <class Body>
  void run(Body&& body) {
    if (workers_.empty()) {
      body(0);
      return;
    }
    using Callable = std::remove_reference_t<Body>;
    start([](void* context, int thread) { (*static_cast<Callable*>(context))(thread); },
          const_cast<void*>(static_cast<const void*>(&body)));
  }

  // Splits 0 .. count-1 into one contiguous range a thread: body(begin, end, thread), never empty.
  template <class Body>
  void parallel_for(int count, Body&& body) {
    if (count <= 0) return;
    if (workers_.empty() || count == 1) {
      body(0, count, 0);
      return;
    }
    const int64_t threads = size();
    run([&](int thread) {
      const int begin = static_cast<int>(count * int64_t{thread} / threads);
      const int end = static_cast<int>(count * (int64_t{thread} + 1) / threads);
      if (begin < end) body(begin, end, thread);
    });
  }

 private:
  using Function = void (*)(void* context, int thread);

  void start(Function function, void* context);
  void work(int thread);

  std::vector<std::thread> workers_;
  Function function_ = nullptr;
  void* context_ = nullptr;
  // A step is announced by incrementing `step_` and is over when `running_` is back at zero. They
  // stand on cache lines of their own, since every thread spins on them.
  alignas(64) std::atomic<uint32_t> step_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace squat

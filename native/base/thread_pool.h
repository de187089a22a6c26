// A pool of threads that split one piece of work at a time.
//
// The steps of a small model take microseconds, so that waking a sleeping thread would cost more
// than it brings: a worker spins for a moment after each step and sleeps only when none follows.
// Work is split statically, one contiguous share a thread, so that the same thread touches the same
// weights every time. Only when a worker has not begun by the time the caller is done, because its
// core is busy with something else, does the caller take the worker's share as well: on a crowded
// machine a step costs its work, not the scheduler's time slice. A pool belongs to one engine and
// is used by one thread at a time; different pools are independent.
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
  // Throws Error if the system starts no more threads, and std::bad_alloc.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once for thread = 0 .. size()-1, on that thread or on the caller's (which is
  // 0), and returns when all have returned. The body must not throw, and must not use the pool.
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

  // The last step in which somebody took a thread's share, on a cache line of its own.
  struct alignas(64) Share {
    std::atomic<uint32_t> taken{0};
  };

  void start(Function function, void* context);
  void end();
  void work(int thread);
  // Runs a thread's share of a step, the latest one, unless somebody has taken it.
  void run_share(int thread, uint32_t step);

  std::vector<Share> shares_;
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

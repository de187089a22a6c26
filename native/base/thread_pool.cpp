#include "thread_pool.h"

#include <algorithm>
#include <string>
#include <system_error>

#include "base/error.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace squat {
namespace {

// Tells the core that this is a spin loop.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// About 50 microseconds: longer than the gap between two steps, shorter than anyone notices. When
// there are fewer cores than threads, spinning only takes the core from the thread that is waited
// for, so a waiting thread also yields now and then.
constexpr int kSpins = 2000;
constexpr int kSpinsPerYield = 256;

template <class Done>
bool spin_until(Done done) {
  for (int spin = 1; spin <= kSpins; ++spin) {
    if (done()) return true;
    relax();
    if (spin % kSpinsPerYield == 0) std::this_thread::yield();
  }
  return done();
}

}  // namespace

ThreadPool::ThreadPool(int threads) : shares_(static_cast<size_t>(std::max(threads, 1))) {
  try {
    for (int thread = 1; thread < threads; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (const std::system_error&) {
    end();
    throw Error(SQUAT_ERROR_MEMORY, "threads: the system starts fewer than " +
                                        std::to_string(threads) + " now; ask for fewer");
  } catch (...) {
    end();
    throw;
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  stop_.store(true);
  step_.fetch_add(1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Function function, void* context) {
  function_ = function;
  context_ = context;
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  // Sequentially consistent, like the worker's increment of sleeping_ followed by its look at
  // step_: one of both sides sees the other, so that no wake-up is lost.
  const uint32_t step = step_.fetch_add(1) + 1;
  if (sleeping_.load() > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }
  function(context, 0);
  for (int thread = 1; thread < size(); ++thread) run_share(thread, step);
  const auto done = [this] { return running_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(done)) std::this_thread::yield();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto announced = [&] { return step_.load() != seen; };
    if (!spin_until(announced)) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, announced);
      sleeping_.fetch_sub(1);
    }
    seen = step_.load();  // others may have gone by: the caller took this thread's share of them
    // Asked after the step is read: the last step is no work, but the end of the pool.
    if (stop_.load()) return;
    run_share(thread, seen);
  }
}

void ThreadPool::run_share(int thread, uint32_t step) {
  std::atomic<uint32_t>& taken = shares_[static_cast<size_t>(thread)].taken;
  uint32_t before = step - 1;
  // Who takes a share keeps the step from ending: what `function_` is cannot change meanwhile.
  if (taken.load(std::memory_order_relaxed) != before) return;
  if (!taken.compare_exchange_strong(before, step)) return;
  function_(context_, thread);
  running_.fetch_sub(1, std::memory_order_release);
}

}  // namespace squat

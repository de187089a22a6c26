// The thread pool: every share runs exactly once, after sleeping as well and with more threads than
// any machine has cores, pools do not disturb each other, and none runs a share while it ends.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/thread_pool.h"
#include "check.h"

using squat::ThreadPool;

namespace {

void test_shares(int threads) {
  ThreadPool pool(threads);
  CHECK(pool.size() == threads);
  for (int count : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<std::atomic<int>> visits(count);
    std::atomic<int> bad{0};
    pool.parallel_for(count, [&](int begin, int end, int thread) {
      if (begin >= end || thread < 0 || thread >= threads) ++bad;
      for (int i = begin; i < end; ++i) ++visits[i];
    });
    for (auto& visit : visits) CHECK(visit == 1);
    CHECK(bad == 0);
  }
}

void test_many_steps(int threads) {
  ThreadPool pool(threads);
  std::vector<int64_t> sums(threads, 0);
  for (int step = 0; step < 3000; ++step) {
    pool.run([&](int thread) { sums[thread] += step; });
    // Now and then long enough for the workers to fall asleep.
    if (step % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  for (int64_t sum : sums) CHECK(sum == int64_t{3000} * 2999 / 2);
}

void test_several_pools() {
  std::vector<std::thread> users;
  std::atomic<int> total{0};
  for (int user = 0; user < 3; ++user) {
    users.emplace_back([&total] {
      ThreadPool pool(2);
      for (int step = 0; step < 300; ++step) {
        pool.parallel_for(10, [&](int begin, int end, int) { total += end - begin; });
      }
    });
  }
  for (std::thread& user : users) user.join();
  CHECK(total == 3 * 300 * 10);
}

// Workers that come late, to a pool whose caller has done all the work and is already ending it.
void test_end_at_once() {
  for (int round = 0; round < 2000; ++round) {
    std::atomic<int> calls{0};
    const auto body = [&](int) { ++calls; };
    {
      ThreadPool pool(4);
      pool.run(body);
    }
    CHECK(calls == 4);
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 5, 40}) {
    test_shares(threads);
    test_many_steps(threads);
  }
  for (int round = 0; round < 50; ++round) ThreadPool idle(3);  // stopped while spinning
  test_several_pools();
  test_end_at_once();
  return squat::test::report("test_thread_pool");
}

// What this machine can do at most: the yardstick of every speed that is quoted.
//
//   limits [THREADS ...]        as JSON; default: 1, then all CPUs
//
// Each figure is the best of many short runs, summed over the threads:
//   dot_gmacs        int8 multiply-accumulates, 10^9/s, by instruction set, operands in registers
//   fma_gmacs        float32 fused multiply-adds, 10^9/s, likewise
//   read_gbs         reading so many bytes over and over, all threads together, 10^9 B/s
//   barrier_us       a barrier of spinning threads, microseconds
//
// Integer sums are what a kernel with one scale a tensor needs and nothing else; so prefill cannot
// be faster than its multiply-accumulates over dot_gmacs, nor decoding than its weights over
// read_gbs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/matrix_registers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define SQUAT_WIDEST __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define SQUAT_WIDEST
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Work = std::function<void(int thread, int repeats)>;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Waits until `threads` threads have called it as often as this one.
class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}
  void wait() {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_release);
    } else {
      while (turn_.load(std::memory_order_acquire) == turn) {
      }
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> turn_{0};
};

// Seconds for one call of work(thread, 1) on every thread at once: the best of many runs of ~5 ms.
double best_seconds(int threads, const Work& work) {
  work(0, 1);
  const Clock::time_point start = Clock::now();
  work(0, 1);
  const int repeats = std::max(1, static_cast<int>(0.005 / std::max(seconds_since(start), 1e-7)));
  constexpr int kRuns = 60;
  std::vector<double> best(threads, 1e9);
  SpinBarrier barrier(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (int run = 0; run < kRuns; ++run) {
        barrier.wait();
        const Clock::time_point begin = Clock::now();
        work(t, repeats);
        barrier.wait();
        best[t] = std::min(best[t], seconds_since(begin) / repeats);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  return *std::max_element(best.begin(), best.end());
}

constexpr int kSteps = 4096;  // of an arithmetic loop
constexpr int kSums = 12;     // independent sums, enough to hide the latency of any CPU
volatile uint64_t sink;       // what keeps a result alive

// A function that does one operation on each of kSums independent sums in every step. The empty asm
// statements keep the compiler from seeing that they are all the same.
#define SQUAT_LOOP(NAME, TARGET, REGISTER, VECTOR, SUM, SET, BODY) \
  TARGET void NAME(int repeats) {                                  \
    SUM sum[kSums] = {};                                           \
    VECTOR a = SET(1), b = SET(2);                                 \
    for (int r = 0; r < repeats * kSteps; ++r) {                   \
      asm volatile("" : REGISTER(a), REGISTER(b));                 \
      _Pragma("GCC unroll 12") for (int i = 0; i < kSums; ++i) {   \
        BODY;                                                      \
        asm volatile("" : REGISTER(sum[i]));                       \
      }                                                            \
    }                                                              \
  }

// p: a copy of a, for products that would otherwise be computed once for all sums.
#define SQUAT_FRESH(REGISTER, VECTOR) \
  VECTOR p = a;                       \
  asm volatile("" : REGISTER(p))

#if defined(__x86_64__)
#define SQUAT_AVX512 __attribute__((target("avx512f,avx512vnni")))
#define SQUAT_AVXVNNI __attribute__((target("avx2,avxvnni")))
#define SQUAT_AVX2 __attribute__((target("avx2,fma")))
#define SQUAT_AMX __attribute__((target("amx-tile,amx-int8")))
SQUAT_LOOP(dot_avx512vnni, SQUAT_AVX512, "+v", __m512i, __m512i, _mm512_set1_epi8,
           sum[i] = _mm512_dpbusd_epi32(sum[i], a, b))
SQUAT_LOOP(dot_avxvnni, SQUAT_AVXVNNI, "+x", __m256i, __m256i, _mm256_set1_epi8,
           sum[i] = _mm256_dpbusd_avx_epi32(sum[i], a, b))
SQUAT_LOOP(dot_avx2, SQUAT_AVX2, "+x", __m256i, __m256i, _mm256_set1_epi8,
           SQUAT_FRESH("+x", __m256i);
           sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(p, b), a)))
SQUAT_LOOP(fma_avx512, SQUAT_AVX512, "+v", __m512, __m512, _mm512_set1_ps,
           sum[i] = _mm512_fmadd_ps(a, b, sum[i]))
SQUAT_LOOP(fma_avx2, SQUAT_AVX2, "+x", __m256, __m256, _mm256_set1_ps,
           sum[i] = _mm256_fmadd_ps(a, b, sum[i]))

// AMX multiplies two matrix registers; as many sums in turn as there are others.
SQUAT_AMX void dot_amx(int repeats) {
  _tile_loadconfig(&squat::kernels::kMatrixRegisters);
  for (int r = 0; r < repeats * kSteps * kSums / 6; ++r) {
    _tile_dpbsud(0, 6, 7);
    _tile_dpbsud(1, 6, 7);
    _tile_dpbsud(2, 6, 7);
    _tile_dpbsud(3, 6, 7);
    _tile_dpbsud(4, 6, 7);
    _tile_dpbsud(5, 6, 7);
  }
  _tile_release();
}
#elif defined(__aarch64__)
#define SQUAT_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#define SQUAT_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
SQUAT_LOOP(dot_i8mm, SQUAT_I8MM, "+w", int8x16_t, int32x4_t, vdupq_n_s8,
           sum[i] = vmmlaq_s32(sum[i], a, b))
SQUAT_LOOP(dot_dotprod, SQUAT_DOTPROD, "+w", int8x16_t, int32x4_t, vdupq_n_s8,
           sum[i] = vdotq_s32(sum[i], a, b))
SQUAT_LOOP(dot_neon, , "+w", int8x8_t, int32x4_t, vdup_n_s8, SQUAT_FRESH("+w", int8x8_t);
           sum[i] = vpadalq_s16(sum[i], vmull_s8(p, b)))
SQUAT_LOOP(fma_neon, , "+w", float32x4_t, float32x4_t, vdupq_n_f32,
           sum[i] = vfmaq_f32(sum[i], a, b))
#endif

struct Loop {
  const char* isa;
  int macs;  // of one operation
  void (*run)(int repeats);
};

const std::vector<Loop> kDots = {
#if defined(__x86_64__)
    {"amx", 16 * 16 * 64, dot_amx},
    {"avx512vnni", 64, dot_avx512vnni},
    {"avxvnni", 32, dot_avxvnni},
    {"avx2", 32, dot_avx2},
#elif defined(__aarch64__)
    {"i8mm", 32, dot_i8mm},
    {"dotprod", 16, dot_dotprod},
    {"neon", 8, dot_neon},
#endif
};
const std::vector<Loop> kFmas = {
#if defined(__x86_64__)
    {"avx512vnni", 16, fma_avx512},
    {"avx2", 8, fma_avx2},
#elif defined(__aarch64__)
    {"neon", 4, fma_neon},
#endif
};

typedef uint64_t Words __attribute__((vector_size(64), aligned(64)));

SQUAT_WIDEST void read_all(const Words* data, size_t count) {
  Words sum[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) sum[j] += data[i + j];
  }
  uint64_t out = 0;
  for (const Words& s : sum) out += s[0];
  __atomic_store_n(&sink, out, __ATOMIC_RELAXED);
}

// Every thread reads its own `bytes`.
double read_gbs(int threads, size_t bytes) {
  std::vector<void*> data(threads);
  for (void*& d : data) {
    d = std::aligned_alloc(4096, bytes);
    if (d == nullptr) return 0;
    std::memset(d, 1, bytes);
  }
  const double seconds = best_seconds(threads, [&](int thread, int repeats) {
    for (int r = 0; r < repeats; ++r) {
      read_all(static_cast<const Words*>(data[thread]), bytes / sizeof(Words));
    }
  });
  for (void* d : data) std::free(d);
  return 1e-9 * static_cast<double>(bytes) * threads / seconds;
}

double barrier_us(int threads) {
  constexpr int kTurns = 1000;
  SpinBarrier barrier(threads);
  std::vector<double> best(threads, 1e9);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (int run = 0; run < 200; ++run) {
        const Clock::time_point begin = Clock::now();
        for (int turn = 0; turn < kTurns; ++turn) barrier.wait();
        best[t] = std::min(best[t], seconds_since(begin) / kTurns);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  return 1e6 * *std::max_element(best.begin(), best.end());
}

void print_loops(const char* name, const std::vector<Loop>& loops, int threads) {
  std::printf(", \"%s\": {", name);
  const char* comma = "";
  for (const Loop& loop : loops) {
    const squat::kernels::Isa* isa = squat::kernels::find_isa(loop.isa);
    if (isa == nullptr || !squat::kernels::runs_here(*isa)) continue;
    const double seconds = best_seconds(threads, [&](int, int repeats) { loop.run(repeats); });
    std::printf("%s\"%s\": %.1f", comma, loop.isa,
                1e-9 * loop.macs * kSums * kSteps * threads / seconds);
    comma = ", ";
  }
  std::printf("}");
}

void measure(int threads, bool last) {
  std::printf("  {\"threads\": %d", threads);
  print_loops("dot_gmacs", kDots, threads);
  print_loops("fma_gmacs", kFmas, threads);
  // From a second-level cache to main memory, with what models need between them: around the size
  // of a third-level cache, what a stream still finds there falls steeply.
  const char* before = ", \"read_gbs\": {";
  for (const int mib : {1, 24, 32, 40, 48, 1024}) {
    const size_t bytes = (size_t(mib) << 20) / static_cast<size_t>(threads);
    std::printf("%s\"%d MiB\": %.1f", before, mib, read_gbs(threads, bytes));
    before = ", ";
  }
  std::printf("}, \"barrier_us\": %.3f}%s\n", barrier_us(threads), last ? "" : ",");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> threads;
  for (int i = 1; i < argc; ++i) {
    threads.push_back(std::atoi(argv[i]));
    if (threads.back() < 1 || threads.back() > 1024) {
      std::fprintf(stderr, "limits: '%s' is no number of threads\n", argv[i]);
      return 2;
    }
  }
  if (threads.empty()) {
    threads.push_back(1);
    const int all = static_cast<int>(std::thread::hardware_concurrency());
    if (all > 1) threads.push_back(all);
  }
  std::printf("[\n");
  for (size_t i = 0; i < threads.size(); ++i) measure(threads[i], i + 1 == threads.size());
  std::printf("]\n");
  return 0;
}

// Every kernel of the table that this CPU runs, compared with == to plain loops over the codes.
//
// All buffers are of exactly the size that the interface asks for and on the heap, so that a build
// with SQUAT_SANITIZE finds every read and write past an end.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "check.h"
#include "kernels/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#endif

using namespace squat;
using namespace squat::kernels;

namespace {

// Exactly `size` elements, zeroed, aligned as the interface recommends.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size)
      : size_(size), data_(static_cast<T*>(operator new(size * sizeof(T), kAlign))) {
    std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  Buffer(Buffer&& other) : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }
  ~Buffer() { operator delete(data_, kAlign); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{kAlignment};
  size_t size_;
  T* data_;
};

std::mt19937 rng(20241017);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

enum class Fill { kRandom, kExtremes, kLow, kHigh };

// Codes of a width: uniform, only the two ends of the range, or one end.
void fill(int8_t* codes, size_t count, int bits, Fill how) {
  const int high = (1 << (bits - 1)) - 1, low = -high - 1;
  for (size_t i = 0; i < count; ++i) {
    switch (how) {
      case Fill::kRandom:
        codes[i] = static_cast<int8_t>(pick(low, high));
        break;
      case Fill::kExtremes:
        codes[i] = static_cast<int8_t>(pick(0, 1) ? low : high);
        break;
      case Fill::kLow:
        codes[i] = static_cast<int8_t>(low);
        break;
      case Fill::kHigh:
        codes[i] = static_cast<int8_t>(high);
        break;
    }
  }
}

Fill any_fill() {
  const int draw = pick(0, 7);
  return draw == 0   ? Fill::kLow
         : draw == 1 ? Fill::kHigh
         : draw < 4  ? Fill::kExtremes
                     : Fill::kRandom;
}

// A product as plain loops: the truth. `a` may be int8 or uint8 codes.
template <class A>
std::vector<int32_t> plain_product(const A* a, size_t a_stride, const int8_t* w, int m, int n,
                                   int k) {
  std::vector<int32_t> acc(size_t(m) * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int x = 0; x < k; ++x) sum += a[i * a_stride + x] * w[size_t(j) * k + x];
      acc[size_t(i) * n + j] = sum;
    }
  }
  return acc;
}

// The levels of a matrix, of which the first and the last are the ends of the range; none where
// codes stand for themselves.
class Table {
 public:
  explicit Table(WeightForm form) : levels_(form == WeightForm::t4 ? 16 : 0) {
    if (levels_.size() == 0) return;
    std::vector<int8_t> inner(254);
    std::iota(inner.begin(), inner.end(), static_cast<int8_t>(-127));
    std::shuffle(inner.begin(), inner.end(), rng);
    std::sort(inner.begin(), inner.begin() + 14);
    std::copy(inner.begin(), inner.begin() + 14, levels_.data() + 1);
    levels_[0] = -128;
    levels_[15] = 127;
  }
  const int8_t* data() const { return levels_.size() == 0 ? nullptr : levels_.data(); }
  // What the codes stand for.
  std::vector<int8_t> values(const Buffer<int8_t>& codes) const {
    std::vector<int8_t> values(codes.data(), codes.data() + codes.size());
    if (levels_.size() == 0) return values;
    for (int8_t& value : values) value = levels_[static_cast<size_t>(value + 8)];
    return values;
  }

 private:
  Buffer<int8_t> levels_;
};

struct Packed {
  Buffer<uint8_t> data;
  PackedMatrix matrix;
};

Packed pack(const Choice& choice, WeightForm form, const Buffer<int8_t>& codes, const Table& table,
            int n, int k) {
  Packed packed{Buffer<uint8_t>(packed_bytes(choice, form, n, k)), {}};
  packed.matrix = packed_matrix(choice, form, n, k, packed.data.data(), table.data());
  for (int row = 0; row < n; ++row) pack_row(packed.matrix, row, codes.data() + size_t(row) * k);
  return packed;
}

// prepare() may be given more room than it fills. Forbids, while it lives, what lies behind the
// rows of a group that one kernel reads. (AMX reads rows that a tile lacks, unseen by sanitizers.)
class EndOfRows {
 public:
  EndOfRows(const Prepared& prepared, const Buffer<uint8_t>& scratch) {
    const Prepared::Group& group = prepared.group[0];
    const Kernel& kernel = *group.kernel;
    const size_t step = kernel.form == ActivationForm::kBlocks
                            ? size_t(kBlock)
                            : size_t(kernel.k) * 8 / bits_of(kernel.weights);
    const size_t bytes =
        (prepared.inner + step - 1) / step * step * (kernel.form == ActivationForm::kWide ? 2 : 1);
    end_ = group.data + (group.end - group.begin) * bytes;
    size_ = scratch.data() + scratch.size() - end_;
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(end_, size_);
#endif
  }
  ~EndOfRows() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(end_, size_);
#endif
  }

 private:
  const uint8_t* end_;
  size_t size_;
};

bool same(const int32_t* got, size_t stride, const std::vector<int32_t>& want, int m, int n) {
  for (int i = 0; i < m; ++i) {
    if (std::memcmp(got + i * stride, want.data() + size_t(i) * n, sizeof(int32_t) * n) != 0) {
      return false;
    }
  }
  return true;
}

// One shape through one kernel, int32 results, codes of the kernel's own widths.
bool one_product(const Kernel& kernel, int m, int n, int k, Fill a_fill, Fill w_fill) {
  const Choice choice = choice_of(kernel);
  Buffer<int8_t> a(size_t(m) * k), w(size_t(n) * k);
  fill(a.data(), a.size(), kernel.activation_bits, a_fill);
  fill(w.data(), w.size(), bits_of(kernel.weights), w_fill);
  const Table table(kernel.weights);
  const Packed packed = pack(choice, kernel.weights, w, table, n, k);

  ActivationRows rows;
  rows.codes = a.data();
  rows.stride = k;
  rows.rows = m;
  rows.inner = k;
  Buffer<uint8_t> scratch(prepared_bytes(choice, m, k));
  const Prepared prepared = prepare(choice, kernel.weights, rows, scratch.data());
  const EndOfRows end(prepared, scratch);
  Buffer<int32_t> out(size_t(m) * n);
  matmul(prepared, packed.matrix, Output::exact(out.data(), n));
  return same(out.data(), n, plain_product(a.data(), k, table.values(w).data(), m, n, k), m, n);
}

void test_shapes(const Kernel& kernel) {
  const auto run = [&](int m, int n, int k, Fill a, Fill w) {
    if (!one_product(kernel, m, n, k, a, w)) {
      ++test::failures;
      std::fprintf(stderr, "%s differs from plain loops at M=%d N=%d K=%d\n", kernel.name, m, n, k);
    }
  };
  const int runs_before = test::failures;
  // Every M, N and K from 1 to 70 (all tails of every tile), the other two drawn at random.
  for (int size = 1; size <= 70; ++size) {
    run(size, pick(1, 70), pick(1, 70), any_fill(), any_fill());
    run(pick(1, 70), size, pick(1, 70), any_fill(), any_fill());
    run(pick(1, 70), pick(1, 70), size, any_fill(), any_fill());
    run(1, pick(1, 70), size, any_fill(), any_fill());
  }
  run(131, 77, 515, Fill::kRandom, Fill::kExtremes);
  run(2, 1027, 387, Fill::kExtremes, Fill::kRandom);
  run(1, 33, 4099, Fill::kRandom, Fill::kRandom);
  // More activations than one pass over the weights takes, of long rows and of many.
  run(2 * kernel.m + 3, kernel.n + 1, 20011, Fill::kRandom, Fill::kRandom);
  run(301, 40, 900, Fill::kRandom, Fill::kRandom);
  // Head room: the longest sums that extreme codes give, also where a kernel accumulates in 16 bits
  // for a while.
  for (Fill a : {Fill::kLow, Fill::kHigh}) {
    for (Fill w : {Fill::kLow, Fill::kHigh}) {
      run(kernel.m, kernel.n, 1100, a, w);
      run(3, 5, 9001, a, w);
    }
  }
  run(1, 2, kMaxInner, Fill::kLow, Fill::kLow);
  run(2, 1, kMaxInner, Fill::kLow, Fill::kHigh);
  std::printf("  %-36s %s\n", kernel.name, test::failures == runs_before ? "exact" : "WRONG");
}

// Tokens of both widths through the dispatcher of an ISA: token order, steps, bias, strides,
// threads.
void test_mixed(const Choice& choice) {
  for (int round = 0; round < 180; ++round) {
    const int m = round < 6 ? round / 3 : pick(1, 40), n = pick(1, 70), k = pick(1, 150);
    const WeightForm form = kWeightForms[round % 3];
    // A third of the rounds each: mixed, only 8 bits, only 4 bits (one group is empty).
    const int kind = round / 3 % 3;
    const size_t stride = size_t(k) + pick(0, 3);
    Buffer<int8_t> a(m == 0 ? 0 : (m - 1) * stride + k), w(size_t(n) * k);
    Buffer<uint8_t> bits(m);
    for (int i = 0; i < m; ++i) {
      bits[i] = kind == 0 ? (pick(0, 1) ? 8 : 4) : kind == 1 ? 8 : 4;
      fill(a.data() + i * stride, k, bits[i], any_fill());
    }
    fill(w.data(), w.size(), bits_of(form), any_fill());
    const Table table(form);
    Buffer<float> bias(n);
    for (int j = 0; j < n; ++j) bias[j] = pick(-1000, 1000) / 37.0f;
    Buffer<float> row_steps(m), steps(n);
    for (int i = 0; i < m; ++i) row_steps[i] = pick(1, 1000) / 741.0f;
    for (int j = 0; j < n; ++j) steps[j] = pick(1, 1000) / 8191.0f;

    ActivationRows rows;
    rows.codes = a.data();
    rows.stride = stride;
    rows.rows = m;
    rows.inner = k;
    rows.bits = bits.data();
    rows.steps = row_steps.data();

    ThreadPool pool(1 + round % 3);
    const std::vector<int32_t> want =
        plain_product(a.data(), stride, table.values(w).data(), m, n, k);
    const Packed packed = pack(choice, form, w, table, n, k);
    Buffer<uint8_t> scratch(prepared_bytes(choice, m, k));
    const Prepared prepared = prepare(choice, form, rows, scratch.data(), &pool);

    // Three outputs of one call: exact, scaled with bias, scaled without; gaps stay untouched.
    const size_t out_stride = size_t(n) + 3;
    const size_t out_size = m == 0 ? 0 : (m - 1) * out_stride + n;
    Buffer<int32_t> exact(out_size);
    Buffer<float> biased(out_size), plain(out_size);
    for (size_t i = 0; i < out_size; ++i) exact[i] = -77, biased[i] = plain[i] = -77.0f;
    const Product products[] = {
        {&packed.matrix, Output::exact(exact.data(), out_stride)},
        {&packed.matrix, Output::scaled(biased.data(), out_stride, steps.data(), bias.data())},
        {&packed.matrix, Output::scaled(plain.data(), out_stride, steps.data())}};
    matmul(prepared, products, 3, &pool);

    bool ok = same(exact.data(), out_stride, want, m, n);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        // volatile: this file's own arithmetic must not be fused either
        volatile float step = row_steps[i] * steps[j];
        volatile float scaled = static_cast<float>(want[size_t(i) * n + j]) * step;
        ok = ok && plain[i * out_stride + j] == scaled;
        ok = ok && biased[i * out_stride + j] == scaled + bias[j];
      }
      for (size_t gap = i * out_stride + n; gap < std::min(out_size, (i + 1) * out_stride); ++gap) {
        ok = ok && exact[gap] == -77 && biased[gap] == -77.0f && plain[gap] == -77.0f;
      }
    }
    if (!CHECK(ok)) {
      std::fprintf(stderr, "  mixed widths, %s: M=%d N=%d K=%d %s\n", choice.isa->name, m, n, k,
                   name_of(form));
    }
  }
}

// Keys and values of one head, appended a few tokens at a time.
void test_attention(const Choice& choice) {
  for (int round = 0; round < 120; ++round) {
    const int dims[] = {8, 64, 16, 32, 5, 80, 128, 1};
    const int head_dim = dims[round % 8];
    const WeightForm form = kWeightForms[round / 8 % 3];
    const int bits = bits_of(form);
    const Table key_table(form), value_table(form);
    const int appended = round < 24 ? round : pick(1, 200), m = pick(1, 20);
    const int capacity = appended + pick(1, 60);
    Buffer<int8_t> keys(size_t(appended) * head_dim), values(size_t(appended) * head_dim);
    fill(keys.data(), keys.size(), bits, any_fill());
    fill(values.data(), values.size(), bits, any_fill());

    Buffer<uint8_t> key_data(KeyPool::bytes(choice, form, head_dim, capacity));
    Buffer<uint8_t> value_data(ValuePool::bytes(choice, form, head_dim, capacity));
    KeyPool key_pool = KeyPool::empty(choice, form, head_dim, key_data.data(), key_table.data());
    ValuePool value_pool =
        ValuePool::empty(choice, form, head_dim, capacity, value_data.data(), value_table.data());
    int rewinds = round % 3, first = 0;  // the oldest token that is held
    for (int t = 0; t < appended;) {
      if (rewinds > 0 && t > 0 && pick(0, 9) == 0) {  // some tokens are taken back, then come again
        --rewinds;
        t = pick(first, t);
        key_pool.truncate(t - first);
        value_pool.truncate(t - first);
      }
      if (round % 2 == 0 && pick(0, 9) == 0) {  // the oldest are dropped
        Buffer<int8_t> buffer(head_dim);
        const int dropped = pick(0, t - first);
        key_pool.drop(dropped);
        value_pool.drop(dropped, buffer.data());
        first += dropped;
      }
      const int count = std::min(pick(1, 40), appended - t);
      key_pool.append(keys.data() + size_t(t) * head_dim, count);
      value_pool.append(values.data() + size_t(t) * head_dim, count);
      t += count;
    }
    const int tokens = appended - first;
    CHECK(key_pool.count() == tokens && value_pool.count() == tokens);
    CHECK(key_pool.form() == form && value_pool.form() == form);
    if (tokens == 0) continue;

    Buffer<int8_t> queries(size_t(m) * head_dim);
    Buffer<uint8_t> query_bits(m);
    for (int i = 0; i < m; ++i) {
      query_bits[i] = pick(0, 1) ? 8 : 4;
      fill(queries.data() + size_t(i) * head_dim, head_dim, query_bits[i], any_fill());
    }
    ActivationRows rows;
    rows.codes = queries.data();
    rows.stride = head_dim;
    rows.rows = m;
    rows.inner = head_dim;
    rows.bits = query_bits.data();
    Buffer<uint8_t> query_scratch(prepared_bytes(choice, m, head_dim));
    Buffer<int32_t> score(size_t(m) * tokens);
    scores(prepare(choice, form, rows, query_scratch.data()), key_pool, score.data(), tokens);
    const size_t begin = size_t(first) * head_dim;
    const std::vector<int8_t> key_values = key_table.values(keys);
    CHECK(same(
        score.data(), tokens,
        plain_product(queries.data(), head_dim, key_values.data() + begin, m, tokens, head_dim), m,
        tokens));

    // Causal rows: row i sees a prefix of the tokens and has zeros behind it.
    Buffer<uint8_t> probabilities(size_t(m) * tokens);
    for (int i = 0; i < m; ++i) {
      const int seen = pick(0, tokens), kind = pick(0, 2);
      for (int t = 0; t < seen; ++t) {
        probabilities[size_t(i) * tokens + t] =
            static_cast<uint8_t>(kind == 0   ? 255
                                 : kind == 1 ? pick(0, 255)
                                             : 255 * pick(0, 1));
      }
    }
    const std::vector<int8_t> of_tokens = value_table.values(values);
    std::vector<int8_t> transposed(size_t(head_dim) * tokens);
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < head_dim; ++c) {
        transposed[size_t(c) * tokens + t] = of_tokens[begin + size_t(t) * head_dim + c];
      }
    }
    const ProbabilityRows probability_rows{probabilities.data(), size_t(tokens), m, tokens};
    Buffer<uint8_t> scratch(prepared_bytes(choice, m, tokens));
    Buffer<int32_t> out(size_t(m) * head_dim);
    weighted_values(choice, probability_rows, value_pool, scratch.data(), out.data(), head_dim);
    CHECK(same(out.data(), head_dim,
               plain_product(probabilities.data(), tokens, transposed.data(), m, head_dim, tokens),
               m, head_dim));
  }
}

// As many values as a pool may hold: sums wrap around on the way, results do not.
void test_longest_values(const Choice& choice) {
  constexpr int kHeadDim = 5, kRows = 4;
  constexpr int kMostCodes = 1 << 15;  // of a row together
  for (const WeightForm form : kWeightForms) {
    for (const Fill of_values : {Fill::kLow, Fill::kHigh, Fill::kRandom}) {
      Buffer<int8_t> values(size_t(kMaxTokens) * kHeadDim);
      fill(values.data(), values.size(), bits_of(form), of_values);
      const Table table(form);
      Buffer<uint8_t> data(ValuePool::bytes(choice, form, kHeadDim, kMaxTokens));
      ValuePool pool =
          ValuePool::empty(choice, form, kHeadDim, kMaxTokens, data.data(), table.data());
      pool.append(values.data(), kMaxTokens);
      // A quarter of each code at one end of the text, nothing, everything for a few tokens, and a
      // little for many.
      Buffer<uint8_t> probabilities(size_t(kRows) * kMaxTokens);
      for (int i = 0; i < kMostCodes / 4; ++i) probabilities[kMaxTokens - 1 - i] = 4;
      for (int i = 0; i < kMostCodes / 255; ++i) {
        probabilities[2 * size_t(kMaxTokens) + pick(0, kMaxTokens - 1)] = 255;
      }
      for (int i = 0; i < kMostCodes; ++i) {
        probabilities[3 * size_t(kMaxTokens) + pick(0, kMaxTokens - 1)] = 1;
      }
      const ProbabilityRows rows{probabilities.data(), size_t(kMaxTokens), kRows, kMaxTokens};
      Buffer<uint8_t> scratch(prepared_bytes(choice, kRows, kMaxTokens));
      Buffer<int32_t> out(size_t(kRows) * kHeadDim);
      weighted_values(choice, rows, pool, scratch.data(), out.data(), kHeadDim);
      const std::vector<int8_t> of_tokens = table.values(values);
      bool ok = true;
      for (int i = 0; i < kRows; ++i) {
        for (int c = 0; c < kHeadDim; ++c) {
          int64_t sum = 0;
          for (size_t t = 0; t < kMaxTokens; ++t) {
            sum += probabilities[size_t(i) * kMaxTokens + t] * of_tokens[t * kHeadDim + size_t(c)];
          }
          ok = ok && out[size_t(i) * kHeadDim + c] == sum;
        }
      }
      if (!CHECK(ok)) std::fprintf(stderr, "  %s, %s\n", choice.isa->name, name_of(form));
    }
  }
}

// The rule of docs/format.md, written out once more.
int quantize_plainly(float x, float step, int low, int high) {
  const float inverse = 1.0f / step;
  volatile float scaled = x * inverse;
  if (std::isnan(scaled)) return 0;
  const double rounded = std::rint(static_cast<double>(scaled));
  return static_cast<int>(std::min<double>(std::max<double>(rounded, low), high));
}

void test_quantize(const Choice& choice) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {0.0f,  -0.0f,         kNan,   -kNan,  kInfinity, -kInfinity,
                           3e38f, -3e38f,        1e-45f, 127.5f, -128.5f,   7.5f,
                           -8.5f, 2147483648.0f, 254.5f, 255.5f};
  for (int n = 0; n <= 150; ++n) {
    for (float step : {1.0f, 0.25f, 0.0123f, 6.1035e-05f}) {
      Buffer<float> x(n);
      for (int i = 0; i < n; ++i) {
        const int draw = pick(0, 3);
        x[i] = draw == 0   ? special[pick(0, 15)]
               : draw == 1 ? (pick(-300, 300) + 0.5f) * step  // ties
               : draw == 2 ? pick(-30000, 30000) / 100.0f * step
                           : std::ldexp(static_cast<float>(pick(-1000, 1000)), pick(-40, 30));
      }
      for (int bits : {8, 4}) {
        const int high = (1 << (bits - 1)) - 1;
        Buffer<int8_t> codes(n);
        quantize(choice, x.data(), n, step, bits, codes.data());
        for (int i = 0; i < n; ++i) {
          if (!CHECK(codes[i] == quantize_plainly(x[i], step, -high - 1, high))) {
            std::fprintf(stderr, "  quantize %s: %a / %a\n", choice.isa->name, x[i], step);
          }
        }
      }
    }
  }
}

// Names follow the grammar, and a matrix packed once serves both widths of activations.
void test_table() {
  for (const Kernel& kernel : table()) {
    const std::string name = "matmul_a" + std::to_string(kernel.activation_bits) + "_" +
                             name_of(kernel.weights) + "_" + std::to_string(kernel.m) + "x" +
                             std::to_string(kernel.n) + "x" + std::to_string(kernel.k) + "_" +
                             kernel.isa;
    CHECK(name == kernel.name);
    CHECK(find_isa(kernel.isa) != nullptr);
  }
  for (const Isa& isa : isas()) {
    Choice choice;
    std::string error;
    CHECK(choose(isa.name, &choice, &error) == runs_here(isa));
    if (!runs_here(isa)) {
      CHECK(error.find(isa.name) != std::string::npos);
      continue;
    }
    for (const WeightForm form : kWeightForms) {
      for (int activation_bits : {8, 4}) {
        const Kernel& kernel = choice.matmul(activation_bits, form);
        const Kernel& layout = choice.matmul(8, form);
        CHECK(kernel.weights == form && kernel.activation_bits >= activation_bits);
        CHECK(std::string(kernel.isa) == isa.name);
        CHECK(kernel.m <= squat::kernels::kMaxTileRows);
        CHECK(kernel.n == layout.n && kernel.k == layout.k && kernel.zero == layout.zero);
        CHECK(explain(choice, activation_bits, form).find(kernel.name) == 0);
      }
    }
  }
  Choice choice;
  std::string error;
  CHECK(!choose("sse9", &choice, &error) && error.find("sse9") != std::string::npos);
  CHECK(choose(nullptr, &choice, &error) && !choice.pinned);
  CHECK(choose("", &choice, &error) && !choice.pinned);
  CHECK(choose("reference", &choice, &error) && choice.pinned);
}

}  // namespace

int main() {
  test_table();
  for (const Isa& isa : isas()) {
    if (!runs_here(isa)) {
      std::printf("%s: not on this CPU, not tested\n", isa.name);
      continue;
    }
    std::printf("%s\n", isa.name);
    for (const Kernel& kernel : table()) {
      if (std::string(kernel.isa) == isa.name) test_shapes(kernel);
    }
    Choice choice;
    std::string error;
    if (!CHECK(choose(isa.name, &choice, &error))) continue;
    test_mixed(choice);
    test_attention(choice);
    test_longest_values(choice);
    test_quantize(choice);
  }
  return test::report("test_kernels");
}

// Softmax to codes: every instruction set that this CPU runs gives the same bits, rounds ties to
// even, and writes nothing but zeros behind a row's end. Rotation: the textbook formula, bit by
// bit. Importance: the largest value and a plain sum. Rows of two widths: taken apart and put
// together again, for every share of wide tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/cpu.h"
#include "check.h"
#include "graph/float_ops.h"
#include "kernels/kernels.h"

using squat::FloatOps;

namespace {

size_t padded(int n) { return static_cast<size_t>((n + 15) / 16 * 16); }

std::vector<const FloatOps*> implementations() {
  std::vector<const FloatOps*> all;
  for (const squat::kernels::Isa& isa : squat::kernels::isas()) {
    if (squat::kernels::runs_here(isa)) all.push_back(&squat::float_ops(isa.features));
  }
  return all;
}

void test_equal_scores(const FloatOps& ops) {
  for (int n = 1; n <= 70; ++n) {
    std::vector<float> x(padded(n), 99.0f);  // what lies behind the end does not count
    for (int i = 0; i < n; ++i) x[static_cast<size_t>(i)] = -3.25f;
    std::vector<uint8_t> codes(padded(n), 7);
    const float p = 1.0f / static_cast<float>(n);
    CHECK(ops.softmax_codes(x.data(), n, 255.0f, codes.data()) == p);
    for (size_t i = 0; i < codes.size(); ++i) {
      if (i < static_cast<size_t>(n)) {
        CHECK(codes[i] == std::rint(double{p * 255.0f}));
      } else {
        CHECK(codes[i] == 0 || codes[i] == 7);
      }
    }
  }
}

void test_ends(const FloatOps& ops) {
  std::vector<float> x(16);
  std::vector<uint8_t> codes(16);
  ops.softmax_codes(x.data(), 1, 1000.0f, codes.data());
  CHECK(codes[0] == 255);  // clipped
  x[0] = std::numeric_limits<float>::quiet_NaN();
  ops.softmax_codes(x.data(), 3, 255.0f, codes.data());
  CHECK(codes[0] == 0);
}

void test_same_bits(const std::vector<const FloatOps*>& all) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 4);
  for (int n = 1; n <= 200; ++n) {
    std::vector<float> x(padded(n));
    for (float& v : x) v = normal(random);
    std::vector<uint8_t> first;
    float first_p = 0;
    for (const FloatOps* ops : all) {
      std::vector<float> copy = x;
      std::vector<uint8_t> codes(padded(n));  // zeros, as what may be written behind the end
      const float p = ops->softmax_codes(copy.data(), n, 254.5f, codes.data());
      if (first.empty()) first = codes, first_p = p;
      CHECK(codes == first && std::memcmp(&p, &first_p, sizeof p) == 0);
    }
  }
}

void test_rotation(const FloatOps& ops) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int n = 2; n <= 70; n += 2) {
    const size_t size = static_cast<size_t>(n);
    std::vector<float> x(size), cosine(size), sine(size), expected(size);
    for (float& v : x) v = normal(random);
    for (size_t i = 0; i < size; i += 2) {
      const float angle = normal(random), c = std::cos(angle), s = std::sin(angle);
      cosine[i] = cosine[i + 1] = c;
      sine[i] = -s;
      sine[i + 1] = s;
      expected[i] = x[i] * c - x[i + 1] * s;
      expected[i + 1] = x[i] * s + x[i + 1] * c;
    }
    ops.rotate(cosine.data(), sine.data(), n, x.data());
    CHECK(std::memcmp(x.data(), expected.data(), size * sizeof(float)) == 0);
  }
}

void test_value_peak(const FloatOps& ops) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int n = 1; n <= 70; ++n) {
    std::vector<float> x(static_cast<size_t>(n));
    float peak = 0;
    double squares = 0;
    for (float& v : x) {
      v = normal(random);
      peak = std::max(peak, std::abs(v));
      squares += static_cast<double>(v) * v;
    }
    const float expected = peak * peak / (static_cast<float>(squares / n) + 1e-30f);
    CHECK(ops.value_peak(x.data(), n) == expected);
  }
  CHECK(ops.value_peak(std::vector<float>(8).data(), 8) == 0);
}

void test_widths(const FloatOps& ops) {
  std::mt19937 random(3);
  for (int n = 1; n <= 100; ++n) {
    const size_t size = padded(n);
    std::bernoulli_distribution is_wide(n % 5 / 4.0);
    std::vector<uint8_t> widths(size), codes(size), wide(size), narrow(size);
    std::vector<uint8_t> expected_wide, expected_narrow;
    for (size_t i = 0; i < size; ++i) {
      widths[i] = is_wide(random) ? 8 : 4;
      codes[i] = static_cast<uint8_t>(random());
      if (i < static_cast<size_t>(n)) {
        (widths[i] == 8 ? expected_wide : expected_narrow).push_back(codes[i]);
      }
    }
    ops.split_codes(widths.data(), codes.data(), n, wide.data(), narrow.data());
    CHECK(std::equal(expected_wide.begin(), expected_wide.end(), wide.begin()));
    CHECK(std::equal(expected_narrow.begin(), expected_narrow.end(), narrow.begin()));

    const std::vector<int32_t> wide_sums(wide.begin(), wide.end());
    const std::vector<int32_t> narrow_sums(narrow.begin(), narrow.end());
    std::vector<float> scores(size);
    ops.merge_scores(widths.data(), wide_sums.data(), 0.3f, narrow_sums.data(), 0.7f, 0.11f, n,
                     scores.data());
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      const float step = widths[i] == 8 ? 0.3f : 0.7f;
      CHECK(scores[i] == static_cast<float>(codes[i]) * step * 0.11f);
    }
  }
}

}  // namespace

int main() {
  const std::vector<const FloatOps*> all = implementations();
  for (const FloatOps* ops : all) {
    test_equal_scores(*ops);
    test_ends(*ops);
    test_rotation(*ops);
    test_value_peak(*ops);
    test_widths(*ops);
  }
  test_same_bits(all);
  return squat::test::report("test_float_ops");
}

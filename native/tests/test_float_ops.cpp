// Softmax to codes: every instruction set that this CPU runs gives the same bits, rounds ties to
// even, and writes nothing but zeros behind a row's end. Rotation: the textbook formula, bit by
// bit. Hadamard transform, token steps and levels: their definitions in docs/format.md. Importance:
// the largest value and a plain sum. Rows of two widths: taken apart and put together again, for
// every share of wide tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "base/cpu.h"
#include "check.h"
#include "graph/float_ops.h"
#include "graph/token_steps.h"
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

std::vector<float> random_multipliers(int n, std::mt19937* random) {
  std::vector<float> multipliers(padded(n));
  for (float& m : multipliers) m = squat::multiplier(static_cast<int8_t>((*random)() % 40));
  return multipliers;
}

void test_equal_scores(const FloatOps& ops) {
  for (int n = 1; n <= 70; ++n) {
    std::vector<float> x(padded(n), 99.0f);  // what lies behind the end does not count
    std::fill_n(x.begin(), n, -3.25f);
    std::vector<uint8_t> codes(padded(n), 7);
    const float p = 1.0f / static_cast<float>(n);
    CHECK(ops.softmax(x.data(), n, 0) == p);
    for (int i = 0; i < n; ++i) CHECK(x[static_cast<size_t>(i)] == p);
    ops.unsigned_codes(x.data(), n, 255.0f, codes.data());
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
  CHECK(ops.softmax(x.data(), 1, 0) == 1);
  ops.unsigned_codes(x.data(), 1, 1000.0f, codes.data());
  CHECK(codes[0] == 255);  // clipped
  x[0] = std::numeric_limits<float>::quiet_NaN();
  ops.softmax(x.data(), 3, 0);
  ops.unsigned_codes(x.data(), 3, 255.0f, codes.data());
  CHECK(codes[0] == 0);
}

void test_same_bits(const std::vector<const FloatOps*>& all) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 4);
  for (int n = 1; n <= 200; ++n) {
    std::vector<float> x(padded(n));
    for (float& v : x) v = normal(random);
    const std::vector<float> multipliers = random_multipliers(n, &random);
    std::vector<uint8_t> first;
    std::vector<float> first_x;
    float first_p = 0, first_peak = 0;
    for (const FloatOps* ops : all) {
      std::vector<float> copy = x;
      std::vector<uint8_t> codes(padded(n));  // zeros, as what may be written behind the end
      const float p = ops->softmax(copy.data(), n, 0);
      const float peak = ops->weigh(multipliers.data(), n, copy.data());
      ops->unsigned_codes(copy.data(), n, 254.5f / peak, codes.data());
      CHECK(peak == *std::max_element(copy.begin(), copy.begin() + n));
      if (first.empty()) first = codes, first_x = copy, first_p = p, first_peak = peak;
      CHECK(codes == first && p == first_p && peak == first_peak);
      CHECK(std::memcmp(copy.data(), first_x.data(), static_cast<size_t>(n) * sizeof(float)) == 0);
    }
    first.clear();
    squat::CodedRow of_first = {};
    for (const FloatOps* ops : all) {
      std::vector<float> copy = x;
      std::vector<uint8_t> codes(padded(n));
      const squat::CodedRow row =
          ops->softmax_codes(copy.data(), n, n / 2, multipliers.data(), codes.data());
      if (first.empty()) first = codes, of_first = row;
      CHECK(codes == first && row.step == of_first.step && row.first == of_first.first);
    }
  }
}

// Beside exact powers of two, for rows longer than what is summed at once, too.
void test_softmax_codes(const FloatOps& ops) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal(0, 3);
  std::vector<int> lengths = {2047, 2048, 2049, 4096, 5000, 9000};
  for (int n = 1; n <= 70; ++n) lengths.push_back(n);
  for (const int n : lengths) {
    std::vector<float> x(padded(n), 99.0f);  // what lies behind the end does not count
    std::generate_n(x.begin(), n, [&] { return normal(random); });
    const int first = n / 3;
    std::fill_n(x.begin(), first, -std::numeric_limits<float>::infinity());
    const std::vector<float> multipliers = random_multipliers(n, &random);
    for (const float* given : {static_cast<const float*>(nullptr), multipliers.data()}) {
      const size_t size = static_cast<size_t>(n);
      const double largest = *std::max_element(x.begin(), x.begin() + n);
      std::vector<double> weighted(size);
      double total = 0, peak = 0;
      for (size_t i = 0; i < size; ++i) {
        const double power = std::exp2(x[i] - largest);
        total += power;
        weighted[i] = given == nullptr ? power : power * given[i];
        peak = std::max(peak, weighted[i]);
      }
      std::vector<float> copy = x;
      std::vector<uint8_t> codes(padded(n), 7);
      const squat::CodedRow row = ops.softmax_codes(copy.data(), n, first, given, codes.data());
      CHECK(std::abs(row.first - std::exp2(x[static_cast<size_t>(first)] - largest) / total) <
            2e-4 * row.first);
      CHECK(std::abs(row.step * 255 * total / peak - 1) < 3e-4);
      for (size_t i = 0; i < codes.size(); ++i) {
        if (i < size) {
          CHECK(std::abs(codes[i] - 255 * weighted[i] / peak) < 0.55);
        } else {
          CHECK(codes[i] == 0 || codes[i] == 7);
        }
      }
      CHECK(*std::max_element(codes.begin(), codes.begin() + n) == 255);
      CHECK(std::all_of(codes.begin(), codes.begin() + first, [](uint8_t c) { return c == 0; }));
    }
  }
}

void test_far_scores(const FloatOps& ops) {
  // 2^-64 counts as nothing, whatever it is multiplied by; what is above it does not.
  std::vector<float> x = {0, -64, -63};
  x.resize(16);
  const std::vector<float> multipliers(16, 0x1p31f);
  std::vector<float> weak = multipliers;
  weak[0] = 0x1p-32f;
  std::vector<uint8_t> codes(16);
  ops.softmax_codes(x.data(), 3, 0, weak.data(), codes.data());
  CHECK(codes[0] == 255 && codes[1] == 0 && codes[2] == 255);
  x.assign(16, std::numeric_limits<float>::infinity());  // which no model has: anything, no crash
  ops.softmax_codes(x.data(), 3, 0, multipliers.data(), codes.data());
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

void expect_hadamard(const FloatOps& ops, int n, int block, int inner, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(*random);
  std::vector<float> expected = x;
  const auto at = [&](int i) -> float& { return expected[static_cast<size_t>(i)]; };
  const int power = block & -block;
  for (int distance = inner; distance < power; distance *= 2) {
    for (int i = 0; i < n; ++i) {
      if (i & distance) continue;
      const float sum = at(i) + at(i + distance), difference = at(i) - at(i + distance);
      at(i) = sum;
      at(i + distance) = difference;
    }
  }
  if (power > inner) {
    for (float& v : expected) v *= 0.125f;
  }
  int distance = power;
  for (int rest = block / power, prime = 3; rest > 1;) {
    if (rest % prime != 0) {
      prime += 2;
      continue;
    }
    for (int i = 0; i < n; ++i) {
      if (i / distance % prime != 0) continue;
      float total = at(i);
      for (int k = 1; k < prime; ++k) total += at(i + k * distance);
      total *= static_cast<float>(2.0 / prime);
      for (int k = 0; k < prime; ++k) at(i + k * distance) -= total;
    }
    rest /= prime;
    distance *= prime;
  }
  ops.hadamard(x.data(), n, block, inner, 0.125f);
  if (!CHECK(std::memcmp(x.data(), expected.data(), x.size() * sizeof(float)) == 0)) {
    std::fprintf(stderr, "  %d elements in blocks of %d, from %d on\n", n, block, inner);
  }
}

void test_hadamard(const FloatOps& ops) {
  std::mt19937 random(5);
  for (int power = 1; power <= 4096; power *= 2) {
    for (const int odd : {1, 3, 5, 9, 15, 19}) {
      for (int inner = 1; inner <= power; inner *= 8) {
        const int block = power * odd;
        expect_hadamard(ops, block, block, inner, &random);
        if (power <= 64) expect_hadamard(ops, 3 * block, block, inner, &random);
      }
    }
  }
}

void test_largest(const FloatOps& ops) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (int n = 1; n <= 70; ++n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(random);
    const size_t at = random() % x.size();
    for (const float peak : {7.5f, -9.25f, kInfinity, -kInfinity}) {
      x[at] = peak;
      CHECK(ops.largest(x.data(), n) == std::abs(peak));
    }
    x[at] = random() % 2 ? kNan : -kNan;
    float expected = 0;
    for (const float v : x) expected = std::abs(v) > expected ? std::abs(v) : expected;
    CHECK(ops.largest(x.data(), n) == expected);
  }
}

// The definitions, written out with powers in float64.
void test_token_steps() {
  std::mt19937 random(7);
  for (int round = 0; round < 20000; ++round) {
    const float reach =
        std::ldexp(static_cast<float>(1 + random() % 2047), static_cast<int>(random() % 20) - 14);
    const float power = std::ldexp(1.0f, static_cast<int>(random() % 50) - 10);
    const float near[] = {
        reach * power,
        std::nextafter(reach * power, 0.0f),
        std::nextafter(reach * power, std::numeric_limits<float>::infinity()),
        std::ldexp(static_cast<float>(random() % 1000), -static_cast<int>(random() % 160)),
        std::ldexp(static_cast<float>(random() % 9), static_cast<int>(random() % 90) - 45),
        std::numeric_limits<float>::infinity(),
        0.0f};
    for (const float largest : near) {
      int e = 0;
      while (e < 31 && static_cast<double>(largest) > std::ldexp(double{reach}, e)) ++e;
      CHECK(squat::multiplier(squat::exponent_quarters(largest, reach)) == std::ldexp(1.0f, e));
      const float multiplier = squat::multiplier(squat::peak_quarters(largest));
      // The smallest of its kind that reaches the peak with 128 steps, if any does.
      const float smaller =
          squat::multiplier(static_cast<int8_t>(std::max(squat::peak_quarters(largest) - 1, -128)));
      CHECK(largest <= 128 * multiplier || multiplier == std::ldexp(1.75f, 31));
      CHECK(largest > 128 * smaller || smaller == std::ldexp(1.0f, -32));
    }
  }
  for (int quarters = -128; quarters < 128; ++quarters) {
    const int power = quarters >> 2;
    CHECK(squat::multiplier(static_cast<int8_t>(quarters)) ==
          std::ldexp(1 + 0.25f * static_cast<float>(quarters & 3), power));
  }
}

void test_multipliers(const FloatOps& ops) {
  std::mt19937 random(8);
  for (int n = 1; n <= 70; ++n) {
    std::vector<float> x(padded(n)), scores(padded(n));
    std::vector<int32_t> sums(padded(n));
    std::vector<int8_t> quarters(padded(n));
    for (size_t i = 0; i < x.size(); ++i) {
      quarters[i] = static_cast<int8_t>(random());
      sums[i] = static_cast<int32_t>(random() % 1000000) - 500000;
    }
    std::vector<float> multipliers(padded(n));
    ops.decode_multipliers(quarters.data(), n, multipliers.data());
    ops.scale_scores(sums.data(), 0.3f, multipliers.data(), 0.11f, n, scores.data());
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      const float step = 0.3f * squat::multiplier(quarters[i]);
      CHECK(scores[i] == static_cast<float>(sums[i]) * step * 0.11f);
    }
    ops.scale_scores(sums.data(), 0.3f, nullptr, 0.11f, n, scores.data());
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      CHECK(scores[i] == static_cast<float>(sums[i]) * 0.3f * 0.11f);
    }
  }
}

// Every code, with levels at either end of the range, with all of it, and with random ones.
void test_levels(const FloatOps& ops) {
  std::mt19937 random(9);
  std::vector<int8_t> codes(256);
  std::iota(codes.begin(), codes.end(), static_cast<int8_t>(-128));
  for (int round = 0; round < 100; ++round) {
    std::vector<int8_t> drawn = codes;
    if (round > 2) std::shuffle(drawn.begin(), drawn.end(), random);
    std::vector<int32_t> levels;
    for (int i = 0; i < 16; ++i) {
      const int at = round == 0 ? i : round == 1 ? 255 - i : round == 2 ? 17 * i : i;
      levels.push_back(drawn[static_cast<size_t>(at)]);
    }
    std::sort(levels.begin(), levels.end());
    const size_t n = round < 3 ? 256 : 1 + random() % 256;
    std::vector<int8_t> mapped(codes.begin(), codes.begin() + static_cast<std::ptrdiff_t>(n));
    std::vector<int8_t> places = mapped;
    const squat::Levels table = squat::make_levels(levels.data());
    ops.to_levels(table, static_cast<int>(n), mapped.data());
    ops.to_level_codes(table, static_cast<int>(n), places.data());
    for (size_t i = 0; i < n; ++i) {
      int32_t best = levels[0];  // of two that are equally near the lower one
      for (const int32_t level : levels) {
        if (std::abs(level - codes[i]) < std::abs(best - codes[i])) best = level;
      }
      CHECK(mapped[i] == best);
      CHECK(levels[static_cast<size_t>(places[i] + 8)] == best);
    }
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
    const std::vector<float> multipliers = random_multipliers(n, &random);
    for (const float* given : {static_cast<const float*>(nullptr), multipliers.data()}) {
      ops.merge_scores(widths.data(), wide_sums.data(), 0.3f, narrow_sums.data(), 0.7f, given,
                       0.11f, n, scores.data());
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        float step = widths[i] == 8 ? 0.3f : 0.7f;
        if (given != nullptr) step *= given[i];
        CHECK(scores[i] == static_cast<float>(codes[i]) * step * 0.11f);
      }
    }
  }
}

}  // namespace

int main() {
  const std::vector<const FloatOps*> all = implementations();
  for (const FloatOps* ops : all) {
    test_equal_scores(*ops);
    test_ends(*ops);
    test_softmax_codes(*ops);
    test_far_scores(*ops);
    test_rotation(*ops);
    test_hadamard(*ops);
    test_largest(*ops);
    test_multipliers(*ops);
    test_levels(*ops);
    test_value_peak(*ops);
    test_widths(*ops);
  }
  test_same_bits(all);
  test_token_steps();
  return squat::test::report("test_float_ops");
}

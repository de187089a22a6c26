// The kernels for x86 dot products of four bytes (VPDPBUSD), for vectors of 256 and of 512 bits.
//
// The instruction multiplies unsigned with signed bytes. Weights are the unsigned operand: they are
// held as code + 8 or code + 128, so that a nibble needs no sign extension, and the surplus, which
// is that offset times the sum of the row's activations, is subtracted when a tile is written.
// One vector holds four codes of k for each of kLanes weight rows; a tile is M tokens times two
// such vectors, each token's four codes broadcast to all lanes.
//
// `Vector` offers: Type, kLanes, zero(), load(p), store(p, v), broadcast(p) of four bytes,
// low(v) and high(v) nibbles, dot(acc, unsigned, signed), add(a, b).
#pragma once

#include "micro.h"

namespace squat::kernels {
namespace {

// Few rows leave registers free: two sums per result then shorten the chain of dependent
// instructions.
template <class Vector, int M, int MaxM>
struct Sums {
  static constexpr int kChains = 2 * M <= MaxM ? 2 : 1;
  typename Vector::Type at[kChains][M][2];

  Sums() {
    for (auto& chain : at) {
      for (auto& row : chain) row[0] = row[1] = Vector::zero();
    }
  }

  // Multiplies one group of four codes of M rows with two vectors of weights.
  void add_group(int chain, const uint8_t* a, typename Vector::Type w0, typename Vector::Type w1) {
    auto& sums = at[chain % kChains];
    for (int i = 0; i < M; ++i) {
      const auto codes = Vector::broadcast(a + 4 * i);
      sums[i][0] = Vector::dot(sums[i][0], w0, codes);
      sums[i][1] = Vector::dot(sums[i][1], w1, codes);
    }
  }

  void store(int32_t* acc) const {
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < 2; ++j) {
        auto sum = at[0][i][j];
        if (kChains == 2) sum = Vector::add(sum, at[kChains - 1][i][j]);
        Vector::store(acc + (2 * i + j) * Vector::kLanes, sum);
      }
    }
  }
};

template <class Vector, int MaxM>
struct VnniW8 {
  static constexpr int kM = MaxM, kN = 2 * Vector::kLanes, kZero = 128;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<Vector, M, MaxM> sums;
    int group = 0;
    for (; group + 2 <= call.group_count; group += 2) {
      sums.add_group(0, a, Vector::load(w), Vector::load(w + 4 * Vector::kLanes));
      w += call.group_stride;
      sums.add_group(1, a + 4 * M, Vector::load(w), Vector::load(w + 4 * Vector::kLanes));
      w += call.group_stride;
      a += 8 * M;
    }
    if (group < call.group_count) {
      sums.add_group(0, a, Vector::load(w), Vector::load(w + 4 * Vector::kLanes));
    }
    sums.store(acc);
  }
};

template <class Vector, int MaxM>
struct VnniW4 {
  static constexpr int kM = MaxM, kN = 2 * Vector::kLanes, kZero = 8;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, int32_t* acc) {
    Sums<Vector, M, MaxM> sums;
    for (int pair = 0; pair < call.group_count; ++pair) {
      const auto w0 = Vector::load(w), w1 = Vector::load(w + 4 * Vector::kLanes);
      sums.add_group(0, a, Vector::low(w0), Vector::low(w1));
      sums.add_group(1, a + 4 * M, Vector::high(w0), Vector::high(w1));
      w += call.group_stride;
      a += 8 * M;
    }
    sums.store(acc);
  }
};

}  // namespace
}  // namespace squat::kernels

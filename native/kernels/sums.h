// The sums of a tile on x86: M tokens times two vectors of weight rows, all of them in registers.
//
// `Vector` offers: Type, kLanes (int32 results of a vector), zero(), broadcast(p) of four bytes,
// dot(acc, weights, activations), write(p, acc) to kLanes results.
#pragma once

#include "micro.h"

namespace squat::kernels {
namespace {

// The sums of M rows. A recursive type instead of an array: compilers keep its members in registers
// reliably, whereas they spill an array of two dozen vectors as soon as a loop is not simple.
template <class Vector, int M>
struct Sums {
  using Type = typename Vector::Type;
  Sums<Vector, M - 1> above;
  Type left = Vector::zero(), right = Vector::zero();

  // Multiplies one group of four codes of each row with two vectors of weights; `Row` bytes are
  // from a row's codes to the next one's.
  template <int Row = 4>
  SQUAT_INLINE void add_group(const uint8_t* a, Type w0, Type w1) {
    above.template add_group<Row>(a, w0, w1);
    const Type codes = Vector::broadcast(a + Row * (M - 1));
    left = Vector::dot(left, w0, codes);
    right = Vector::dot(right, w1, codes);
  }
  SQUAT_INLINE void write(int32_t* acc) const {
    above.write(acc);
    Vector::write(acc + (2 * M - 2) * Vector::kLanes, left);
    Vector::write(acc + (2 * M - 1) * Vector::kLanes, right);
  }
};

template <class Vector>
struct Sums<Vector, 0> {
  using Type = typename Vector::Type;
  template <int Row>
  SQUAT_INLINE void add_group(const uint8_t*, Type, Type) {}
  SQUAT_INLINE void write(int32_t*) const {}
};

}  // namespace
}  // namespace squat::kernels

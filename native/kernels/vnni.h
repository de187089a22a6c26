// The kernels for x86 dot products of four bytes (VPDPBUSD), for vectors of 256 and of 512 bits.
//
// The instruction multiplies unsigned with signed bytes. Weights are the unsigned operand: they are
// held as code + 8 or code + 128, so that a nibble needs no sign extension, and the surplus, which
// is that offset times the sum of the row's activations, is subtracted when a tile is written. A
// nibble that stands for a level is looked up in a table of level + 128.
// One vector holds four codes of k for each of kLanes weight rows; a tile is M tokens times two
// such vectors, each token's four codes broadcast to all lanes.
//
// `Vector` is what sums.h asks for, and load(p), low(v) and high(v) nibbles, add(a, b), and for
// results: splat(int32), subtract(a, b), times128(v); for levels: unsigned_table(int8_t[16]),
// lookup(table, nibbles); and as floats FloatType, splat(float),
// load(const float*), to_float(v), multiply(a, b), add(a, b), write(float*, v).
#pragma once

#include "sums.h"

namespace squat::kernels {
namespace {

// Few rows leave registers free: groups then go to two sets of sums in turn, which shortens the
// chain of dependent instructions.
constexpr bool two_sets(int rows, int max_rows) { return 2 * rows <= max_rows; }

template <class Vector>
SQUAT_INLINE void add_sums(Sums<Vector, 0>&, const Sums<Vector, 0>&) {}

template <class Vector, int M>
SQUAT_INLINE void add_sums(Sums<Vector, M>& to, const Sums<Vector, M>& from) {
  add_sums(to.above, from.above);
  to.left = Vector::add(to.left, from.left);
  to.right = Vector::add(to.right, from.right);
}

// Writes the two vectors of one row: the same arithmetic as write_tile(), in registers.
template <class Vector>
SQUAT_INLINE void write_exact_row(const MatmulCall& call, typename Vector::Type left,
                                  typename Vector::Type right, int row, int column, int zero) {
  using Type = typename Vector::Type;
  constexpr int kLanes = Vector::kLanes;
  const Type offset = Vector::splat(zero * call.sums[row]);
  Type sums[2] = {Vector::subtract(left, offset), Vector::subtract(right, offset)};
  const size_t start = static_cast<size_t>(call.order[row]) * call.out.stride + column;
  unroll<2>([&](auto i) SQUAT_LAMBDA {
    if (call.column_sums != nullptr) {
      const Type of_column = Vector::load(call.column_sums + column + i * kLanes);
      sums[i] = Vector::add(sums[i], Vector::times128(of_column));
    }
    int32_t* to = call.out.accumulators + start + i * kLanes;
    if (call.out.add) sums[i] = Vector::add(Vector::load(to), sums[i]);
    Vector::write(to, sums[i]);
  });
}

// `steps` are those of the columns, which all rows of a tile share.
template <class Vector>
SQUAT_INLINE void write_scaled_row(const MatmulCall& call, const typename Vector::FloatType* steps,
                                   typename Vector::Type left, typename Vector::Type right, int row,
                                   int column, int zero) {
  using Type = typename Vector::Type;
  constexpr int kLanes = Vector::kLanes;
  const Output& out = call.out;
  const Type offset = Vector::splat(zero * call.sums[row]);
  const Type sums[2] = {Vector::subtract(left, offset), Vector::subtract(right, offset)};
  const auto row_step = Vector::splat(call.steps[row]);
  float* to = out.values + static_cast<size_t>(call.order[row]) * out.stride + column;
  unroll<2>([&](auto i) SQUAT_LAMBDA {
    const auto step = Vector::multiply(row_step, steps[i]);
    auto value = Vector::multiply(Vector::to_float(sums[i]), step);
    if (out.bias != nullptr) {
      value = Vector::add(value, Vector::load(out.bias + column + i * kLanes));
    }
    if (out.add) value = Vector::add(Vector::load(to + i * kLanes), value);
    Vector::write(to + i * kLanes, value);
  });
}

// Calls write(left, right, row) for every row of a tile.
template <class Vector, class Write>
SQUAT_INLINE void write_rows(const Sums<Vector, 0>&, const Write&) {}

template <class Vector, int M, class Write>
SQUAT_INLINE void write_rows(const Sums<Vector, M>& sums, const Write& write) {
  write_rows(sums.above, write);
  write(sums.left, sums.right, M - 1);
}

// Whole panels go to their place from the registers, the last panel's rest through memory.
template <class Vector, int M>
SQUAT_INLINE void finish(const MatmulCall& call, const Sums<Vector, M>& sums, Place at, int zero) {
  constexpr int kN = 2 * Vector::kLanes;
  using Type = typename Vector::Type;
  if (at.count < kN) {
    alignas(64) int32_t acc[M * kN];
    sums.write(acc);
    write_tile<kN>(call, acc, M, at, zero);
  } else if (call.out.accumulators != nullptr) {
    write_rows(sums, [&](Type left, Type right, int row) SQUAT_LAMBDA {
      write_exact_row<Vector>(call, left, right, at.row + row, at.column, zero);
    });
  } else {
    const float* from = call.out.steps + at.column;
    const typename Vector::FloatType steps[2] = {Vector::load(from),
                                                 Vector::load(from + Vector::kLanes)};
    write_rows(sums, [&](Type left, Type right, int row) SQUAT_LAMBDA {
      write_scaled_row<Vector>(call, steps, left, right, at.row + row, at.column, zero);
    });
  }
}

// Where the codes of a group lie: four of each row side by side, or a block of each row.
struct Interleaved {
  static constexpr int kRow = 4;
  template <int M>
  SQUAT_INLINE static const uint8_t* group(const uint8_t* a, int group) {
    return a + 4 * M * group;
  }
};
struct InBlocks {
  static constexpr int kRow = kBlock;
  template <int M>
  SQUAT_INLINE static const uint8_t* group(const uint8_t* a, int group) {
    return a + group / (kBlock / 4) * (kBlock * M) + group % (kBlock / 4) * 4;
  }
};

template <class Vector, int MaxM, class Rows = Interleaved>
struct VnniW8 {
  static constexpr int kM = MaxM, kN = 2 * Vector::kLanes, kZero = 128;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, Place at) {
    constexpr int kVector = 4 * Vector::kLanes;
    const int ahead = at.row == 0 ? call.ahead : 0;  // the first rows bring a panel for all others
    Sums<Vector, M> even;
    const auto codes = [=](int group) { return Rows::template group<M>(a, group); };
    int group = 0;
    if constexpr (two_sets(M, MaxM)) {
      Sums<Vector, M> odd;
      for (; group + 2 <= call.group_count; group += 2) {
        if (ahead != 0) ask_for<4 * kVector>(w + ahead);
        even.template add_group<Rows::kRow>(codes(group), Vector::load(w),
                                            Vector::load(w + kVector));
        w += 2 * kVector;
        odd.template add_group<Rows::kRow>(codes(group + 1), Vector::load(w),
                                           Vector::load(w + kVector));
        w += 2 * kVector;
      }
      add_sums(even, odd);
    }
    for (; group < call.group_count; ++group) {
      if (ahead != 0) ask_for<2 * kVector>(w + ahead);
      even.template add_group<Rows::kRow>(codes(group), Vector::load(w), Vector::load(w + kVector));
      w += 2 * kVector;
    }
    finish(call, even, at, kZero);
  }
};

// The unsigned operand of nibbles that hold code + 8.
template <class Vector>
struct PlainNibbles {
  static constexpr int kZero = 8;
  using Type = typename Vector::Type;
  SQUAT_INLINE explicit PlainNibbles(const MatmulCall&) {}
  SQUAT_INLINE Type operator()(Type nibbles) const { return nibbles; }
};

// The same if a code stands for a level.
template <class Vector>
struct LevelNibbles {
  static constexpr int kZero = 128;
  using Type = typename Vector::Type;
  const Type table;
  SQUAT_INLINE explicit LevelNibbles(const MatmulCall& call)
      : table(Vector::unsigned_table(call.levels)) {}
  SQUAT_INLINE Type operator()(Type nibbles) const { return Vector::lookup(table, nibbles); }
};

template <class Vector, int MaxM, class Nibbles, class Rows = Interleaved>
struct VnniNibbles {
  static constexpr int kM = MaxM, kN = 2 * Vector::kLanes, kZero = Nibbles::kZero;
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, Place at) {
    constexpr int kVector = 4 * Vector::kLanes;
    const int ahead = at.row == 0 ? call.ahead : 0;  // the first rows bring a panel for all others
    const Nibbles operand(call);
    Sums<Vector, M> even;
    Sums<Vector, two_sets(M, MaxM) ? M : 0> odd;
    for (int pair = 0; pair < call.group_count; ++pair) {
      if (ahead != 0) ask_for<2 * kVector>(w + ahead);
      const auto w0 = Vector::load(w), w1 = Vector::load(w + kVector);
      const uint8_t* codes = Rows::template group<M>(a, 2 * pair);
      const uint8_t* next = Rows::template group<M>(a, 2 * pair + 1);
      even.template add_group<Rows::kRow>(codes, operand(Vector::low(w0)),
                                          operand(Vector::low(w1)));
      const auto w2 = operand(Vector::high(w0)), w3 = operand(Vector::high(w1));
      if constexpr (two_sets(M, MaxM)) {
        odd.template add_group<Rows::kRow>(next, w2, w3);
      } else {
        even.template add_group<Rows::kRow>(next, w2, w3);
      }
      w += 2 * kVector;
    }
    if constexpr (two_sets(M, MaxM)) add_sums(even, odd);
    finish(call, even, at, kZero);
  }
};

template <class Vector, int MaxM, class Rows = Interleaved>
using VnniW4 = VnniNibbles<Vector, MaxM, PlainNibbles<Vector>, Rows>;
template <class Vector, int MaxM, class Rows = Interleaved>
using VnniT4 = VnniNibbles<Vector, MaxM, LevelNibbles<Vector>, Rows>;

}  // namespace
}  // namespace squat::kernels

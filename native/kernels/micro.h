// What the files with micro-kernels share: the call, and the loop over tiles with the write-back.
//
// Each of these files is compiled with the flags of its own ISA. Whatever it instantiates must
// therefore be local to it: a function with a common name, inline or a template, could be merged by
// the linker with its twin from another file and then run on a CPU that lacks the instructions.
// That is why everything here is in an unnamed namespace and nothing of the standard library is
// called.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#define SQUAT_INLINE inline __attribute__((always_inline))
#define SQUAT_LAMBDA __attribute__((always_inline))

namespace squat::kernels {

// One group of rows times a range of panels of one matrix.
struct MatmulCall {
  // Left: tiles of kernel.m rows (the last one may have fewer), each [groups][rows][k].
  const uint8_t* rows;
  size_t row_bytes;  // bytes of one row, in all groups together
  int row_count;
  const int32_t* order;  // token of each row
  const int32_t* sums;   // sum of each row's codes
  const float* steps;    // step of each row
  // Right: see PackedMatrix. `group_count` counts stored groups: pairs of groups for 4 bits.
  const uint8_t* panels;
  size_t panel_stride;
  const int8_t* levels;  // of t4
  int group_count;
  int columns;  // N
  int panel_begin, panel_end;
  int ahead;  // prefetch_distance()
  // N sums of the codes (of `levels` the levels) of a column if the rows hold a probability minus
  // 128, else nullptr.
  const int32_t* column_sums;
  Output out;
};

namespace {

// Count<3>::Type is Numbers<0, 1, 2>: one instance of a template for each.
template <int...>
struct Numbers {};
template <int N, int... Rest>
struct Count : Count<N - 1, N - 1, Rest...> {};
template <int... Rest>
struct Count<0, Rest...> {
  using Type = Numbers<Rest...>;
};

// unroll<N>(f) calls f(Constant<0>()) .. f(Constant<N - 1>()). Unlike in a loop, an index is a
// constant from the start, so that compilers keep arrays of vectors in registers.
template <int N>
struct Constant {
  constexpr operator int() const { return N; }
};
template <class Body, int... I>
SQUAT_INLINE void unroll([[maybe_unused]] Body body, Numbers<I...>) {
  (body(Constant<I>()), ...);
}
template <int N, class Body>
SQUAT_INLINE void unroll(Body body) {
  unroll(body, typename Count<N>::Type());
}

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a < b ? b : a; }

// Asks for the cache lines of so many bytes, to be in the first or the second level.
template <int Bytes, int Level = 1>
SQUAT_INLINE void ask_for(const uint8_t* from) {
  for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(from + line, 0, 4 - Level);
}

// Where the sums of a tile go: rows `row` .. of the call, `count` columns from `column` on.
struct Place {
  int row, column, count;
};

// One row of results from its sums `acc`, which are corrected by `offset` for the offset of the
// weights; probabilities are held as code - 128, which the sums of the columns correct. Modulo 2^32
// (kMaxTokens).
SQUAT_INLINE void write_exact(int32_t* __restrict to, const int32_t* __restrict acc, int32_t offset,
                              const int32_t* column_sums, bool add, int count) {
  const auto bits = [](int32_t x) { return static_cast<uint32_t>(x); };
  for (int i = 0; i < count; ++i) {
    const uint32_t sum = bits(acc[i]) - bits(offset);
    to[i] = static_cast<int32_t>(add ? bits(to[i]) + sum : sum);
  }
  if (column_sums == nullptr) return;
  for (int i = 0; i < count; ++i) {
    to[i] = static_cast<int32_t>(bits(to[i]) + 128 * bits(column_sums[i]));
  }
}

SQUAT_INLINE void write_scaled(float* __restrict to, const int32_t* __restrict acc, int32_t offset,
                               float row_step, const float* steps, const float* bias, bool add,
                               int count) {
  for (int i = 0; i < count; ++i) {
    float value = static_cast<float>(acc[i] - offset) * (row_step * steps[i]);
    if (bias != nullptr) value += bias[i];
    to[i] = add ? to[i] + value : value;
  }
}

// Writes a tile of `rows` x N sums that lie in memory.
template <int N>
SQUAT_INLINE void write_tile(const MatmulCall& call, const int32_t* acc, int rows, Place at,
                             int zero) {
  const Output& out = call.out;
  for (int i = 0; i < rows; ++i, acc += N) {
    const int row = at.row + i;
    const int32_t offset = zero * call.sums[row];
    const size_t start = static_cast<size_t>(call.order[row]) * out.stride + at.column;
    if (out.accumulators != nullptr) {
      const int32_t* sums = call.column_sums == nullptr ? nullptr : call.column_sums + at.column;
      write_exact(out.accumulators + start, acc, offset, sums, out.add, at.count);
    } else {
      const float* bias = out.bias == nullptr ? nullptr : out.bias + at.column;
      write_scaled(out.values + start, acc, offset, call.steps[row], out.steps + at.column, bias,
                   out.add, at.count);
    }
  }
}

// Makes of a Micro whose tile() leaves M x kN sums in memory one that writes them where they go.
template <class Micro>
struct InMemory : Micro {
  template <int M>
  static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w, Place at) {
    alignas(64) int32_t acc[M * Micro::kN];
    Micro::template tile<M>(call, a, w, acc);
    write_tile<Micro::kN>(call, acc, M, at, Micro::kZero);
  }
};

// Activations that a pass over the weights takes along: well within the second-level cache, and all
// of a prefill of 128 tokens with an inner dimension of 1024.
constexpr size_t kBlockBytes = 160 << 10;

// Runs a micro-kernel over all panels and tiles of a call. A Micro names its tile (kM, kN), the
// offset of its weights (kZero), and has
//   template <int M> static void tile(const MatmulCall& call, const uint8_t* a, const uint8_t* w,
//                                     Place at)
// for tiles of 1 .. kM rows. A panel stays in the first-level cache while a block of rows passes by
// it, and that block in the second-level cache while all panels do.
template <class Micro, int... Rows>
inline void for_each_tile(const MatmulCall& call, Numbers<Rows...>) {
  using Tile = void (*)(const MatmulCall&, const uint8_t*, const uint8_t*, Place);
  static constexpr Tile kTiles[] = {Micro::template tile<Rows + 1>...};
  const int tiles = static_cast<int>(kBlockBytes / (call.row_bytes * Micro::kM + 1));
  const int block = larger(1, tiles) * Micro::kM;
  for (int begin = 0; begin < call.row_count; begin += block) {
    const int end = smaller(begin + block, call.row_count);
    for (int panel = call.panel_begin; panel < call.panel_end; ++panel) {
      const uint8_t* w = call.panels + panel * call.panel_stride;
      const int column = panel * Micro::kN;
      const int count = smaller(Micro::kN, call.columns - column);
      int first = begin;
      for (; first + Micro::kM <= end; first += Micro::kM) {
        Micro::template tile<Micro::kM>(call, call.rows + first * call.row_bytes, w,
                                        {first, column, count});
      }
      if (first < end) {
        kTiles[end - first - 1](call, call.rows + first * call.row_bytes, w,
                                {first, column, count});
      }
    }
  }
}

template <class Micro>
inline void for_each_tile(const MatmulCall& call) {
  for_each_tile<Micro>(call, typename Count<Micro::kM>::Type());
}

}  // namespace
}  // namespace squat::kernels

// The functions of the table, declared for whoever defines or calls them.
namespace squat::kernels {
#define SQUAT_ISA(name, features, quantizer)                                              \
  void quantize_##quantizer(const float* x, int n, float inverse_step, int low, int high, \
                            int8_t* codes);
#define SQUAT_MATMUL(a, w, m, n, k, zero, form, isa) \
  void matmul_a##a##_##w##_##m##x##n##x##k##_##isa(const MatmulCall& call);
#include "kernels.inc"
#undef SQUAT_ISA
#undef SQUAT_MATMUL
}  // namespace squat::kernels

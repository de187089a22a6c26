// AMX: tiles of 32 tokens x 32 weight rows, as four matrix registers of 16 x 16 sums.
//
// The instruction multiplies 16 rows of 64 signed bytes with 16 columns of 64 unsigned ones.
// Columns are the groups of four codes in which AVX-512 with VNNI holds its weights: this ISA holds
// them alike, and leaves few tokens, which wait for memory, to those kernels. Rows are 64 codes
// side by side (ActivationForm::kBlocks). Nibbles are made into bytes once for a block of tokens.
#include "matrix_registers.h"
#include "zmm.h"

namespace squat::kernels {
namespace {

constexpr int kFew = 12;  // no more rows than that are not worth it
constexpr int kTileRows = 2 * kRows, kColumns = 2 * Zmm::kLanes, kGroup = 4 * kColumns;

// So many groups of a panel, as bytes, stay in the first-level cache while rows of a block pass by.
constexpr int kStretch = 192;
constexpr int kBlockRows = 8 * kTileRows;

// Makes bytes of `groups` groups of a panel, in `buffer` or where they are, and asks for those that
// come some way behind them. What is missing up to a whole block of 64 codes may be anything, since
// rows are zero there.
struct FromBytes {
  static constexpr int kZero = 128;
  static constexpr int kStored = 1;  // groups that are stored in the place of one
  const int ahead;
  SQUAT_INLINE explicit FromBytes(const MatmulCall& call) : ahead(call.ahead) {}
  SQUAT_INLINE const uint8_t* operator()(const uint8_t* from, int groups, uint8_t* buffer) const {
    for (int i = 0; i < groups; ++i) ask_for<kGroup, 2>(from + ahead + i * kGroup);
    if (groups % kRows == 0) return from;
    for (int i = 0; i < groups * kGroup; i += kBytes) Zmm::write(buffer + i, Zmm::load(from + i));
    return buffer;
  }
};

template <class Nibbles>
struct FromNibbles {
  static constexpr int kZero = Nibbles::kZero;
  static constexpr int kStored = 2;
  const Nibbles operand;
  const int ahead;
  SQUAT_INLINE explicit FromNibbles(const MatmulCall& call) : operand(call), ahead(call.ahead) {}
  SQUAT_INLINE const uint8_t* operator()(const uint8_t* from, int groups, uint8_t* buffer) const {
    uint8_t* to = buffer;
    for (int pair = 0; pair < groups / 2; ++pair, from += kGroup, to += 2 * kGroup) {
      ask_for<kGroup, 2>(from + ahead);
      for (int i = 0; i < kGroup; i += kBytes) {
        const __m512i nibbles = Zmm::load(from + i);
        Zmm::write(to + i, operand(Zmm::low(nibbles)));
        Zmm::write(to + kGroup + i, operand(Zmm::high(nibbles)));
      }
    }
    return buffer;
  }
};

// Products of a tile of `rows` rows, in two registers or four, with `blocks` times 64 codes of the
// weights; with `add` what is in `sums` is added to. Rows that a register has and the tile has not
// are read from what lies behind, and nobody looks at their sums.
template <bool kBoth>
SQUAT_INLINE void multiply(const uint8_t* a, int rows, const uint8_t* w, int blocks, bool add,
                           int32_t* sums) {
  constexpr int kStride = kColumns * sizeof(int32_t);
  int32_t* below = sums + kRows * kColumns;
  if (add) {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kRows, kStride);
    if (kBoth) _tile_loadd(2, below, kStride);
    if (kBoth) _tile_loadd(3, below + kRows, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kBoth) _tile_zero(2);
    if (kBoth) _tile_zero(3);
  }
  for (int block = 0; block < blocks; ++block, a += rows * kBytes, w += kRows * kGroup) {
    _tile_loadd(4, a, kBytes);
    _tile_loadd(6, w, kGroup);
    _tile_loadd(7, w + kBytes, kGroup);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (kBoth) {
      _tile_loadd(5, a + kRows * kBytes, kBytes);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kRows, kStride);
  if (kBoth) _tile_stored(2, below, kStride);
  if (kBoth) _tile_stored(3, below + kRows, kStride);
}

// Writes the sums of `rows` rows where they go.
SQUAT_INLINE void finish_rows(const MatmulCall& call, const int32_t* sums, int rows, Place at,
                              int zero) {
  if (at.count < kColumns) return write_tile<kColumns>(call, sums, rows, at, zero);
  const auto each = [&](auto write) SQUAT_LAMBDA {
    for (int i = 0; i < rows; ++i, sums += kColumns) {
      write(Zmm::load(sums), Zmm::load(sums + Zmm::kLanes), at.row + i);
    }
  };
  if (call.out.accumulators != nullptr) {
    each([&](__m512i left, __m512i right, int row)
             SQUAT_LAMBDA { write_exact_row<Zmm>(call, left, right, row, at.column, zero); });
  } else {
    const float* from = call.out.steps + at.column;
    const __m512 steps[2] = {Zmm::load(from), Zmm::load(from + Zmm::kLanes)};
    each([&](__m512i left, __m512i right, int row) SQUAT_LAMBDA {
      write_scaled_row<Zmm>(call, steps, left, right, row, at.column, zero);
    });
  }
}

template <class Weights>
inline void run(const MatmulCall& call, void (*few)(const MatmulCall& call)) {
  if (call.row_count <= kFew) return few(call);

  alignas(64) uint8_t bytes[kStretch * kGroup];
  alignas(64) int32_t sums[kBlockRows * kColumns];
  const Weights as_bytes(call);
  const int groups = call.group_count * Weights::kStored;
  _tile_loadconfig(&kMatrixRegisters);
  for (int begin = 0; begin < call.row_count; begin += kBlockRows) {
    const int end = smaller(begin + kBlockRows, call.row_count);
    for (int panel = call.panel_begin; panel < call.panel_end; ++panel) {
      const uint8_t* stored = call.panels + panel * call.panel_stride;
      const int column = panel * kColumns, columns = smaller(kColumns, call.columns - column);
      for (int group = 0; group < groups; group += kStretch) {
        const int count = smaller(kStretch, groups - group);
        const uint8_t* w = as_bytes(stored, count, bytes);
        stored += count / Weights::kStored * kGroup;
        const int blocks = (count + kRows - 1) / kRows;
        for (int first = begin; first < end; first += kTileRows) {
          const int rows = smaller(kTileRows, end - first);
          const uint8_t* a = call.rows + first * call.row_bytes + rows * group * 4;
          int32_t* to = groups <= kStretch ? sums : sums + (first - begin) * kColumns;
          if (rows > kRows) {
            multiply<true>(a, rows, w, blocks, group > 0, to);
          } else {
            multiply<false>(a, rows, w, blocks, group > 0, to);
          }
          if (group + count == groups) {
            finish_rows(call, to, rows, {first, column, columns}, Weights::kZero);
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

void matmul_a8_w8_32x32x4_amx(const MatmulCall& call) {
  run<FromBytes>(call, matmul_a8_w8_12x32x4_avx512vnni);
}

void matmul_a8_w4_32x32x4_amx(const MatmulCall& call) {
  run<FromNibbles<PlainNibbles<Zmm>>>(call, matmul_a8_w4_12x32x4_avx512vnni);
}

void matmul_a8_t4_32x32x4_amx(const MatmulCall& call) {
  run<FromNibbles<LevelNibbles<Zmm>>>(call, matmul_a8_t4_12x32x4_avx512vnni);
}

}  // namespace squat::kernels

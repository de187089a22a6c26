// The eight matrix registers of AMX, all of 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace squat::kernels {
namespace {

constexpr int kRows = 16, kBytes = 64;

struct MatrixRegisters {
  uint8_t palette = 1;
  uint8_t unused[15] = {};
  uint16_t bytes[16] = {kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
// A constant: GCC's _tile_loadconfig does not tell that it reads more than the first bytes, and
// what is written to a variable may come too late.
constexpr MatrixRegisters kMatrixRegisters;

}  // namespace
}  // namespace squat::kernels

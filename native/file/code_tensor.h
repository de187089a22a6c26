// A matrix of integer codes with a step for each row, as it stands in a file: Q4_0, IQ4_NL or Q8_0
// blocks, all of a row with the same scale, or, where the inner size is no multiple of 32, the
// tensors NAME.q4, NAME.iq4_nl or NAME.q8 and NAME.step (docs/format.md, "Tensors").
#pragma once

#include <cstdint>
#include <string>

#include "base/mapped_file.h"
#include "gguf.h"

namespace squat {

class CodeTensor {
 public:
  // Files of version 1 have one step for all rows.
  enum class Steps { kByRow, kOne };

  // Throws Error if there is no such tensor, its shape is not [rows, inner], or a step of NAME.step
  // is none.
  CodeTensor(const Gguf& file, const std::string& name, uint64_t rows, uint64_t inner, Steps steps);

  int bits() const { return bits_; }
  // What 4-bit codes mean: code i stands for level i + 8 of sixteen; nullptr: for itself.
  const int8_t* levels() const { return levels_; }
  int rows() const { return rows_; }
  int inner() const { return inner_; }
  const uint8_t* data() const { return tensor_->data; }
  size_t size() const { return tensor_->size; }

  // The row's first block whose scale is no step, or not the row's; -1 if there is none.
  int bad_block(int row) const;
  // Throws Error about such a block.
  [[noreturn]] void refuse(int row, int block) const;
  // Throws Error if any row has one.
  void check_scales() const;

  // Of a row without bad blocks: its step, and its `inner` codes.
  float step(int row) const;
  void unpack(int row, int8_t* codes) const;

 private:
  const uint8_t* block(int row, int index) const;
  // fp16, that the blocks of a row have.
  uint16_t scale(int row) const;
  // Of the row that has the step of this one.
  size_t step_index(int row) const { return one_step_ ? 0 : static_cast<size_t>(row); }

  const GgufTensor* tensor_;
  const uint8_t* steps_ = nullptr;  // float32, of a tensor without blocks
  std::string name_;                // "FILE: tensor 'NAME'", for messages
  int bits_;
  const int8_t* levels_ = nullptr;
  int rows_;
  int inner_;
  size_t row_bytes_;
  bool one_step_;
};

// The values that docs/format.md allows for a step: exact in fp16, from 2^-14 up.
bool is_step(float value);

}  // namespace squat

// A matrix of integer codes with one step, as it stands in a file: Q4_0 or Q8_0 blocks that all
// carry the same scale, or, where the inner size is no multiple of 32, the tensors NAME.q4 or
// NAME.q8 and NAME.step (docs/format.md, "Tensors").
#pragma once

#include <cstdint>
#include <string>

#include "base/mapped_file.h"
#include "gguf.h"

namespace squat {

class CodeTensor {
 public:
  // Throws Error if there is no such tensor, its shape is not [rows, inner], or its step is none.
  CodeTensor(const Gguf& file, const std::string& name, uint64_t rows, uint64_t inner);

  int bits() const { return bits_; }
  int rows() const { return rows_; }
  int inner() const { return inner_; }
  float step() const { return step_; }
  const uint8_t* data() const { return tensor_->data; }
  size_t size() const { return tensor_->size; }

  // Writes the `inner` codes of a row. Returns the index of the row's first block whose scale is
  // not the tensor's, or -1 if there is none.
  int unpack(int row, int8_t* codes) const;

  // The same check for all rows, without the codes.
  [[noreturn]] void refuse(int row, int block) const;
  void check_scales() const;

 private:
  const GgufTensor* tensor_;
  std::string name_;  // "FILE: tensor 'NAME'", for messages
  int bits_;
  int rows_;
  int inner_;
  size_t row_bytes_;
  bool blocks_;
  uint16_t scale_ = 0;  // fp16, of every block
  float step_;
};

// The values that docs/format.md allows for a step: exact in fp16, from 2^-14 up.
bool is_step(float value);

}  // namespace squat

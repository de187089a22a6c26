#include "code_tensor.h"

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace squat {

namespace {

constexpr int kBlock = 32;

constexpr int8_t kIq4NlLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};

// An fp16 scale and 32 codes.
constexpr size_t block_bytes(int bits) { return bits == 4 ? 18 : 34; }

// An fp16 number that is positive, finite and normal; 0 for any other.
float half_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10;  // a sign bit makes it too large
  if (exponent == 0 || exponent >= 31) return 0;
  const uint32_t bits = (exponent + 127 - 15) << 23 | static_cast<uint32_t>(half & 0x3ff) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t load_scale(const uint8_t* block) {
  uint16_t scale;
  std::memcpy(&scale, block, sizeof scale);
  return scale;
}

// Names the dimension that is wrong.
void check_shape(const GgufTensor& tensor, const std::string& name, uint64_t ne0, uint64_t ne1) {
  if (tensor.rank != 2 || tensor.ne[0] != ne0 || tensor.ne[1] != ne1) {
    std::string shape;
    for (int d = 0; d < tensor.rank; d++) {
      shape += (d == 0 ? "" : " x ") + std::to_string(tensor.ne[d]);
    }
    throw Error(SQUAT_ERROR_FORMAT, name + " has shape " + shape + ", but the metadata ask for " +
                                        std::to_string(ne0) + " x " + std::to_string(ne1));
  }
}

}  // namespace

bool is_step(float value) {
  if (!(value >= 0x1p-14f && value <= 65504.0f)) return false;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x1fff) == 0;  // no more than fp16's ten bits of fraction
}

CodeTensor::CodeTensor(const Gguf& file, const std::string& name, uint64_t rows, uint64_t inner,
                       Steps steps)
    : tensor_(file.find_tensor(name)),
      name_(file.name() + ": tensor '" + name + "'"),
      rows_(static_cast<int>(rows)),
      inner_(static_cast<int>(inner)),
      one_step_(steps == Steps::kOne) {
  if (tensor_ != nullptr) {
    const TensorType type = tensor_->type;
    if (type == TensorType::kIq4Nl) levels_ = kIq4NlLevels;
    if (levels_ == nullptr && type != TensorType::kQ4_0 && type != TensorType::kQ8_0) {
      throw Error(SQUAT_ERROR_FORMAT, name_ + " has type " + tensor_type_name(type) +
                                          ", expected Q4_0, Q8_0 or IQ4_NL");
    }
    check_shape(*tensor_, name_, inner, rows);
    bits_ = type == TensorType::kQ8_0 ? 8 : 4;
    row_bytes_ = inner / kBlock * block_bytes(bits_);
    return;
  }
  std::string suffix = ".q8";
  for (const char* narrow : {".q4", ".iq4_nl"}) {
    if (file.find_tensor(name + narrow) != nullptr) suffix = narrow;
  }
  tensor_ = file.find_tensor(name + suffix);
  const GgufTensor* step = file.find_tensor(name + ".step");
  if (tensor_ == nullptr || step == nullptr) {
    throw Error(SQUAT_ERROR_FORMAT,
                name_ + " is missing; export the model again with `squat export`");
  }
  bits_ = suffix == ".q8" ? 8 : 4;
  if (suffix == ".iq4_nl") levels_ = kIq4NlLevels;
  const std::string of_step = file.name() + ": tensor '" + name + ".step'";
  name_ = file.name() + ": tensor '" + name + suffix + "'";
  if (tensor_->type != TensorType::kI8) {
    throw Error(SQUAT_ERROR_FORMAT,
                name_ + " has type " + tensor_type_name(tensor_->type) + ", expected I8");
  }
  row_bytes_ = bits_ == 4 ? (inner + 1) / 2 : inner;
  check_shape(*tensor_, name_, row_bytes_, rows);
  const uint64_t count = one_step_ ? 1 : rows;
  if (step->type != TensorType::kF32 || step->rank != 1 || step->ne[0] != count) {
    throw Error(SQUAT_ERROR_FORMAT,
                of_step + " has type " + tensor_type_name(step->type) + ", rank " +
                    std::to_string(step->rank) + " and " + std::to_string(step->ne[0]) +
                    " elements a row, expected F32, rank 1 and " + std::to_string(count));
  }
  steps_ = step->data;
  for (uint64_t row = 0; row < count; row++) {
    const float value = this->step(static_cast<int>(row));
    if (!is_step(value)) {
      throw Error(SQUAT_ERROR_FORMAT, of_step + " element " + std::to_string(row) + " is " +
                                          std::to_string(value) +
                                          ", which is not an fp16 number of at least 2^-14");
    }
  }
}

const uint8_t* CodeTensor::block(int row, int index) const {
  return tensor_->data + static_cast<size_t>(row) * row_bytes_ +
         static_cast<size_t>(index) * block_bytes(bits_);
}

uint16_t CodeTensor::scale(int row) const {
  return load_scale(block(static_cast<int>(step_index(row)), 0));
}

int CodeTensor::bad_block(int row) const {
  if (steps_ != nullptr) return -1;
  const uint16_t expected = scale(row);
  if (half_to_float(expected) == 0) return 0;
  const int blocks = inner_ / kBlock;
  const size_t bytes = block_bytes(bits_);
  const uint8_t* at = block(row, 0);
  for (int i = 0; i < blocks; i++, at += bytes) {
    if (load_scale(at) != expected) return i;
  }
  return -1;
}

void CodeTensor::refuse(int row, int index) const {
  const std::string where =
      name_ + " row " + std::to_string(row) + " block " + std::to_string(index);
  const uint16_t found = load_scale(block(row, index));
  if (half_to_float(found) == 0) {
    throw Error(SQUAT_ERROR_FORMAT, where + " has an fp16 scale with the bits " +
                                        std::to_string(found) +
                                        ", which is no step: not normal and positive");
  }
  throw Error(SQUAT_ERROR_FORMAT,
              where + " has another scale than the " + (one_step_ ? "tensor" : "row") +
                  "'s first: all of its blocks share one step; export the model with "
                  "`squat export`, not with another program");
}

void CodeTensor::check_scales() const {
  for (int row = 0; row < rows_; row++) {
    if (const int index = bad_block(row); index >= 0) refuse(row, index);
  }
}

float CodeTensor::step(int row) const {
  if (steps_ == nullptr) return half_to_float(scale(row));
  float step;
  std::memcpy(&step, steps_ + step_index(row) * sizeof step, sizeof step);
  return step;
}

void CodeTensor::unpack(int row, int8_t* codes) const {
  if (steps_ != nullptr) {
    const uint8_t* at = block(row, 0);
    if (bits_ == 8) {
      std::memcpy(codes, at, row_bytes_);
      return;
    }
    for (int k = 0; k < inner_; k++) {
      codes[k] = static_cast<int8_t>((k % 2 == 0 ? at[k / 2] & 15 : at[k / 2] >> 4) - 8);
    }
    return;
  }
  const int blocks = inner_ / kBlock;
  const size_t bytes = block_bytes(bits_);
  const uint8_t* at = block(row, 0) + sizeof(uint16_t);
  for (int i = 0; i < blocks; i++, at += bytes, codes += kBlock) {
    if (bits_ == 8) {
      std::memcpy(codes, at, kBlock);
    } else {
      // Low nibbles hold the first half of the block, high nibbles the second. By way of arrays
      // that nothing else can point to: compilers make vectors of that.
      uint8_t pairs[kBlock / 2];
      int8_t out[kBlock];
      std::memcpy(pairs, at, sizeof pairs);
      for (int k = 0; k < kBlock / 2; k++) out[k] = static_cast<int8_t>((pairs[k] & 15) - 8);
      for (int k = 0; k < kBlock / 2; k++) {
        out[k + kBlock / 2] = static_cast<int8_t>((pairs[k] >> 4) - 8);
      }
      std::memcpy(codes, out, sizeof out);
    }
  }
}

}  // namespace squat

#include "code_tensor.h"

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace squat {

namespace {

constexpr int kBlock = 32;
constexpr size_t kQ4Bytes = 18, kQ8Bytes = 34;  // an fp16 scale and 32 codes

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

CodeTensor::CodeTensor(const Gguf& file, const std::string& name, uint64_t rows, uint64_t inner)
    : tensor_(file.find_tensor(name)),
      name_(file.name() + ": tensor '" + name + "'"),
      rows_(static_cast<int>(rows)),
      inner_(static_cast<int>(inner)) {
  blocks_ = tensor_ != nullptr;
  if (blocks_) {
    if (tensor_->type != TensorType::kQ4_0 && tensor_->type != TensorType::kQ8_0) {
      throw Error(SQUAT_ERROR_FORMAT, name_ + " has type " + tensor_type_name(tensor_->type) +
                                          ", expected Q4_0 or Q8_0");
    }
    check_shape(*tensor_, name_, inner, rows);
    bits_ = tensor_->type == TensorType::kQ4_0 ? 4 : 8;
    row_bytes_ = inner / kBlock * (bits_ == 4 ? kQ4Bytes : kQ8Bytes);
    scale_ = load_scale(tensor_->data);
    step_ = half_to_float(scale_);
    if (step_ == 0) {
      throw Error(SQUAT_ERROR_FORMAT, name_ + " block 0 has an fp16 scale with the bits " +
                                          std::to_string(scale_) +
                                          ", which is no step: not normal and positive");
    }
    return;
  }
  const GgufTensor* narrow = file.find_tensor(name + ".q4");
  tensor_ = narrow != nullptr ? narrow : file.find_tensor(name + ".q8");
  const GgufTensor* step = file.find_tensor(name + ".step");
  if (tensor_ == nullptr || step == nullptr) {
    throw Error(SQUAT_ERROR_FORMAT,
                name_ + " is missing; export the model again with `squat export`");
  }
  bits_ = narrow != nullptr ? 4 : 8;
  name_ += bits_ == 4 ? ".q4" : ".q8";
  if (tensor_->type != TensorType::kI8 || step->type != TensorType::kF32 ||
      step->size != sizeof(float)) {
    throw Error(SQUAT_ERROR_FORMAT, name_ + " and its step have types " +
                                        tensor_type_name(tensor_->type) + " and " +
                                        tensor_type_name(step->type) + ", expected I8 and one F32");
  }
  row_bytes_ = bits_ == 4 ? (inner + 1) / 2 : inner;
  check_shape(*tensor_, name_, row_bytes_, rows);
  std::memcpy(&step_, step->data, sizeof step_);
  if (!is_step(step_)) {
    throw Error(SQUAT_ERROR_FORMAT, name_ + " has the step " + std::to_string(step_) +
                                        ", which is not an fp16 number of at least 2^-14");
  }
}

int CodeTensor::unpack(int row, int8_t* codes) const {
  const uint8_t* at = tensor_->data + static_cast<size_t>(row) * row_bytes_;
  if (!blocks_) {
    if (bits_ == 8) {
      std::memcpy(codes, at, row_bytes_);
    } else {
      for (int k = 0; k < inner_; k++) {
        codes[k] = static_cast<int8_t>((k % 2 == 0 ? at[k / 2] & 15 : at[k / 2] >> 4) - 8);
      }
    }
    return -1;
  }
  const int blocks = inner_ / kBlock;
  for (int block = 0; block < blocks; block++, codes += kBlock) {
    if (load_scale(at) != scale_) return block;
    at += sizeof scale_;
    if (bits_ == 8) {
      std::memcpy(codes, at, kBlock);
      at += kBlock;
    } else {
      // Low nibbles hold the first half of the block, high nibbles the second.
      for (int k = 0; k < kBlock / 2; k++) {
        codes[k] = static_cast<int8_t>((at[k] & 15) - 8);
        codes[k + kBlock / 2] = static_cast<int8_t>((at[k] >> 4) - 8);
      }
      at += kBlock / 2;
    }
  }
  return -1;
}

void CodeTensor::refuse(int row, int block) const {
  const int blocks = inner_ / kBlock;
  throw Error(SQUAT_ERROR_FORMAT,
              name_ + " block " + std::to_string(static_cast<int64_t>(row) * blocks + block) +
                  " has another scale than block 0: a Squat tensor has one step; export the model "
                  "with `squat export`, not with another program");
}

void CodeTensor::check_scales() const {
  if (!blocks_) return;
  const size_t block_bytes = bits_ == 4 ? kQ4Bytes : kQ8Bytes;
  const size_t blocks = tensor_->size / block_bytes;
  for (size_t block = 0; block < blocks; block++) {
    if (load_scale(tensor_->data + block * block_bytes) != scale_) {
      const size_t per_row = static_cast<size_t>(inner_ / kBlock);
      refuse(static_cast<int>(block / per_row), static_cast<int>(block % per_row));
    }
  }
}

}  // namespace squat

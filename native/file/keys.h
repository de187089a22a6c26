// What stands in a file, checked as it is read; an Error names the key or tensor and its value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "gguf.h"

namespace squat {

class Keys {
 public:
  // `file` must outlive the object.
  explicit Keys(const Gguf& file) : file_(file) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(SQUAT_ERROR_FORMAT, file_.name() + ": " + what);
  }

  int bounded(const std::string& name, uint32_t least, uint32_t most) const {
    return bounded(name, file_.u32(name), least, most);
  }

  // A factor or a base: positive and finite.
  float positive(const std::string& name) const {
    const float value = file_.f32(name);
    if (!(value > 0) || !std::isfinite(value)) {
      fail("key '" + name + "' is " + std::to_string(value) + ", not a positive number");
    }
    return value;
  }
  float positive(const std::string& name, float otherwise) const {
    return file_.has(name) ? positive(name) : otherwise;
  }

  // An array of `count` numbers.
  std::vector<int> bounded_array(const std::string& name, int count, uint32_t most) const {
    std::vector<int> numbers;
    for (const uint32_t value : file_.u32_array(name)) {
      numbers.push_back(
          bounded(name + "' element '" + std::to_string(numbers.size()), value, 0, most));
    }
    if (numbers.size() != static_cast<size_t>(count)) {
      fail("key '" + name + "' has " + std::to_string(numbers.size()) + " elements, expected " +
           std::to_string(count));
    }
    return numbers;
  }

  // A vector of `count` float32 numbers,
  std::vector<float> floats(const std::string& name, uint64_t count) const {
    return floats(name, std::vector<uint64_t>{count});
  }
  // or a matrix of them, of which a row has ne[0].
  std::vector<float> floats(const std::string& name, const std::vector<uint64_t>& ne) const {
    const GgufTensor* tensor = file_.find_tensor(name);
    if (tensor == nullptr) fail("tensor '" + name + "' is missing");
    const auto shape = [](const uint64_t* sizes, size_t rank) {
      std::string text;
      for (size_t i = 0; i < rank; i++) text += (i > 0 ? " x " : "") + std::to_string(sizes[i]);
      return text;
    };
    const size_t rank = static_cast<size_t>(tensor->rank);
    if (tensor->type != TensorType::kF32 || rank != ne.size() ||
        !std::equal(ne.begin(), ne.end(), tensor->ne)) {
      fail("tensor '" + name + "' has type " + tensor_type_name(tensor->type) + " and shape " +
           shape(tensor->ne, rank) + ", expected F32 and " + shape(ne.data(), ne.size()));
    }
    std::vector<float> values(tensor->size / sizeof(float));
    std::memcpy(values.data(), tensor->data, tensor->size);
    return values;
  }

 private:
  int bounded(const std::string& name, uint32_t value, uint32_t least, uint32_t most) const {
    if (value < least || value > most) {
      fail("key '" + name + "' is " + std::to_string(value) + ", not from " +
           std::to_string(least) + " to " + std::to_string(most));
    }
    return static_cast<int>(value);
  }

  const Gguf& file_;
};

}  // namespace squat

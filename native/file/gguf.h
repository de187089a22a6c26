// A reader of GGUF version 3 files that does not trust them.
//
// Every count, size and offset in the file is compared with the bytes that remain before it is
// used, in arithmetic that cannot overflow; types are compared before a value is read; nothing is
// checked by assert. After the constructor returns, every key and every tensor lies inside the file
// and the accessors cannot read outside it. A file is refused with an Error that names the file,
// the field and its value. The reader never copies tensor data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace squat {

// Types of metadata values; the numbers are those of the file format.
enum class GgufType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// Types of tensors that a Squat file may hold; the numbers are those of the file format.
enum class TensorType : uint32_t { kF32 = 0, kQ4_0 = 2, kQ8_0 = 8, kIq4Nl = 20, kI8 = 24 };

const char* tensor_type_name(TensorType type);

struct GgufTensor {
  std::string_view name;
  TensorType type = TensorType::kF32;
  int rank = 0;
  uint64_t ne[4] = {1, 1, 1, 1};  // ne[0] is the innermost (contiguous) dimension
  const uint8_t* data = nullptr;
  size_t size = 0;  // bytes
};

class Gguf {
 public:
  // `data` must outlive the object; `name` stands in error messages. Throws Error.
  Gguf(const uint8_t* data, size_t size, std::string name);

  const std::string& name() const { return name_; }

  // Each throws Error when the key is missing or has another type.
  uint32_t u32(std::string_view key) const;
  float f32(std::string_view key) const;
  bool boolean(std::string_view key) const;
  std::string_view string(std::string_view key) const;
  std::vector<double> f64_array(std::string_view key) const;
  std::vector<float> f32_array(std::string_view key) const;
  std::vector<uint32_t> u32_array(std::string_view key) const;
  std::vector<int32_t> i32_array(std::string_view key) const;
  std::vector<std::string_view> string_array(std::string_view key) const;
  bool has(std::string_view key) const { return values_.count(key) != 0; }
  // In no order.
  std::vector<std::string_view> keys() const;

  // Null when there is no such tensor.
  const GgufTensor* find_tensor(std::string_view name) const;
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

 private:
  struct Value {
    GgufType type;
    GgufType element;     // of an array
    uint64_t count;       // of an array
    const uint8_t* data;  // the value; of a string its length field; of an array its first element
  };

  const Value& value(std::string_view key, GgufType type) const;
  const Value& array(std::string_view key, GgufType element) const;
  template <class Number>
  std::vector<Number> numbers(std::string_view key, GgufType type) const;

  std::string name_;
  std::unordered_map<std::string_view, Value> values_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;
};

}  // namespace squat

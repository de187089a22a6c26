#include "gguf.h"

#include <cstring>

#include "base/error.h"

namespace squat {

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF files are read in place");

constexpr uint32_t kVersion = 3;
constexpr uint32_t kDefaultAlignment = 32;
constexpr uint32_t kMaxAlignment = 1 << 16;
constexpr uint64_t kMaxKeyLength = 256;
constexpr uint64_t kMaxTensorName = 63;  // ggml's own limit
constexpr uint32_t kMaxRank = 4;

const char* type_name(GgufType type) {
  static const char* const names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                      "bool", "string", "array", "u64", "i64", "f64"};
  return names[static_cast<uint32_t>(type)];
}

// Bytes of a value of fixed size; 0 for strings and arrays.
uint64_t fixed_size(GgufType type) {
  static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return sizes[static_cast<uint32_t>(type)];
}

struct BlockShape {
  uint64_t elements;
  uint64_t bytes;
};

BlockShape block_shape(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return {1, 4};
    case TensorType::kQ4_0:
    case TensorType::kIq4Nl:
      return {32, 18};
    case TensorType::kQ8_0:
      return {32, 34};
    case TensorType::kI8:
      return {1, 1};
  }
  return {1, 1};
}

template <typename T>
T load(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

// Quotes text from the file for a message: bounded, printable.
std::string quote(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, 64)) out += (c >= 0x20 && c < 0x7f) ? c : '?';
  return out + (text.size() > 64 ? "...'" : "'");
}

// Walks the file; every step is checked against the bytes that remain.
class Cursor {
 public:
  Cursor(const uint8_t* data, size_t size, const std::string& name)
      : begin_(data), size_(size), name_(name) {}

  uint64_t remaining() const { return size_ - offset_; }
  uint64_t offset() const { return offset_; }
  const uint8_t* here() const { return begin_ + offset_; }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(SQUAT_ERROR_FORMAT, name_ + ": " + what);
  }

  const uint8_t* take(uint64_t bytes, const std::string& field) {
    if (bytes > remaining()) {
      fail(field + " needs " + std::to_string(bytes) + " bytes at offset " +
           std::to_string(offset_) + ", but only " + std::to_string(remaining()) +
           " remain: the file is cut short or damaged");
    }
    const uint8_t* at = here();
    offset_ += bytes;
    return at;
  }

  template <typename T>
  T number(const std::string& field) {
    return load<T>(take(sizeof(T), field));
  }

  std::string_view string(uint64_t limit, const std::string& field) {
    const uint64_t length = number<uint64_t>(field + " length");
    if (length > limit) {
      fail(field + " length is " + std::to_string(length) + ", more than the limit of " +
           std::to_string(limit));
    }
    return {reinterpret_cast<const char*>(take(length, field)), static_cast<size_t>(length)};
  }

  GgufType type(const std::string& field) {
    const uint32_t type = number<uint32_t>(field);
    if (type > static_cast<uint32_t>(GgufType::kF64)) {
      fail(field + " is " + std::to_string(type) + ", which GGUF version 3 does not define");
    }
    return static_cast<GgufType>(type);
  }

  // A count of things that take at least `least` bytes each.
  uint64_t count(uint64_t least, const std::string& field) {
    const uint64_t count = number<uint64_t>(field);
    if (count > remaining() / least) {
      fail(field + " is " + std::to_string(count) + ", more than the " +
           std::to_string(remaining()) + " remaining bytes can hold");
    }
    return count;
  }

  // Steps over a value that is no array.
  void skip_scalar(GgufType type, const std::string& field) {
    if (type == GgufType::kString) {
      string(UINT64_MAX, field);
    } else if (type == GgufType::kBool) {
      if (const uint8_t byte = number<uint8_t>(field); byte > 1) {
        fail(field + " is " + std::to_string(byte) + ", but a bool is 0 or 1");
      }
    } else {
      take(fixed_size(type), field);
    }
  }

 private:
  const uint8_t* begin_;
  uint64_t size_;
  uint64_t offset_ = 0;
  const std::string& name_;
};

GgufTensor read_tensor_info(Cursor& cursor, uint64_t* offset) {
  GgufTensor tensor;
  tensor.name = cursor.string(kMaxTensorName, "tensor name");
  const std::string field = "tensor " + quote(tensor.name);
  const uint32_t rank = cursor.number<uint32_t>(field + " rank");
  if (rank == 0 || rank > kMaxRank) {
    cursor.fail(field + " rank is " + std::to_string(rank) + ", not 1 to 4");
  }
  tensor.rank = static_cast<int>(rank);
  uint64_t elements = 1;
  for (uint32_t d = 0; d < rank; d++) {
    tensor.ne[d] = cursor.number<uint64_t>(field + " dimension");
    if (tensor.ne[d] == 0 || __builtin_mul_overflow(elements, tensor.ne[d], &elements) ||
        elements > static_cast<uint64_t>(INT64_MAX)) {
      cursor.fail(field + " dimension " + std::to_string(d) + " is " +
                  std::to_string(tensor.ne[d]) + ": no tensor has that many elements");
    }
  }
  const uint32_t type = cursor.number<uint32_t>(field + " type");
  tensor.type = static_cast<TensorType>(type);
  switch (tensor.type) {
    case TensorType::kF32:
    case TensorType::kQ4_0:
    case TensorType::kQ8_0:
    case TensorType::kIq4Nl:
    case TensorType::kI8:
      break;
    default:
      cursor.fail(
          field + " type is " + std::to_string(type) +
          ", but a Squat file has only F32 (0), Q4_0 (2), Q8_0 (8), IQ4_NL (20) and I8 (24)");
  }
  const BlockShape block = block_shape(tensor.type);
  if (tensor.ne[0] % block.elements != 0) {
    cursor.fail(field + " has rows of " + std::to_string(tensor.ne[0]) + " elements, which " +
                tensor_type_name(tensor.type) + " blocks of 32 do not divide");
  }
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(elements / block.elements, block.bytes, &bytes)) {
    cursor.fail(field + " needs more bytes than a file can have");
  }
  tensor.size = bytes;
  *offset = cursor.number<uint64_t>(field + " offset");
  return tensor;
}

}  // namespace

const char* tensor_type_name(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return "F32";
    case TensorType::kQ4_0:
      return "Q4_0";
    case TensorType::kQ8_0:
      return "Q8_0";
    case TensorType::kIq4Nl:
      return "IQ4_NL";
    case TensorType::kI8:
      return "I8";
  }
  return "?";
}

Gguf::Gguf(const uint8_t* data, size_t size, std::string name) : name_(std::move(name)) {
  Cursor cursor(data, size, name_);
  if (size < 4 || std::memcmp(cursor.take(4, "magic"), "GGUF", 4) != 0) {
    cursor.fail("is not a GGUF file: it does not begin with the bytes GGUF");
  }
  const uint32_t version = cursor.number<uint32_t>("version");
  if (version != kVersion) {
    cursor.fail("GGUF version is " + std::to_string(version) + ", but only little-endian version " +
                std::to_string(kVersion) + " is read");
  }
  // The smallest tensor entry: name length, rank, one dimension, type, offset.
  const uint64_t tensor_count = cursor.count(8 + 4 + 8 + 4 + 8, "tensor count");
  // The smallest key: its length, a type and a byte.
  const uint64_t key_count = cursor.count(8 + 4 + 1, "key count");

  values_.reserve(key_count);
  for (uint64_t i = 0; i < key_count; i++) {
    const std::string_view key = cursor.string(kMaxKeyLength, "key");
    const std::string field = "key " + quote(key);
    Value value = {cursor.type(field + " type"), GgufType::kU8, 0, nullptr};
    if (value.type == GgufType::kArray) {
      value.element = cursor.type(field + " element type");
      if (value.element == GgufType::kArray) cursor.fail(field + " is an array of arrays");
      const bool strings = value.element == GgufType::kString;
      const uint64_t least = strings ? 8 : fixed_size(value.element);
      value.count = cursor.count(least, field + " element count");
      value.data = cursor.here();
      if (strings || value.element == GgufType::kBool) {
        for (uint64_t k = 0; k < value.count; k++) cursor.skip_scalar(value.element, field);
      } else {
        cursor.take(value.count * least, field);  // cannot overflow: count <= remaining / least
      }
    } else {
      value.data = cursor.here();
      cursor.skip_scalar(value.type, field);
    }
    if (!values_.emplace(key, value).second) cursor.fail(field + " stands twice in the file");
  }
  if (!has("squat.format_version")) {
    cursor.fail(
        "is a GGUF file but not a Squat one: key 'squat.format_version' is missing; write one with "
        "`squat export CHECKPOINT OUT.gguf`");
  }

  uint64_t alignment = kDefaultAlignment;
  if (has("general.alignment")) {
    alignment = u32("general.alignment");
    if (alignment < 8 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0) {
      cursor.fail("key 'general.alignment' is " + std::to_string(alignment) +
                  ", not a power of two from 8 to " + std::to_string(kMaxAlignment));
    }
  }

  tensors_.reserve(tensor_count);
  std::vector<uint64_t> offsets(tensor_count);
  for (uint64_t i = 0; i < tensor_count; i++) {
    tensors_.push_back(read_tensor_info(cursor, &offsets[i]));
    if (!tensor_index_.emplace(tensors_.back().name, i).second) {
      cursor.fail("tensor " + quote(tensors_.back().name) + " stands twice in the file");
    }
  }

  // Tensors follow each other without holes or overlap, each padded to the alignment.
  const auto pad = [&cursor, alignment](uint64_t position) {
    return std::min((alignment - position % alignment) % alignment, cursor.remaining());
  };
  cursor.take(pad(cursor.offset()), "padding");
  const uint64_t base = cursor.offset();
  for (uint64_t i = 0; i < tensor_count; i++) {
    const std::string field = "tensor " + quote(tensors_[i].name);
    const uint64_t expected = cursor.offset() - base;
    if (offsets[i] != expected) {
      cursor.fail(field + " offset is " + std::to_string(offsets[i]) + ", expected " +
                  std::to_string(expected));
    }
    tensors_[i].data = cursor.take(tensors_[i].size, field + " data");
    cursor.take(pad(cursor.offset() - base), "padding");
  }
  if (cursor.remaining() != 0) {
    cursor.fail(std::to_string(cursor.remaining()) + " bytes follow the last tensor");
  }
}

const Gguf::Value& Gguf::value(std::string_view key, GgufType type) const {
  const auto found = values_.find(key);
  if (found == values_.end()) {
    throw Error(SQUAT_ERROR_FORMAT, name_ + ": key " + quote(key) +
                                        " is missing; export the model again with `squat export`");
  }
  if (found->second.type != type) {
    throw Error(SQUAT_ERROR_FORMAT, name_ + ": key " + quote(key) + " has type " +
                                        type_name(found->second.type) + ", expected " +
                                        type_name(type));
  }
  return found->second;
}

const Gguf::Value& Gguf::array(std::string_view key, GgufType element) const {
  const Value& found = value(key, GgufType::kArray);
  if (found.element != element) {
    throw Error(SQUAT_ERROR_FORMAT, name_ + ": key " + quote(key) + " has elements of type " +
                                        type_name(found.element) + ", expected " +
                                        type_name(element));
  }
  return found;
}

uint32_t Gguf::u32(std::string_view key) const {
  return load<uint32_t>(value(key, GgufType::kU32).data);
}

float Gguf::f32(std::string_view key) const { return load<float>(value(key, GgufType::kF32).data); }

bool Gguf::boolean(std::string_view key) const { return *value(key, GgufType::kBool).data != 0; }

std::string_view Gguf::string(std::string_view key) const {
  const uint8_t* data = value(key, GgufType::kString).data;
  return {reinterpret_cast<const char*>(data + 8), static_cast<size_t>(load<uint64_t>(data))};
}

template <class Number>
std::vector<Number> Gguf::numbers(std::string_view key, GgufType type) const {
  const Value& found = array(key, type);
  std::vector<Number> out(found.count);
  if (found.count != 0) std::memcpy(out.data(), found.data, found.count * sizeof(Number));
  return out;
}

std::vector<double> Gguf::f64_array(std::string_view key) const {
  return numbers<double>(key, GgufType::kF64);
}

std::vector<float> Gguf::f32_array(std::string_view key) const {
  return numbers<float>(key, GgufType::kF32);
}

std::vector<uint32_t> Gguf::u32_array(std::string_view key) const {
  return numbers<uint32_t>(key, GgufType::kU32);
}

std::vector<int32_t> Gguf::i32_array(std::string_view key) const {
  return numbers<int32_t>(key, GgufType::kI32);
}

std::vector<std::string_view> Gguf::string_array(std::string_view key) const {
  const Value& found = array(key, GgufType::kString);
  std::vector<std::string_view> out(found.count);
  const uint8_t* at = found.data;
  for (std::string_view& text : out) {
    text = {reinterpret_cast<const char*>(at + 8), static_cast<size_t>(load<uint64_t>(at))};
    at += 8 + text.size();
  }
  return out;
}

std::vector<std::string_view> Gguf::keys() const {
  std::vector<std::string_view> out;
  for (const auto& [key, value] : values_) out.push_back(key);
  return out;
}

const GgufTensor* Gguf::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace squat

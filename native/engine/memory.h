// Zeroed memory in whole pages, which cost nothing until they are touched: a cache can be reserved
// for the longest context and grow into it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace squat {

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc.
  explicit Memory(size_t size) : size_(size) {
    if (size == 0) return;
    void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(address);
  }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Memory() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out aligned pieces of a Memory, in two passes over the same code: without memory it only
// counts, which tells how much memory the second pass needs. Throws std::bad_alloc when the count
// overflows.
class Arena {
 public:
  Arena() = default;
  explicit Arena(const Memory& memory) : data_(memory.data()) {}

  template <typename T>
  T* take(size_t count) {
    size_t bytes = 0, end = 0;
    if (__builtin_mul_overflow(count, sizeof(T), &bytes) ||
        __builtin_add_overflow(used_, bytes, &end) || end > SIZE_MAX - kAlignment) {
      throw std::bad_alloc();
    }
    T* piece = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + used_);
    used_ = (end + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 64;
  uint8_t* data_ = nullptr;
  size_t used_ = 0;
};

}  // namespace squat

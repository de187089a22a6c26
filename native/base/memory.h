// Zeroed memory in whole pages, which cost nothing until they are touched: a cache can be reserved
// for the longest context and grow into it. What is touched from end to end anyway, such as
// weights, is better off in huge pages: a stream through tens of megabytes then misses no
// translation.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace squat {

class Memory {
 public:
  enum class Pages { kSmall, kHuge };

  Memory() = default;
  // Throws std::bad_alloc.
  explicit Memory(size_t size, Pages pages = Pages::kSmall) {
    if (size == 0) return;
    const size_t spare = pages == Pages::kHuge ? kHugePage : 0;
    if (__builtin_add_overflow(size, spare, &mapped_)) throw std::bad_alloc();
    void* address = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    mapping_ = data_ = static_cast<uint8_t*>(address);
#ifdef MADV_HUGEPAGE
    if (pages == Pages::kHuge) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(mapping_);
      data_ += (kHugePage - at % kHugePage) % kHugePage;
      madvise(data_, size, MADV_HUGEPAGE);  // a wish: without it all works, slower
    }
#endif
  }
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Memory() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_);
  }

  uint8_t* data() const { return data_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  uint8_t* mapping_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;  // in the mapping, aligned to the pages
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

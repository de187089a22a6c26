// A file mapped read-only into memory for as long as the object lives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace squat {

class MappedFile {
 public:
  // Throws Error(SQUAT_ERROR_FILE) when the file is missing, unreadable, empty or no regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // Lets the operating system take back the pages of a range that has been read; they are read
  // again from the file if they are needed once more.
  void release(const uint8_t* begin, size_t size) const;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace squat

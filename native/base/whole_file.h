// Files that are read and written as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace squat {

// Throws Error(SQUAT_ERROR_FILE) when the file is missing, unreadable or no regular file, and
// Error(SQUAT_ERROR_FORMAT), before anything is read, when it has more than `most` bytes.
std::vector<uint8_t> read_file(const std::string& path, size_t most);

// The file has all of it or is as it was before: it is written under another name beside it, and
// renamed. Throws Error(SQUAT_ERROR_FILE).
void write_file(const std::string& path, const std::vector<uint8_t>& bytes);

}  // namespace squat

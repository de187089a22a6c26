#include "whole_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "descriptor.h"
#include "error.h"

namespace squat {

namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw Error(SQUAT_ERROR_FILE, path + ": " + what + ": " + std::strerror(errno));
}

// A name beside `path` that no other writer has.
std::string name_beside(const std::string& path) {
  static std::atomic<unsigned> count{0};
  return path + "." + std::to_string(getpid()) + "-" + std::to_string(count++) + ".part";
}

}  // namespace

std::vector<uint8_t> read_file(const std::string& path, size_t most) {
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status = {};
  if (file.get() < 0 || fstat(file.get(), &status) != 0) fail(path, "cannot be opened");
  if (!S_ISREG(status.st_mode)) {
    throw Error(SQUAT_ERROR_FILE, path + ": is not a regular file");
  }
  if (static_cast<uint64_t>(status.st_size) > most) {
    throw Error(SQUAT_ERROR_FORMAT, path + ": has " + std::to_string(status.st_size) +
                                        " bytes, more than the " + std::to_string(most) +
                                        " that such a file can have");
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(status.st_size));
  size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t got = read(file.get(), bytes.data() + have, bytes.size() - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path, "cannot be read");
    if (got == 0) break;  // somebody has cut it in the meantime
    have += static_cast<size_t>(got);
  }
  bytes.resize(have);
  return bytes;
}

void write_file(const std::string& path, const std::vector<uint8_t>& bytes) {
  const std::string part = name_beside(path);
  const Descriptor file(open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) fail(path, "cannot be written");
  const auto give_up = [&] {
    const int error = errno;
    unlink(part.c_str());
    errno = error;
    fail(path, "cannot be written");
  };
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t wrote = write(file.get(), bytes.data() + done, bytes.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) give_up();
    done += static_cast<size_t>(wrote);
  }
  if (fsync(file.get()) != 0 || rename(part.c_str(), path.c_str()) != 0) give_up();
}

}  // namespace squat

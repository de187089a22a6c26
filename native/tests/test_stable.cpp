// Programs that were compiled against an earlier header run with this library, and what two of its
// functions say is the same everywhere.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "model_file.h"
#include "squat.h"

extern "C" {
extern const size_t old_sizes[3];
const char* run_old_caller(const char* path);
}

namespace {

void test_an_old_caller() {
  CHECK(old_sizes[0] == sizeof(squat_info));
  CHECK(old_sizes[1] == sizeof(squat_profile_entry));
  CHECK(old_sizes[2] == sizeof(squat_sampling));
  const std::string path = "test_stable." + std::to_string(getpid()) + ".gguf";
  const std::vector<uint8_t> bytes = squat::test::tiny_model({}).bytes();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  const char* broken = run_old_caller(path.c_str());
  if (broken != nullptr) std::fprintf(stderr, "%s: %s\n", broken, squat_last_error());
  CHECK(broken == nullptr);
  std::remove(path.c_str());
}

void test_version() { CHECK(std::strcmp(squat_version(), SQUAT_VERSION) == 0); }

// FNV-1a's published offset, and its published value of "foob", here the bytes of one float.
void test_hash() {
  CHECK(squat_hash_logits(nullptr, 0) == 0xcbf29ce484222325u);
  float foob;
  std::memcpy(&foob, "foob", sizeof foob);
  CHECK(squat_hash_logits(&foob, 1) == 0xdd120e790c2512afu);
  const float zeros[2] = {0.0f, -0.0f};
  CHECK(squat_hash_logits(zeros, 1) != squat_hash_logits(zeros + 1, 1));
}

}  // namespace

int main() {
  test_an_old_caller();
  test_version();
  test_hash();
  return squat::test::report("test_stable");
}

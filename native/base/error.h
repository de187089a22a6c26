// One exception type for everything a user can get wrong; the C API turns it into a status and a
// message. A message is one line that names the file or argument, the field and the value.
#pragma once

#include <stdexcept>
#include <string>

#include "squat.h"

namespace squat {

class Error : public std::runtime_error {
 public:
  Error(squat_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  squat_status status() const { return status_; }

 private:
  squat_status status_;
};

}  // namespace squat

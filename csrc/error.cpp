// The one line that a failed call leaves behind, per thread.
#include <cstdarg>
#include <cstdio>

#include "kernels.h"

namespace snello {
namespace {
thread_local char last_error[512] = "";
}  // namespace

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return -1;
}
}  // namespace snello

extern "C" {
const char* snello_last_error(void) { return snello::last_error; }
int32_t snello_abi_version(void) { return SNELLO_ABI_VERSION; }
}

// No exception crosses the C ABI: a caller in C or Python could not catch it, and the process would end.
#pragma once

#include <exception>
#include <new>

#include "kernels.h"

namespace snello {

// What `body` returns, or where it throws, -1 and one line about `what`.
template <typename Body>
auto guarded(const char* what, const Body& body) noexcept -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail("%s: out of memory", what);
  } catch (const std::exception& error) {
    return fail("%s: %s", what, error.what());
  } catch (...) {
    return fail("%s: failed", what);
  }
}

}  // namespace snello

// The C interface through which tests/test_emulator.py runs the tests of this directory.
#include "test.h"

using namespace pyops;

#define PYOPS_EXPORT extern "C" __attribute__((visibility("default")))

PYOPS_EXPORT int pyops_test_count() { return static_cast<int>(test::tests().size()); }
PYOPS_EXPORT const char* pyops_test_name(int i) { return test::tests()[static_cast<size_t>(i)].name; }

// "" where the test passed; the text lives until the next call.
PYOPS_EXPORT const char* pyops_test_run(const char* name, int variant) {
  static std::string result;
  result = std::string("no test named ") + name;
  test::recorded().clear();
  for (const test::Test& t : test::tests()) {
    if (std::strcmp(t.name, name) != 0) continue;
    try {
      result = t.run(variant);
    } catch (const std::exception& x) { result = x.what(); }
    test::forget_buffers();
  }
  return result.c_str();
}

PYOPS_EXPORT const unsigned char* pyops_test_recorded(size_t* bytes) {
  *bytes = test::recorded().size();
  return test::recorded().data();
}

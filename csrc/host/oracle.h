// The norms of the oracle, in long double, into the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace pyops::host {

void bind_oracle(pybind11::module_& module);

}  // namespace pyops::host

// Memory that several processes map, and the epochs in it, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_shared(pybind11::module_& module);

}  // namespace tierstore

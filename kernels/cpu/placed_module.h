// Binds what placed entries need (entry_index.h) to a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_placed(pybind11::module_& module);

}  // namespace tierstore

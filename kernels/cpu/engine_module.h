// Binds the lookup path into the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_engine(pybind11::module_& module);

}  // namespace tierstore

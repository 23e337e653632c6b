// Binds the kernels of reports and counts into the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_learning(pybind11::module_& module);

}  // namespace tierstore

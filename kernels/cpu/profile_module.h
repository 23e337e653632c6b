// Binds the kernels of profiles and predictions into the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_profile(pybind11::module_& module);

}  // namespace tierstore

// The Python face of codec.h.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_codec(pybind11::module_& module);

}  // namespace tierstore

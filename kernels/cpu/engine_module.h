// Binds the lookup path into the extension module.
#pragma once

#include <pybind11/pybind11.h>

#include "job.h"

namespace tierstore {

class Engine;

// The engine that a Python object holds, as long as that lives; a TypeError where it is none.
Engine& engine_of(pybind11::handle object);

// (kind, table, page, detail), or None where all is well.
pybind11::object fault_tuple(const Fault& fault);

void bind_engine(pybind11::module_& module);

}  // namespace tierstore

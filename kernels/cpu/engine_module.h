// Binds the lookup path into the extension module.
#pragma once

#include <pybind11/pybind11.h>

#include "job.h"

namespace tierstore {

class Engine;

// The engine of a Python `Engine`, as long as that lives; raises TypeError if it is something else.
Engine& engine_of(pybind11::handle object);

// The exception by which a Python `Engine` names a fault.
pybind11::object exception_of(pybind11::handle engine, const Fault& fault);

void bind_engine(pybind11::module_& module);

}  // namespace tierstore

// Python objects that jobs keep alive, and let go from threads that have no interpreter lock.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "job.h"

namespace tierstore {

// Returns what keeps objects alive until it is released. With the interpreter lock.
Held* hold_objects(std::vector<pybind11::object> objects);

// Drops the objects that jobs have let go. With the interpreter lock, and no other: their ends may run any code.
void drop_released();

void bind_buffers(pybind11::module_& module);

}  // namespace tierstore

// Binds mailboxes into the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_mailbox(pybind11::module_& module);

}  // namespace tierstore

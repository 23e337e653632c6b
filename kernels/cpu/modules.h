// What each file of bindings adds to the extension module. Files that bind classes which other files use have headers
// of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace tierstore {

void bind_block_codecs(pybind11::module_& module);
void bind_blocks(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_constants(pybind11::module_& module);
void bind_gradient_norms(pybind11::module_& module);
void bind_hash(pybind11::module_& module);
void bind_huge_pages(pybind11::module_& module);
void bind_learning(pybind11::module_& module);
void bind_mailbox(pybind11::module_& module);
void bind_messages(pybind11::module_& module);
void bind_optimizer(pybind11::module_& module);
void bind_overlay(pybind11::module_& module);
void bind_owned_rows(pybind11::module_& module);
void bind_pages(pybind11::module_& module);
void bind_place_entries(pybind11::module_& module);
void bind_placed(pybind11::module_& module);
void bind_profile(pybind11::module_& module);
void bind_row_cache(pybind11::module_& module);
void bind_runs(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_shared(pybind11::module_& module);

}  // namespace tierstore

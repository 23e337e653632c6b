// The extension module `tierstore.kernels._cpu`. kernels/_cpu.pyi says what everything in it promises.
#include "buffers_module.h"
#include "engine_module.h"
#include "modules.h"
#include "table_module.h"

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Compiled kernels of tierstore; use them through tierstore.kernels.";
  tierstore::bind_constants(module);
  tierstore::bind_pages(module);
  tierstore::bind_blocks(module);
  tierstore::bind_hash(module);
  tierstore::bind_codec(module);
  tierstore::bind_block_codecs(module);
  tierstore::bind_gradient_norms(module);
  tierstore::bind_profile(module);
  tierstore::bind_placed(module);
  tierstore::bind_buffers(module);
  tierstore::bind_overlay(module);
  tierstore::bind_tables(module);
  tierstore::bind_engine(module);
  tierstore::bind_mailbox(module);
  tierstore::bind_messages(module);
  tierstore::bind_learning(module);
  tierstore::bind_runs(module);
  tierstore::bind_shared(module);
  tierstore::bind_huge_pages(module);
  tierstore::bind_row_cache(module);
  tierstore::bind_optimizer(module);
  tierstore::bind_owned_rows(module);
  tierstore::bind_place_entries(module);
  tierstore::bind_quantize(module);
}

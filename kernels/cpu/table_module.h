// Tables as the lookup path has them, made of the records that Python hands over, every number checked.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <vector>

#include "arrays.h"
#include "job.h"
#include "page_queue.h"
#include "table.h"

namespace tierstore {

// A recency cache in memory that Python holds; several engines may share it.
struct HeldCache {
  std::shared_ptr<EntryCache> cache;
  pybind11::array memory;
};

// Address map, page geometry and open shards; mapped in kMmap.
Table make_table(const pybind11::dict& record, ReadMode mode);

// What a placement or a daemon gives a table; `held` keeps its memory alive.
StaticSet make_statics(const pybind11::dict& record, const Table& table, ReadMode mode,
                       std::vector<pybind11::array>& held);

void unmap(ShardFile& file);

void bind_entry_cache(pybind11::module_& module);

}  // namespace tierstore

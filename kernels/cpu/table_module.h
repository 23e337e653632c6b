// Tables as Python describes them, every number checked, and as the lookup path has them.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "page_queue.h"
#include "table.h"

namespace tierstore {

// A recency cache in memory that Python owns; several engines may share it.
struct PyEntryCache {
  std::shared_ptr<EntryCache> cache;
  pybind11::array memory;
};

using FileHandle = std::tuple<int, int, size_t>;      // buffered descriptor, direct one or -1, bytes
using PyIndexArea = std::pair<ByteArray, ByteArray>;  // head, buckets

using PyKeyResidues = std::pair<Input<int64_t>, Input<int64_t>>;  // num_residues, inverses

// Where a table's placed entries are: indexes and records in memory, and the placement's file.
struct StaticRecord {
  std::vector<PyIndexArea> areas;  // by parity of epochs
  std::optional<PyIndexArea> in_file;
  ByteArray records;
  uint32_t loaded_start;
  uint64_t num_placed;
  std::optional<FileHandle> file;
  uint64_t byte_start;
};

// A table before it is opened. It keeps alive what `table` points to.
struct TableRecord {
  Table table;                          // its files are not mapped
  pybind11::array memory;               // the recency cache, or all rows
  std::vector<pybind11::array> arrays;  // what the static set lies in
};

// Returns the table of a record, its files mapped in kMmap: see `unmap`.
Table open_table(const TableRecord& record, ReadMode mode);

ShardFile file_of(const FileHandle& handle);

void unmap(ShardFile& file);

void bind_tables(pybind11::module_& module);

}  // namespace tierstore

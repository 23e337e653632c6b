// Planes of a table in place as Python describes them, every number checked.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "block_source.h"
#include "table_module.h"

namespace tierstore {

// A plane before its table is opened. It keeps alive what `plane` points to.
struct PlaneRecord {
  PlaneSource plane;
  uint64_t num_blocks = 0;  // of which there are checksums
  std::vector<pybind11::array> arrays;
};

// Throws if the planes do not hold num_rows rows of row_bytes; gives each its place in a row.
std::vector<PlaneSource> checked_planes(const std::vector<PlaneRecord>& records, uint64_t num_rows, size_t row_bytes);

}  // namespace tierstore

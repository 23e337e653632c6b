// The rows of versions as Python describes them, every number checked.
#pragma once

#include <vector>

#include "row_overlay.h"
#include "table_module.h"

namespace tierstore {

// An overlay before its table is opened. It keeps alive what `overlay` points to.
struct OverlayRecord {
  RowOverlay overlay;  // without row_bytes
  pybind11::array buckets;
};

// Throws if rows of row_bytes do not fit the overlay's pages.
RowOverlay checked_overlay(const OverlayRecord& record, size_t row_bytes);

}  // namespace tierstore

// Where the rows of a request go in the caller's memory, and which of them are wanted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tierstore {

// A range of row ids. Rows of other ids are zeros.
struct RowRange {
  int64_t start = INT64_MIN, end = INT64_MAX;  // the default wants every row

  bool is_all() const { return start == INT64_MIN; }
  bool holds(int64_t row_id) const { return is_all() || (row_id >= start && row_id < end); }
};

// Row r of a request goes to `row(r)`, its bytes byte_stride apart. Strides are of any sign.
struct RowsOut {
  RowsOut() = default;
  RowsOut(uint8_t* rows) : rows(rows) {}  // NOLINT: one row behind the other, all of them wanted

  uint8_t* rows = nullptr;
  size_t num_inner = 0;  // rows of an outer step; 0: rows lie one behind the other
  ptrdiff_t outer_stride = 0, inner_stride = 0, byte_stride = 1;
  RowRange wanted;

  bool is_contiguous() const { return num_inner == 0; }
  bool is_plain() const { return is_contiguous() && wanted.is_all(); }

  // Copies row r; null: zeros.
  void put(size_t r, const uint8_t* from, size_t row_bytes) const {
    uint8_t* to = rows + (is_contiguous() ? static_cast<ptrdiff_t>(r * row_bytes)
                                          : static_cast<ptrdiff_t>(r / num_inner) * outer_stride +
                                                static_cast<ptrdiff_t>(r % num_inner) * inner_stride);
    if (byte_stride == 1) {
      from == nullptr ? std::memset(to, 0, row_bytes) : std::memcpy(to, from, row_bytes);
      return;
    }
    for (size_t i = 0; i < row_bytes; ++i, to += byte_stride) *to = from == nullptr ? 0 : from[i];
  }
};

}  // namespace tierstore

// Pages: planes interleaved into rows, rows into sealed pages; and the check of pages that were read back.
//
// A page is `rows_per_page` rows, zero padding, and 16 trailing bytes: page number (u64), format version (u32), CRC32C
// of everything before it (u32), little-endian. FORMAT.md draws it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tierstore {

constexpr size_t kTrailerBytes = 16;

struct PlaneView {
  const uint8_t* rows;  // [num_rows, width_bytes], contiguous
  size_t width_bytes;
};

struct PageShape {
  size_t page_bytes;
  size_t rows_per_page;
  uint32_t version;
  uint32_t seed;
};

enum PageStatus : uint8_t { kPageGood = 0, kPageOtherVersion = 1, kPageOtherNumber = 2, kPageBadChecksum = 3 };

// Writes ceil(num_rows / rows_per_page) pages to `out`, numbered from page_start on.
void seal_pages(const std::vector<PlaneView>& planes, size_t num_rows, const PageShape& shape, uint64_t page_start,
                uint8_t* out);

// Writes a PageStatus for each of num_pages pages, which should bear the numbers page_numbers.
void check_pages(const uint8_t* pages, size_t num_pages, const PageShape& shape, const int64_t* page_numbers,
                 uint8_t* status);

}  // namespace tierstore

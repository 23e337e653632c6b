#include "pages.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pages are little-endian, and so must be the machine");

namespace tierstore {
namespace {

constexpr size_t kChecksumBytes = 4;

void write_trailer(uint8_t* page, const PageShape& shape, uint64_t page_number) {
  uint8_t* trailer = page + shape.page_bytes - kTrailerBytes;
  std::memcpy(trailer, &page_number, 8);
  std::memcpy(trailer + 8, &shape.version, 4);
  const uint32_t checksum = crc32c(page, shape.page_bytes - kChecksumBytes, shape.seed);
  std::memcpy(trailer + 12, &checksum, 4);
}

PageStatus check_page(const uint8_t* page, const PageShape& shape, uint64_t page_number) {
  const uint8_t* trailer = page + shape.page_bytes - kTrailerBytes;
  uint64_t found_number;
  uint32_t found_version, found_checksum;
  std::memcpy(&found_number, trailer, 8);
  std::memcpy(&found_version, trailer + 8, 4);
  std::memcpy(&found_checksum, trailer + 12, 4);
  if (crc32c(page, shape.page_bytes - kChecksumBytes, shape.seed) != found_checksum) return kPageBadChecksum;
  if (found_version != shape.version) return kPageOtherVersion;
  if (found_number != page_number) return kPageOtherNumber;
  return kPageGood;
}

}  // namespace

void seal_pages(const std::vector<PlaneView>& planes, size_t num_rows, const PageShape& shape, uint64_t page_start,
                uint8_t* out) {
  size_t row_bytes = 0;
  for (const PlaneView& plane : planes) row_bytes += plane.width_bytes;
  size_t row = 0;
  for (uint64_t page_number = page_start; row < num_rows; ++page_number, out += shape.page_bytes) {
    const size_t row_end = std::min(num_rows, row + shape.rows_per_page);
    uint8_t* place = out;
    for (; row < row_end; ++row) {
      for (const PlaneView& plane : planes) {
        std::memcpy(place, plane.rows + row * plane.width_bytes, plane.width_bytes);
        place += plane.width_bytes;
      }
    }
    std::memset(place, 0, static_cast<size_t>(out + shape.page_bytes - place));
    write_trailer(out, shape, page_number);
  }
}

void check_pages(const uint8_t* pages, size_t num_pages, const PageShape& shape, const int64_t* page_numbers,
                 uint8_t* status) {
  for (size_t i = 0; i < num_pages; ++i) {
    status[i] = check_page(pages + i * shape.page_bytes, shape, static_cast<uint64_t>(page_numbers[i]));
  }
}

}  // namespace tierstore

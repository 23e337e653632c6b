#include "row_overlay.h"

#include <algorithm>

namespace tierstore {

RowOverlay::Row RowOverlay::row(uint32_t place) const {
  const auto after = std::upper_bound(files.begin(), files.end(), place, [](uint32_t wanted, const VersionFile& each) {
    return wanted < each.place_start;
  });
  const auto number = static_cast<uint64_t>(after - files.begin() - 1);
  const uint32_t within = place - files[number].place_start;
  return {kVersionRead | number << kVersionFileShift | within / shape.rows_per_page,
          static_cast<uint32_t>(within % shape.rows_per_page * row_bytes)};
}

PageStatus RowOverlay::check(uint64_t page, const uint8_t* bytes) const {
  PageShape own = shape;
  own.seed = file_of(page).seed;
  const auto number = static_cast<int64_t>(page & kVersionPageMask);
  uint8_t status = kPageGood;
  check_pages(bytes, 1, own, &number, &status);
  return static_cast<PageStatus>(status);
}

bool put_rows(const int64_t* row_ids, size_t num_rows, uint32_t place_start, IndexBucket* buckets, size_t num_buckets) {
  constexpr size_t kAhead = 16;
  const EntryIndex index{buckets, num_buckets};
  for (size_t i = 0; i < num_rows; ++i) {
    if (i + kAhead < num_rows) __builtin_prefetch(index.find_bucket(row_ids[i + kAhead]), 1);
    if (!put_entry(row_ids[i], place_start + static_cast<uint32_t>(i), buckets, num_buckets)) return false;
  }
  return true;
}

}  // namespace tierstore

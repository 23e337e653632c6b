// Rows that versions put in place of a table's own: an index of their row ids, and the files that hold them.
//
// The index is an `EntryIndex`, 18 bytes a row, with row ids for keys. A row's place is its number in all files of the
// table together, the oldest file first; so the newest record of a row has the highest place. The rows of a file lie in
// pages as a table's own do, numbered from 0, with a seed of the file's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "entry_index.h"
#include "page_queue.h"
#include "pages.h"

namespace tierstore {

// What a page reader reads, as one number: a page's; or, in place, a unit's below its plane's index; or a page's of a
// version's file, below the file's number; or the number of a placed entry's record.
constexpr unsigned kPlaneShift = 56;
constexpr uint64_t kUnitMask = (uint64_t{1} << kPlaneShift) - 1;
constexpr uint64_t kPlacedRead = uint64_t{1} << 63;
constexpr uint64_t kVersionRead = uint64_t{1} << 62;
constexpr unsigned kVersionFileShift = 40;
constexpr uint64_t kVersionPageMask = (uint64_t{1} << kVersionFileShift) - 1;
constexpr size_t kVersionFilesMax = size_t{1} << 16;

struct VersionFile {
  ShardFile file;
  uint64_t byte_start = 0;  // of its first page
  uint32_t place_start = 0;
  uint32_t seed = 0;
};

struct RowOverlay {
  struct Row {
    uint64_t page;  // as kVersionRead says
    uint32_t byte;  // within the page
  };

  EntryIndex index;
  std::vector<VersionFile> files;  // ascending by place_start; none: all rows are the table's own
  PageShape shape{};               // of all files, but for the seed
  size_t row_bytes = 0;

  bool is_empty() const { return files.empty(); }
  // Has the processor bring in what `find` looks at.
  void ask_for(uint64_t row_id) const { __builtin_prefetch(index.find_bucket(static_cast<int64_t>(row_id))); }
  // The place of a row, kNotPlaced if it is the table's own.
  uint32_t find(uint64_t row_id) const {
    return index.find(index.find_bucket(static_cast<int64_t>(row_id)), static_cast<int64_t>(row_id));
  }
  Row row(uint32_t place) const;

  // Of a page by its number: its file, the byte that it begins at, and what it must look like.
  const VersionFile& file_of(uint64_t page) const { return files[(page & ~kVersionRead) >> kVersionFileShift]; }
  uint64_t byte_start(uint64_t page) const {
    return file_of(page).byte_start + (page & kVersionPageMask) * shape.page_bytes;
  }
  PageStatus check(uint64_t page, const uint8_t* bytes) const;
};

// Enters rows with places place_start, place_start + 1, ... into an index that holds older ones: those of the same ids
// get the new places. Returns false if the index is full, and then holds a part of them.
bool put_rows(const int64_t* row_ids, size_t num_rows, uint32_t place_start, IndexBucket* buckets, size_t num_buckets);

}  // namespace tierstore

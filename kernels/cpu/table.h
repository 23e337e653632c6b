// A table as the lookup path sees it: address map, page geometry, shards, and what of it lies in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <vector>

#include "address_map.h"
#include "block_source.h"
#include "entry_cache.h"
#include "entry_index.h"
#include "page_queue.h"
#include "pages.h"
#include "row_overlay.h"

namespace tierstore {

// What would answer a key. kFromDevice: a GPU's memory, of which nothing here knows.
enum Source : uint8_t { kFromNowhere, kFromResident, kFromStatic, kFromRecency, kFromRecord, kFromPages, kFromDevice };
constexpr const char* kSourceNames[] = {"none", "resident", "static", "recency", "record", "pages", "hbm"};
static_assert(std::size(kSourceNames) == kFromDevice + 1, "a name each");

struct Table {
  size_t num_orders, rows_per_key, row_bytes;
  uint64_t num_rows;
  bool is_plain;                                // keys are row ids, and so must lie below num_rows
  std::vector<int64_t> moduli, offsets;         // one of each for every (order, head), orders outermost
  std::shared_ptr<const TokenKeys> token_keys;  // null where row ids do not give keys
  size_t page_bytes, rows_per_page;
  uint64_t num_pages, pages_per_shard;
  PageShape shape;
  std::vector<ShardFile> shards;
  std::vector<PlaneSource> planes;    // of a table in place; then it has no shards, and its pages are ranges of rows
  std::shared_ptr<EntryCache> cache;  // null where the table is resident
  uint8_t tag = 0;                    // of its entries in the cache, below 16: two versions of a table may share one
  StaticSet statics;                  // of the placement; empty without a placement
  RowOverlay overlay;                 // rows of versions; empty if all rows are the base's
  const uint8_t* resident = nullptr;  // all rows, by row id
  std::vector<bool> bad_pages;        // of a resident table: pages that could not be loaded; empty where all are good

  // Calls act(file) with each file that rows may be read from; of a const table, with const files.
  template <typename Self, typename Act>
  static void each_file(Self& table, Act act) {
    for (auto& shard : table.shards) act(shard);
    act(table.statics.placed.file);
    for (auto& plane : table.planes) {
      for (auto& file : plane.files) act(file);
    }
    for (auto& version : table.overlay.files) act(version.file);
  }
  // Bytes of the longest read of a page, or of a row of a plane.
  size_t read_bytes_max() const {
    size_t longest = (page_bytes + 4095) / 4096 * 4096;
    for (const PlaneSource& plane : planes) longest = std::max(longest, plane.read_bytes_max());
    if (!overlay.is_empty()) longest = std::max(longest, overlay.shape.page_bytes);
    return longest;
  }

  // An order as the cache has it.
  uint8_t tagged(uint8_t order) const { return static_cast<uint8_t>(order | tag << kTagShift); }
  size_t entry_bytes() const { return rows_per_key * row_bytes; }
  size_t num_heads() const { return num_orders * rows_per_key; }
  uint64_t row_id(size_t head, int64_t key) const {
    return static_cast<uint64_t>(key) % static_cast<uint64_t>(moduli[head]) + static_cast<uint64_t>(offsets[head]);
  }
  // Where a key that memory does not hold lies in the placement file; kNotPlaced if a version has one of its rows: the
  // file's records are of the base. `found` is what the epoch's area has for it.
  uint32_t record_of(uint8_t order, int64_t key, uint32_t found) const {
    const uint32_t in_file = statics.place_in_file(order, key, found);
    return in_file == kNotPlaced || overlay.is_empty() || !is_touched(order, key) ? in_file : kNotPlaced;
  }
  // Whether a version has a row of an entry.
  bool is_touched(uint8_t order, int64_t key) const {
    const size_t head = order * rows_per_key;
    for (size_t row = 0; row < rows_per_key; ++row) overlay.ask_for(row_id(head + row, key));
    for (size_t row = 0; row < rows_per_key; ++row) {
      if (overlay.find(row_id(head + row, key)) != kNotPlaced) return true;
    }
    return false;
  }
};

}  // namespace tierstore

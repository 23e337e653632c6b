// Copies what memory holds of a request, straight into the caller's buffer.
//
// out: the table's output; entry `list.first + i` is that of pair i, and so is its source. Costs one probe and one copy
// a pair; the waits for memory of up to 16 pairs overlap (software prefetch). Each key is loaded once, and checked as
// it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "job.h"
#include "report_sink.h"
#include "table.h"

namespace tierstore {

// What one pass over a list found, by order: pairs asked for, those of them that are sentinels, and those that the
// static set held.
struct Found {
  uint64_t pairs[kOrdersMax] = {}, sentinels[kOrdersMax] = {}, static_hits[kOrdersMax] = {};
  bool good = true;  // whether all keys and pairs are the table's; entries of others are zeros

  void add(const Found& other) {
    for (size_t order = 0; order < kOrdersMax; ++order) {
      pairs[order] += other.pairs[order];
      sentinels[order] += other.sentinels[order];
      static_hits[order] += other.static_hits[order];
    }
    good &= other.good;
  }
};

// From the epoch's static set and the cache. Appends the pairs that neither holds to `misses`. streamed: the output
// should go past the caches, where its alignment allows. reports: where to report what was asked for; null: nowhere.
Found gather_cached(const Table& table, uint64_t epoch, uint16_t table_index, const PairList& list, const Output& out,
                    bool streamed, std::vector<Miss>& misses, ReportSink* reports);

// The same if nothing in memory may be read: all keys are misses.
Found gather_nothing(const Table& table, uint16_t table_index, const PairList& list, const Output& out,
                     std::vector<Miss>& misses);

// From a resident table. bad_page: the first bad page that a row lies on, -1 if all are good.
Found gather_resident(const Table& table, const PairList& list, const Output& out, int64_t& bad_page);

// From a resident table, by row id, -1 for a zero row; list.keys are the ids. Counts nothing.
Found gather_resident_rows(const Table& table, const PairList& ids, uint8_t* out, int64_t& bad_page);

}  // namespace tierstore

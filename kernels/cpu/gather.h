// Copies what memory holds of a request, straight into the caller's buffer.
//
// out: the entries of all pairs of the list, back to back. Costs one probe and one copy a pair; the waits for memory of up to 16 pairs overlap
// (software prefetch).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "job.h"
#include "report_sink.h"
#include "table.h"

namespace tierstore {

// From the epoch's static set and the cache. Appends the pairs that neither holds to `misses`, and counts, by order, those that the static
// set held. reports: where to say what was asked for; null: nowhere.
void gather_cached(const Table& table, uint64_t epoch, uint16_t table_index, const PairList& list, uint8_t* out,
                   std::vector<Miss>& misses, uint64_t* static_hits, ReportSink* reports);

// The same where nothing in memory may be read: all keys are misses.
void gather_nothing(const Table& table, uint16_t table_index, const PairList& list, uint8_t* out, std::vector<Miss>& misses);

// From a resident table. Returns the first bad page that a row lies on, -1 where all are good.
int64_t gather_resident(const Table& table, const PairList& list, uint8_t* out);

// From a resident table, by row id, -1 for a zero row. Returns as `gather_resident` does.
int64_t gather_resident_rows(const Table& table, const int64_t* row_ids, size_t num_rows, uint8_t* out);

}  // namespace tierstore

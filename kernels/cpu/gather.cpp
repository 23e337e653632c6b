#include "gather.h"

#include <algorithm>
#include <cstring>

#include "racing_copy.h"

namespace tierstore {
namespace {

// Pairs whose bucket of the static set's index is on its way while an earlier one is searched.
constexpr size_t kBucketsAhead = 18;
constexpr size_t kSetsAhead = 18;    // pairs whose set is on its way while an earlier one is probed
constexpr size_t kPagesAhead = 8;    // pairs whose entry's pages are looked up before its lines are asked for
constexpr size_t kEntriesAhead = 4;  // pairs whose entry is on its way while an earlier one is copied
constexpr size_t kRowsAhead = 16;    // resident rows on their way while an earlier one is copied
constexpr size_t kRing = 64;
static_assert((kRing & (kRing - 1)) == 0 && kRing > kBucketsAhead + kSetsAhead + kPagesAhead + kEntriesAhead,
              "slots of the pipeline must not meet");

void copy_row(const uint8_t* from, uint8_t* to, size_t row_bytes) {
  if (from == nullptr) {  // a zero row
    std::memset(to, 0, row_bytes);
  } else {
    std::memcpy(to, from, row_bytes);
  }
}

// Keys of a list, each loaded once; one that is not the table's is noted and taken for a sentinel.
class CheckedKeys {
 public:
  CheckedKeys(const Table& table, const PairList& list, Found& found)
      : list_(list), found_(found), end_(table.is_plain ? table.num_rows : uint64_t{1} << 63) {}

  int64_t key(size_t i) { return checked(list_.key(i), end_); }

  // As a row id of the table.
  int64_t row_id(size_t i, uint64_t num_rows) { return checked(list_.key(i), num_rows); }

  // The order of pair i of a list of single pairs; counts it.
  uint8_t order(size_t i, size_t num_orders) {
    const int32_t pair = list_.pair(i);
    found_.good &= pair >= 0;
    const auto order = static_cast<uint8_t>(static_cast<uint32_t>(pair) % num_orders);
    ++found_.pairs[order];
    return order;
  }

 private:
  int64_t checked(int64_t key, uint64_t end) {
    if (static_cast<uint64_t>(key) < end || key == -1) return key;
    found_.good = false;
    return -1;
  }

  const PairList& list_;
  Found& found_;
  const uint64_t end_;
};

// Of a list of whole tokens, each order has as many pairs.
void count_pairs(const Table& table, const PairList& list, Found& found) {
  for (size_t order = 0; list.pairs == nullptr && order < table.num_orders; ++order)
    found.pairs[order] = list.count / table.num_orders;
}

// Copies `num_rows` resident rows, the i-th being `row_id(i)`, -1 for zeros. Returns the first bad page that one lies
// on, or -1.
template <typename RowId>
int64_t copy_resident(const Table& table, size_t num_rows, uint8_t* out, RowId row_id) {
  const uint8_t* ring[kRing];
  int64_t bad_page = -1;
  for (size_t i = 0; i < num_rows + kRowsAhead; ++i) {
    if (i < num_rows) {
      const int64_t id = row_id(i);
      const uint8_t* from = id < 0 ? nullptr : table.resident + static_cast<size_t>(id) * table.row_bytes;
      if (from != nullptr) {
        fetch(from, table.row_bytes);
        const size_t page = static_cast<size_t>(id) / table.rows_per_page;
        if (bad_page < 0 && !table.bad_pages.empty() && table.bad_pages[page]) bad_page = static_cast<int64_t>(page);
      }
      ring[i & (kRing - 1)] = from;
    }
    if (i >= kRowsAhead) {
      const size_t copied = i - kRowsAhead;
      copy_row(ring[copied & (kRing - 1)], out + copied * table.row_bytes, table.row_bytes);
    }
  }
  return bad_page;
}

// Five stages, each some pairs behind the one before, so that what it needs has come from memory meanwhile: ask for the
// key's bucket of the static set's index; search it, and where the key is not loaded ask for its set of the cache;
// probe that, and look up the pages of the entry (asking for its ends: on small pages, the walk to them takes as long
// as the entry itself); ask for the entry, line by line as an earlier one is copied; copy. Without a static set the
// first stage falls away.
template <bool kSources>
Found gather_in_stages(const Table& table, uint64_t epoch, uint16_t table_index, const PairList& list,
                       const Output& output, bool past_caches, std::vector<Miss>& misses, ReportSink* reports) {
  struct Pair {
    const IndexBucket* bucket;
    const CacheSet* set;
    const uint8_t* record;  // of the static set; null where it does not hold the key
    const uint8_t* from;    // the record, or the entry that the probe found; null on a miss
    Probe probe;
    int64_t key;
    uint32_t placed;
    uint8_t order;
  };
  Pair ring[kRing];
  Found found;
  count_pairs(table, list, found);
  CheckedKeys keys(table, list, found);
  const size_t num_pairs = list.count;
  uint8_t* const out = output.rows + list.first * table.entry_bytes();
  uint8_t* const sources = kSources ? output.sources + list.first : nullptr;
  const auto note_source = [sources](size_t i, Source source) {
    if (kSources) sources[i] = source;
  };
  const EntryCache& cache = *table.cache;
  const StaticSet& statics = table.statics;
  const size_t entry_bytes = table.entry_bytes();
  EntryIndex placed_keys[kOrdersMax];
  const size_t buckets_ahead = statics.records != nullptr ? std::min(kBucketsAhead, num_pairs) : 0;
  for (size_t i = 0; buckets_ahead > 0 && i < table.num_orders; ++i) placed_keys[i] = statics.areas[epoch & 1].order(i);
  const size_t sets_ahead = buckets_ahead + std::min(kSetsAhead, num_pairs);
  const size_t pages_ahead = sets_ahead + std::min(kPagesAhead, num_pairs);
  const size_t entries_ahead = pages_ahead + std::min(kEntriesAhead, num_pairs);
  const bool streamed = past_caches && (reinterpret_cast<uintptr_t>(out) | entry_bytes) % kStreamAlignment == 0;
  uint8_t order = 0;
  for (size_t i = 0; i < num_pairs + entries_ahead; ++i) {
    if (i < num_pairs) {
      Pair& pair = ring[i & (kRing - 1)];
      if (list.pairs != nullptr) order = keys.order(i, table.num_orders);
      pair = {nullptr, nullptr, nullptr, nullptr, {}, keys.key(i), kNotPlaced, order};
      order = order + 1u == table.num_orders ? 0 : static_cast<uint8_t>(order + 1);
      if (pair.key >= 0 && buckets_ahead > 0) {
        pair.bucket = placed_keys[pair.order].find_bucket(pair.key);
        __builtin_prefetch(pair.bucket);
      }
    }
    if (i >= buckets_ahead && i - buckets_ahead < num_pairs) {
      Pair& pair = ring[(i - buckets_ahead) & (kRing - 1)];
      if (pair.key >= 0) {
        pair.placed = placed_keys[pair.order].find(pair.bucket, pair.key);
        if (statics.loads(pair.placed)) {
          pair.record = statics.record(pair.placed);
        } else {
          pair.set = cache.find_set(table.tagged(pair.order), pair.key);
          fetch(reinterpret_cast<const uint8_t*>(pair.set), sizeof(CacheSet));
        }
      }
    }
    if (i >= sets_ahead && i - sets_ahead < num_pairs) {
      Pair& pair = ring[(i - sets_ahead) & (kRing - 1)];
      if (pair.set != nullptr) pair.probe = cache.probe(pair.set, table.tagged(pair.order), pair.key);
      pair.from = pair.record != nullptr ? pair.record : pair.probe.entry;
      if (pair.from != nullptr) {
        __builtin_prefetch(pair.from);
        __builtin_prefetch(pair.from + entry_bytes - 1);
      }
    }
    const uint8_t* next = nullptr;  // an entry that will be copied soon
    if (i >= pages_ahead && i - pages_ahead < num_pairs) next = ring[(i - pages_ahead) & (kRing - 1)].from;
    if (i < entries_ahead) {
      if (next != nullptr) fetch(next, entry_bytes);
      continue;
    }
    const size_t copied = i - entries_ahead;
    const Pair& pair = ring[copied & (kRing - 1)];
    uint8_t* to = out + copied * entry_bytes;
    if (pair.key < 0) {
      std::memset(to, 0, entry_bytes);
      ++found.sentinels[pair.order];
      note_source(copied, kFromNowhere);
    } else if (pair.record != nullptr) {
      racing_copy(to, pair.record, entry_bytes, next, streamed);
      ++found.static_hits[pair.order];
      note_source(copied, kFromStatic);
      if (reports != nullptr) reports->some(pair.order, pair.key, kFromStatic);
    } else if (pair.probe.way < 0 || !cache.copy(pair.probe, table.tagged(pair.order), pair.key, to, next, streamed)) {
      const uint32_t in_file = table.record_of(pair.order, pair.key, pair.placed);
      misses.push_back({pair.key, static_cast<uint32_t>(list.first + copied), table_index, pair.order, in_file});
      note_source(copied, in_file == kNotPlaced ? kFromPages : kFromRecord);
      if (reports != nullptr) reports->all(pair.order, pair.key, kFromPages);
    } else {
      note_source(copied, kFromRecency);
      if (reports == nullptr) continue;
      const bool counted_out = pair.probe.set->counts[pair.probe.way].load(std::memory_order_relaxed) >= kCountMax;
      counted_out ? reports->some(pair.order, pair.key, kFromRecency)
                  : reports->all(pair.order, pair.key, kFromRecency);
    }
  }
  if (streamed) end_streamed_copies();
  return found;
}

}  // namespace

Found gather_cached(const Table& table, uint64_t epoch, uint16_t table_index, const PairList& list, const Output& out,
                    bool streamed, std::vector<Miss>& misses, ReportSink* reports) {
  // Apart, because nearly all lookups want no sources, and noting them costs a few percent.
  const auto gather = out.sources == nullptr ? gather_in_stages<false> : gather_in_stages<true>;
  return gather(table, epoch, table_index, list, out, streamed, misses, reports);
}

Found gather_nothing(const Table& table, uint16_t table_index, const PairList& list, const Output& out,
                     std::vector<Miss>& misses) {
  Found found;
  count_pairs(table, list, found);
  CheckedKeys keys(table, list, found);
  uint8_t order = 0;
  for (size_t i = 0; i < list.count; ++i) {
    if (list.pairs != nullptr) order = keys.order(i, table.num_orders);
    const int64_t key = keys.key(i);
    const size_t index = list.first + i;
    Source source = kFromNowhere;
    if (key < 0) {
      std::memset(out.rows + index * table.entry_bytes(), 0, table.entry_bytes());
      ++found.sentinels[order];
    } else {
      const uint32_t in_file = table.record_of(order, key, kNotPlaced);
      misses.push_back({key, static_cast<uint32_t>(index), table_index, order, in_file});
      source = in_file == kNotPlaced ? kFromPages : kFromRecord;
    }
    if (out.sources != nullptr) out.sources[index] = source;
    order = order + 1u == table.num_orders ? 0 : static_cast<uint8_t>(order + 1);
  }
  return found;
}

Found gather_resident(const Table& table, const PairList& list, const Output& out, int64_t& bad_page) {
  const size_t heads = table.rows_per_key, orders = table.num_orders;
  Found found;
  count_pairs(table, list, found);
  CheckedKeys keys(table, list, found);
  size_t pair = 0, head = 0, order = 0;
  int64_t key = -1;
  bad_page = copy_resident(table, list.count * heads, out.rows + list.first * table.entry_bytes(), [&](size_t) {
    if (head == 0) {
      if (list.pairs != nullptr) order = keys.order(pair, orders);
      key = keys.key(pair);
      found.sentinels[order] += key < 0;
      if (out.sources != nullptr) out.sources[list.first + pair] = key < 0 ? kFromNowhere : kFromResident;
    }
    const int64_t id = key < 0 ? -1 : static_cast<int64_t>(table.row_id(order * heads + head, key));
    if (++head == heads) {
      head = 0;
      ++pair;
      order = order + 1 == orders ? 0 : order + 1;
    }
    return id;
  });
  return found;
}

Found gather_resident_rows(const Table& table, const PairList& ids, uint8_t* out, int64_t& bad_page) {
  Found found;
  CheckedKeys keys(table, ids, found);
  bad_page = copy_resident(table, ids.count, out + ids.first * table.row_bytes,
                           [&](size_t i) { return keys.row_id(i, table.num_rows); });
  return found;
}

}  // namespace tierstore

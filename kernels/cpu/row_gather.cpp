#include "row_gather.h"

#include <algorithm>
#include <cstring>

namespace tierstore {
namespace {

// Ids that are copied, and rows on their way through the scratch, stay in a core's caches. Keys are few bytes, and long
// runs of them are copied faster: see kStreamedBytes in engine.cpp.
constexpr size_t kIdsMax = 1 << 14, kScratchBytes = 1 << 19, kKeyedRowsMax = 1 << 19;

int64_t load(const int64_t* id) { return __atomic_load_n(id, __ATOMIC_RELAXED); }

}  // namespace

RowGather::RowGather(Engine& engine, size_t table, const RowsOut& out, bool of_tokens)
    : engine_(engine),
      index_(table),
      table_(engine.tables()[table]),
      out_(out),
      of_tokens_(of_tokens),
      by_key_(of_tokens && table_.resident == nullptr && table_.token_keys != nullptr),
      rows_max_(by_key_ ? kKeyedRowsMax : kIdsMax) {
  if (!out.is_contiguous()) rows_max_ = std::min(rows_max_, kScratchBytes / table_.row_bytes);
  const size_t unit = of_tokens ? table_.num_heads() : 1;
  rows_max_ = std::max(rows_max_ / unit, size_t{1}) * unit;
  token_.resize(unit);
  key_.resize(table_.num_orders);
}

bool RowGather::gather(const EpochView& view, const int64_t* row_ids, size_t first, size_t count, Gathered& gathered) {
  const size_t row_bytes = table_.row_bytes;
  if (!out_.is_contiguous()) scratch_.resize(std::max(scratch_.size(), count * row_bytes));
  to_ = out_.is_contiguous() ? out_.rows + first * row_bytes : scratch_.data();
  first_ = first;
  run_start_ = 0;
  keys_.clear();
  ids_.clear();
  if (!split_in_runs(view, row_ids, count, gathered)) return false;
  // What was missed is copied too, and written again when it has come.
  for (size_t row = 0; !out_.is_contiguous() && row < count; ++row)
    out_.put(first + row, to_ + row * row_bytes, row_bytes);
  return true;
}

// Gathers tokens that follow one another and are all whole, or all not, at once.
bool RowGather::split_in_runs(const EpochView& view, const int64_t* row_ids, size_t count, Gathered& gathered) {
  const size_t unit = token_.size();
  for (size_t row = 0; row < count; row += unit) {
    for (size_t i = 0; i < unit; ++i) token_[i] = load(row_ids + row + i);
    const bool is_whole = by_key_ && find_keys(row);
    if (is_whole ? !ids_.empty() : !keys_.empty()) {
      if (!end_run(view, gathered)) return false;
      run_start_ = row;
    }
    if (is_whole) {
      keys_.insert(keys_.end(), key_.begin(), key_.end());
      unwanted_.insert(unwanted_.end(), unwanted_of_token_.begin(), unwanted_of_token_.end());
    } else {
      for (const int64_t id : token_) ids_.push_back(out_.wanted.holds(id) ? id : -1);
    }
  }
  return end_run(view, gathered);
}

// Finds the keys of the token at hand, and which of their rows are not wanted. Returns whether it is whole.
bool RowGather::find_keys(size_t row) {
  const size_t heads = table_.rows_per_key;
  const RowRange& wanted = out_.wanted;
  unwanted_of_token_.clear();
  for (size_t order = 0; order < table_.num_orders; ++order) {
    const int64_t* ids = token_.data() + order * heads;
    const auto num_wanted =
        wanted.is_all()
            ? heads
            : static_cast<size_t>(std::count_if(ids, ids + heads, [&](int64_t id) { return wanted.holds(id); }));
    key_[order] = num_wanted == 0 ? -1 : table_.token_keys->key(order, ids);
    if (key_[order] == TokenKeys::kNoKey) return false;
    for (size_t head = 0; num_wanted > 0 && num_wanted < heads && head < heads; ++head) {
      if (!wanted.holds(ids[head])) unwanted_of_token_.push_back(row + order * heads + head);
    }
  }
  return true;
}

// Gathers keys_ or ids_, whichever has some.
bool RowGather::end_run(const EpochView& view, Gathered& gathered) {
  const size_t first_miss = gathered.misses.size();
  uint8_t* const to = to_ + run_start_ * table_.row_bytes;
  const bool by_key = !keys_.empty();
  if (by_key ? !engine_.gather(view, index_, {keys_.data(), keys_.size()}, to, gathered)
             : !ids_.empty() && !engine_.gather_rows(index_, {ids_.data(), ids_.size()}, to, of_tokens_, gathered)) {
    return false;
  }
  const size_t first = (first_ + run_start_) / (by_key ? table_.rows_per_key : 1);
  for (size_t i = first_miss; i < gathered.misses.size(); ++i) gathered.misses[i].index += static_cast<uint32_t>(first);
  for (const size_t row : unwanted_) std::memset(to_ + row * table_.row_bytes, 0, table_.row_bytes);
  keys_.clear();
  ids_.clear();
  unwanted_.clear();
  return true;
}

}  // namespace tierstore

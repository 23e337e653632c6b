#include "row_gather.h"

#include <algorithm>
#include <cstring>

namespace tierstore {
namespace {

// Ids that are copied, and rows on their way through the scratch, stay in a core's caches. Keys are few bytes, and long
// runs of them are copied faster: see kStreamedBytes in engine.cpp.
constexpr size_t kIdsMax = 1 << 14, kScratchBytes = 1 << 19, kRowsMax = 1 << 19;

int64_t load(const int64_t* id) { return __atomic_load_n(id, __ATOMIC_RELAXED); }

}  // namespace

RowGather::RowGather(Engine& engine, size_t table, const RowsOut& out, bool of_tokens)
    : engine_(engine),
      index_(table),
      table_(engine.tables()[table]),
      out_(out),
      of_tokens_(of_tokens),
      by_key_(of_tokens && table_.resident == nullptr && table_.token_keys != nullptr),
      unit_(of_tokens ? table_.num_heads() : 1) {
  size_t rows_each = by_key_ ? kRowsMax : kIdsMax;
  if (!out.is_contiguous()) rows_each = std::min(rows_each, kScratchBytes / table_.row_bytes);
  rows_each_ = whole_tokens(rows_each);
  token_.resize(unit_);
  key_.resize(table_.num_orders);
}

size_t RowGather::whole_tokens(size_t num_rows) const { return std::max(num_rows / unit_, size_t{1}) * unit_; }

size_t RowGather::rows_max() const { return whole_tokens(kRowsMax); }

bool RowGather::gather(const EpochView& view, const int64_t* row_ids, size_t first, size_t count, Gathered& gathered) {
  whole_bytes_ = out_.is_contiguous() ? count * table_.row_bytes : 0;
  Crew& crew = engine_.crew();
  const size_t part_rows = std::min(rows_each_, whole_tokens(engine_.part_bytes() / table_.row_bytes));
  if (crew.num_threads() < 2 || count / part_rows < kPartsMin) {
    for (size_t start = 0; start < count; start += rows_each_) {
      const size_t num_rows = std::min(rows_each_, count - start);
      if (!gather_part(view, row_ids + start, first + start, num_rows, gathered)) return false;
    }
    return true;
  }
  struct Part {
    Gathered gathered;
    bool good = false;
  };
  std::vector<Part> parts((count + part_rows - 1) / part_rows);
  crew.run(parts.size(), [&](size_t number) {
    RowGather own(engine_, index_, out_, of_tokens_);
    own.whole_bytes_ = whole_bytes_;
    const size_t start = number * part_rows;
    Part part;
    part.good =
        own.gather_part(view, row_ids + start, first + start, std::min(part_rows, count - start), part.gathered);
    parts[number] = std::move(part);
  });
  for (const Part& part : parts) {
    gathered.misses.insert(gathered.misses.end(), part.gathered.misses.begin(), part.gathered.misses.end());
    if (gathered.fault.kind == FaultKind::kNone) gathered.fault = part.gathered.fault;
  }
  return std::all_of(parts.begin(), parts.end(), [](const Part& part) { return part.good; });
}

// On this thread alone.
bool RowGather::gather_part(const EpochView& view, const int64_t* row_ids, size_t first, size_t count,
                            Gathered& gathered) {
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
  for (size_t row = 0; row < count; row += unit_) {
    for (size_t i = 0; i < unit_; ++i) token_[i] = load(row_ids + row + i);
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
  if (by_key ? !engine_.gather(view, index_, {keys_.data(), keys_.size()}, to, gathered, Engine::PartOf{whole_bytes_})
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

#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "engine_runtime.h"
#include "gather.h"

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLookAgain{2};  // how often a closer looks whether all uses have ended
constexpr auto kRelaxed = std::memory_order_relaxed;

// A larger output would only push out of the caches what is copied next; a smaller one is read again soon.
constexpr size_t kStreamedBytes = 4 << 20;

}  // namespace

Engine::Engine(std::vector<Table> tables, const EngineShape& shape)
    : tables_(std::move(tables)),
      shape_(shape),
      runtime_(std::make_unique<Runtime>(shape.num_readers, shape.num_threads)),
      gate_(shape.epochs == nullptr
                ? std::make_unique<EpochGate>()
                : std::make_unique<EpochGate>(shape.epochs, shape.version,
                                              &ClientBlock::of(shape.client_block)->active[0].value,
                                              &ClientBlock::of(shape.client_block)->active[1].value)) {
  if (shape.reports) reports_ = std::make_unique<ReportWriter>(shape.client_block);
  for (uint32_t index = 0; index < tables_.size(); ++index) {
    Table& table = tables_[index];
    for (uint32_t shard = 0; shard < table.shards.size(); ++shard) {
      table.shards[shard].table = index;
      table.shards[shard].index = shard;
    }
    table_counters.emplace_back(table.num_orders);
    Table::each_file(table, [this](ShardFile& file) { number(file); });
  }
  while (runtime_->readers.size() < shape.num_readers && make_reader())
    continue;  // now, so that it is known whether they all are there
  if (runtime_->readers.empty()) throw std::runtime_error("no reader: out of memory, descriptors or locked memory");
}

Engine::~Engine() {
  if (close(shape_.wait_s)) return;
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  for (const std::unique_ptr<PageReader>& reader : runtime_->readers) reader->let_files_go();
  runtime_.release();
}

size_t Engine::num_readers() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return runtime_->readers.size();
}

size_t Engine::num_registered_readers() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return static_cast<size_t>(std::count_if(runtime_->readers.begin(), runtime_->readers.end(),
                                           [](const auto& reader) { return reader->is_registered(); }));
}

Crew& Engine::crew() { return runtime_->crew; }

// A file that several planes of a table share is one, and so are all that are not open: the kernel registers no more
// than a process may open.
void Engine::number(ShardFile& file) {
  const auto same = std::find_if(files_.begin(), files_.end(), [&file](const ShardFile* each) {
    return each->buffered_fd == file.buffered_fd && each->direct_fd == file.direct_fd;
  });
  file.number = static_cast<uint32_t>(same - files_.begin());
  if (same == files_.end()) files_.push_back(&file);
}

size_t Engine::num_free_readers() const {
  const std::lock_guard<std::mutex> lock(runtime_->mutex);
  return runtime_->free.size();
}

// Copies what memory holds of a list, which may be a part of a request's.
Found Engine::gather_part(const EpochView& view, size_t index, const PairList& list, const Output& out, bool streamed,
                          std::vector<Miss>& misses, int64_t& bad_page) {
  const Table& table = tables_[index];
  if (table.resident != nullptr) return gather_resident(table, list, out, bad_page);
  std::optional<ReportSink> reports;
  if (reports_ != nullptr) reports.emplace(*reports_, static_cast<uint16_t>(index));
  return gather_cached(table, view.epoch, static_cast<uint16_t>(index), list, out, streamed, misses,
                       reports ? &*reports : nullptr);
}

// The same, by the crew where there is enough to do.
Found Engine::gather_shared(const EpochView& view, size_t index, const PairList& list, const Output& out,
                            Gathered& gathered, const std::optional<PartOf>& part_of) {
  const Table& table = tables_[index];
  struct Part {
    PairList list;
    Found found;
    std::vector<Miss> misses;
    int64_t bad_page = -1;
  };
  Crew& crew = runtime_->crew;
  const size_t num_bytes = list.count * table.entry_bytes();
  const bool streamed = (part_of ? part_of->whole_bytes : num_bytes) > kStreamedBytes;
  const size_t parts_max = num_bytes / shape_.part_bytes;
  int64_t bad_page = -1;
  Found found;
  if (part_of || crew.num_threads() < 2 || parts_max < kPartsMin) {
    found = gather_part(view, index, list, out, streamed, gathered.misses, bad_page);
  } else {
    const size_t whole = list.pairs != nullptr ? 1 : table.num_orders;
    const size_t num_wholes = list.count / whole;
    const size_t pairs_each = (num_wholes + parts_max - 1) / parts_max * whole;
    std::vector<Part> parts((list.count + pairs_each - 1) / pairs_each);
    crew.run(parts.size(), [&](size_t number) {
      Part part{list.part(number * pairs_each, pairs_each), {}, {}, -1};
      part.found = gather_part(view, index, part.list, out, streamed, part.misses, part.bad_page);
      parts[number] = std::move(part);
    });
    for (const Part& part : parts) {
      found.add(part.found);
      gathered.misses.insert(gathered.misses.end(), part.misses.begin(), part.misses.end());
      if (bad_page < 0) bad_page = part.bad_page;
    }
  }
  if (bad_page >= 0) gathered.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
  return found;
}

bool Engine::gather(const EpochView& view, size_t index, const PairList& list, const Output& out, Gathered& gathered,
                    const std::optional<PartOf>& part_of) {
  const Table& table = tables_[index];
  const size_t first_miss = gathered.misses.size();
  const bool may_change = table.resident == nullptr;
  Found found;
  if (view.alive || !may_change) found = gather_shared(view, index, list, out, gathered, part_of);
  if (may_change && !(view.alive && gate_->holds(view))) {
    gathered.misses.resize(first_miss);
    found = gather_nothing(table, static_cast<uint16_t>(index), list, out, gathered.misses);
  }
  if (may_change) table.cache->count_accesses(list.count);
  if (!found.good) return false;
  uint64_t misses_of[kOrdersMax] = {}, sentinels = 0;
  for (size_t i = first_miss; i < gathered.misses.size(); ++i) ++misses_of[gathered.misses[i].order];
  TableCounters& counts = table_counters[index];
  for (size_t order = 0; order < table.num_orders; ++order) {
    counts.hits[order].fetch_add(found.pairs[order] - found.sentinels[order] - misses_of[order], kRelaxed);
    if (found.static_hits[order] > 0) counts.static_hits[order].fetch_add(found.static_hits[order], kRelaxed);
    if (misses_of[order] > 0) counts.misses[order].fetch_add(misses_of[order], kRelaxed);
    sentinels += found.sentinels[order];
  }
  if (sentinels > 0) counters.sentinels.fetch_add(sentinels, kRelaxed);
  return true;
}

bool Engine::gather_rows(size_t index, const PairList& ids, uint8_t* out, bool of_tokens, Gathered& gathered) {
  const Table& table = tables_[index];
  const size_t first_miss = gathered.misses.size();
  if (table.resident != nullptr) {
    int64_t bad_page = -1;
    if (!gather_resident_rows(table, ids, out, bad_page).good) return false;
    if (bad_page >= 0) gathered.fault = {FaultKind::kBadPage, static_cast<uint32_t>(index), bad_page, kPageBadChecksum};
  } else {
    for (size_t i = 0; i < ids.count; ++i) {
      const int64_t id = ids.key(i);
      const size_t row = ids.first + i;
      if (id == -1) {
        std::memset(out + row * table.row_bytes, 0, table.row_bytes);
      } else if (static_cast<uint64_t>(id) < table.num_rows) {
        gathered.misses.push_back(
            {id, static_cast<uint32_t>(row), static_cast<uint16_t>(index), kRowRequest, kNotPlaced});
      } else {
        return false;
      }
    }
  }
  count_rows(index, ids, of_tokens && table.resident != nullptr);
  counters.rows_missed.fetch_add(gathered.misses.size() - first_miss, kRelaxed);
  return true;
}

void Engine::locate(const EpochView& view, size_t index, const int64_t* keys, size_t num_tokens, uint8_t* sources) {
  const Table& table = tables_[index];
  const PairList list{keys, num_tokens * table.num_orders};
  for (size_t i = 0; i < list.count; ++i) {
    const int64_t key = list.key(i);
    const auto order = static_cast<uint8_t>(i % table.num_orders);
    const bool has_statics = key >= 0 && view.alive && table.statics.records != nullptr;
    const EntryIndex placed_keys = has_statics ? table.statics.areas[view.epoch & 1].order(order) : EntryIndex{};
    const uint32_t placed = placed_keys.find(placed_keys.find_bucket(key), key);
    if (key < 0) {
      sources[i] = kFromNowhere;
    } else if (table.resident != nullptr) {
      sources[i] = kFromResident;
    } else if (table.statics.loads(placed)) {
      sources[i] = kFromStatic;
    } else if (view.alive &&
               table.cache->probe(table.cache->find_set(table.tagged(order), key), table.tagged(order), key).way >= 0) {
      sources[i] = kFromRecency;
    } else {
      sources[i] = table.record_of(order, key, placed) == kNotPlaced ? kFromPages : kFromRecord;
    }
  }
}

void Engine::count_batch(const Gathered& gathered) {
  counters.batches.fetch_add(1, kRelaxed);
  if (gathered.misses.empty()) counters.zero_miss_batches.fetch_add(1, kRelaxed);
}

// Counts what is asked for by row id: keys of whole tokens, which memory holds, or single rows.
void Engine::count_rows(size_t index, const PairList& ids, bool of_tokens) {
  const Table& table = tables_[index];
  const size_t rows_per_key = of_tokens ? table.rows_per_key : 1;
  uint64_t found_of[kOrdersMax] = {}, num_found = 0, num_keys = 0;
  for (size_t i = 0; i < ids.count; ++i) {
    const size_t row = ids.first + i;
    if (row % rows_per_key != 0) continue;  // a key's rows are all there, or none is
    const bool found = ids.key(i) >= 0;
    ++num_keys;
    num_found += found;
    found_of[of_tokens ? row / rows_per_key % table.num_orders : 0] += found;
  }
  if (!of_tokens) {
    counters.rows.fetch_add(num_found, kRelaxed);
    return;
  }
  for (size_t order = 0; order < table.num_orders; ++order)
    table_counters[index].hits[order].fetch_add(found_of[order], kRelaxed);
  counters.sentinels.fetch_add(num_keys - num_found, kRelaxed);
}

std::shared_ptr<Job> Engine::make_job(Gathered gathered, const std::vector<std::pair<size_t, RowsOut>>& outputs) const {
  std::vector<RowsOut> by_table(tables_.size());
  for (const auto& [table, out] : outputs) by_table[table] = out;
  return std::make_shared<Job>(std::move(gathered), std::move(by_table));
}

bool Engine::close(double limit_s) {
  closed_ = true;
  Runtime& runtime = *runtime_;
  {
    std::unique_lock<std::mutex> lock(runtime.mutex);
    const auto deadline = Clock::now() + clock_seconds(limit_s);
    // Uses first: they alone bring jobs. A use ends without the mutex, for which it might wait with the interpreter's
    // lock, while who forks has it the other way.
    while (!gate_->is_empty()) {
      if (Clock::now() >= deadline) return false;
      runtime.use_ended.wait_for(lock, kLookAgain);
    }
    if (!runtime.job_ended.wait_until(lock, deadline, [&] { return runtime.under_way.size() == 0; })) return false;
    if (runtime.stopping) return runtime.use_ended.wait_until(lock, deadline, [&] { return runtime.ended; });
    runtime.stopping = true;
  }
  runtime.work_came.notify_all();
  for (std::thread& worker : runtime.workers) worker.join();
  runtime.workers.clear();
  runtime.crew.stop();
  runtime.free.clear();
  runtime.readers.clear();
  runtime.pool.reset();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.ended = true;
  runtime.use_ended.notify_all();
  return true;
}

void Engine::before_fork() {
  next_runtime_ = std::make_unique<Runtime>(shape_.num_readers, shape_.num_threads);
  runtime_->mutex.lock();
  for (Table& table : tables_) {
    if (table.cache) table.cache->writer().lock();
  }
}

void Engine::after_fork(bool in_child) {
  for (Table& table : tables_) {
    if (table.cache) table.cache->writer().unlock();
  }
  runtime_->mutex.unlock();
  if (!in_child) {
    next_runtime_.reset();
    return;
  }
  // The parent's threads, their locks and their reads are not here. The old runtime is left as it lies.
  Runtime* old = runtime_.release();
  runtime_ = std::move(next_runtime_);
  for (const std::unique_ptr<PageReader>& reader : old->readers) reader->abandon_after_fork();
  if (gate_->is_shared()) closed_ = true;
  reports_.reset();
  gate_->forget();
  for (Job* job = old->under_way.first(); job != nullptr; job = job->after) job->end_after_fork();
}

}  // namespace tierstore

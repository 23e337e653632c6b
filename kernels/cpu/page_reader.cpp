#include "page_reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "racing_copy.h"

namespace tierstore {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

constexpr size_t kAwaitedMax = 32;       // reads that are waited for together, if they are the last
constexpr size_t kCompletedAtOnce = 32;  // between two looks at the clock, and at whether the job is cancelled

constexpr size_t kAskedForMax = 8192;  // bytes of a page that are asked for at once; of larger ones the start

}  // namespace

PageReader::PageReader(const std::vector<Table>& tables, const PageReaderShape& shape, std::unique_ptr<PageQueue> queue,
                       FaultPlan& faults, ReadCounters& counters)
    : tables_(tables),
      shape_(shape),
      queue_(std::move(queue)),
      faults_(faults),
      counters_(counters),
      flights_(shape.depth) {
  free_slots_.reserve(shape.depth);
  reads_.reserve(shape.depth);
  done_.reserve(shape.depth);
  void* memory =
      mmap(nullptr, round_up(shape.staging_bytes(), 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // The kernel writes into it at any time: a fork must neither copy it nor make the parent write to a copy.
  madvise(memory, round_up(shape.staging_bytes(), 4096), MADV_DONTFORK);
  staging_ = static_cast<uint8_t*>(memory);
  queue_->register_memory(staging_, shape.depth * shape.page_bytes);
  batches_[0].assembly = staging_ + shape.depth * shape.page_bytes;
  batches_[1].assembly = batches_[0].assembly + shape.assembly_bytes;
  for (size_t slot = shape.depth; slot-- > 0;) free_slots_.push_back(static_cast<uint32_t>(slot));
}

PageReader::~PageReader() {
  if (in_flight_ > 0) {
    queue_->let_files_go();
    queue_.release();
  } else if (staging_ != nullptr) {
    munmap(staging_, round_up(shape_.staging_bytes(), 4096));
  }
}

void PageReader::abandon_after_fork() {
  queue_->abandon_after_fork();
  queue_.release();  // what is left of it may be in the middle of anything
  staging_ = nullptr;
  in_flight_ = 0;
}

void PageReader::abandon(const Fault& fault) {
  fail(fault);
  abandoned_.misses.clear();
  abandoned_.fault = fault;
  next_miss_ = 0;
  job_ = &abandoned_;
}

void PageReader::begin(Job& job) noexcept {
  job_ = &job;
  next_miss_ = 0;
  last_arrival_ = std::chrono::steady_clock::now();
  fill_batches();
  start_reads();
}

bool PageReader::run(int slice_ms) noexcept {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(slice_ms);
  while (job_ != nullptr) {
    if (in_flight_ == 0 && !active(batches_[0]) && !active(batches_[1]) && next_miss_ == job_->misses.size()) {
      job_ = nullptr;
      break;
    }
    const auto now = std::chrono::steady_clock::now();
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - now);
    if (left.count() <= 0) break;
    if (done_next_ == done_.size()) {
      done_.clear();
      done_next_ = 0;
      queue_->reap(done_, num_awaited(), static_cast<int>(left.count()));
      if (done_.empty()) continue;
      last_arrival_ = now;  // a slice early at most
    }
    while (done_next_ < done_.size()) {
      complete_some();
      if (done_next_ < done_.size() && std::chrono::steady_clock::now() >= until) {
        note_counts();
        return false;
      }
    }
    fill_batches();
    start_reads();
  }
  note_counts();
  queue_->send();  // who goes on may be another thread, and some time away
  return job_ == nullptr;
}

// How many reads are waited for at once: half of what is in flight, so that the queue never runs dry; of the last few,
// all, since their rows are not there sooner if some are copied before the others come.
size_t PageReader::num_awaited() const {
  const auto has_more = [this](const ReadBatch& batch) {
    return active(batch) && batch.groups_started + 1 < batch.group_starts.size();
  };
  const bool last = next_miss_ == job_->misses.size() && !has_more(batches_[0]) && !has_more(batches_[1]);
  return last && in_flight_ <= kAwaitedMax ? in_flight_ : std::max(size_t{1}, in_flight_ / 2);
}

// Completes a few of the reads that have arrived.
void PageReader::complete_some() {
  const std::lock_guard<std::mutex> lock(job_->writing);
  if (job_->cancelled() && job_->fault.kind == FaultKind::kNone) fail({FaultKind::kCancelled, 0, 0, 0});
  const size_t at_once = faults_.is_on() ? 1 : kCompletedAtOnce;  // a slow read takes as long as many others
  for (size_t i = 0; i < at_once && done_next_ < done_.size(); ++i) {
    const PageDone& done = done_[done_next_++];
    ask_for_next();
    complete(done);
  }
}

// A page that has just arrived is in no cache near this core: it comes while the one before is checked.
void PageReader::ask_for_next() const {
  if (done_next_ == done_.size()) return;
  fetch(staging_ + done_[done_next_].slot * shape_.page_bytes, std::min(shape_.page_bytes, kAskedForMax));
}

// Adds what was counted to the counters of all page readers.
void PageReader::note_counts() {
  if (counted_.bytes == 0) return;
  counters_.pages.fetch_add(counted_.pages, std::memory_order_relaxed);
  counters_.entries.fetch_add(counted_.entries, std::memory_order_relaxed);
  counters_.bytes.fetch_add(counted_.bytes, std::memory_order_relaxed);
  counters_.row_bytes.fetch_add(counted_.row_bytes, std::memory_order_relaxed);
  counted_ = {};
}

void PageReader::fill_batches() {
  for (ReadBatch& batch : batches_) {
    if (active(batch) || next_miss_ >= job_->misses.size()) continue;
    try {
      plan_batch(batch);
    } catch (const std::bad_alloc&) {
      batch.groups_left = 0;
      fail({FaultKind::kNoMemory, 0, 0, 0});
    }
  }
}

// The first fault ends the job: nothing more is started, what is in flight completes, and no rows are handed out.
void PageReader::fail(const Fault& fault) {
  if (job_->fault.kind == FaultKind::kNone) job_->fault = fault;
  next_miss_ = job_->misses.size();
  for (ReadBatch& batch : batches_) {
    if (!active(batch)) continue;
    const size_t never_started = batch.group_starts.size() - 1 - batch.groups_started;
    batch.groups_left -= never_started;
    batch.groups_started = batch.group_starts.size() - 1;
  }
}

}  // namespace tierstore

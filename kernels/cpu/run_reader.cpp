#include "run_reader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kUnitBytes = 4096;
constexpr uint64_t kGapBytes = 8192;              // between records that one read brings
constexpr int kSliceMs = 50;                      // between two looks at signals
constexpr std::chrono::seconds kStalledMax{300};  // without any read that ends
constexpr size_t kPoolThreads = 8;

}  // namespace

RunFile::~RunFile() {
  if (file.buffered_fd >= 0) close(file.buffered_fd);
  if (file.direct_fd >= 0) close(file.direct_fd);
}

RunReader::RunReader(const RunReaderShape& shape, ReadMode mode)
    : shape_(shape), owner_(getpid()), files_(std::make_shared<Files>()) {
  if (mode == ReadMode::kPread) pool_ = PreadPool::make(kPoolThreads);
  free_means_.reserve(shape.num_calls);
  for (size_t i = 0; i < shape.num_calls; ++i) {
    auto means = std::make_unique<Means>();
    means->free_slots.reserve(shape.depth);
    for (size_t slot = shape.depth; slot-- > 0;) means->free_slots.push_back(static_cast<uint32_t>(slot));
    // Runs come and go: their descriptors are not registered with the ring.
    means->queue = mode == ReadMode::kPread ? pool_->make_queue(shape.depth) : make_uring_queue(shape.depth, {});
    void* memory = mmap(nullptr, staging_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // The kernel writes into it at any time: a fork must neither copy it nor make the parent write to a copy.
    madvise(memory, staging_bytes(), MADV_DONTFORK);
    means->staging = static_cast<uint8_t*>(memory);
    means->queue->register_memory(means->staging, staging_bytes());
    free_means_.push_back(means.get());
    means_.push_back(std::move(means));
  }
}

// No call is under way. What was left to a read that hangs is leaked: the kernel may still write to it.
RunReader::~RunReader() {
  if (owner_ != getpid()) {
    for (const auto& means : means_) {
      means->queue->abandon_after_fork();
      static_cast<void>(means->queue.release());
    }
    static_cast<void>(pool_.release());
    return;
  }
  for (const auto& means : means_) free_staging(*means);
}

void RunReader::free_staging(Means& means) const {
  if (means.free_slots.size() < shape_.depth) {
    means.queue->let_files_go();
    static_cast<void>(means.queue.release());
  } else if (means.staging != nullptr) {
    means.queue.reset();
    munmap(means.staging, staging_bytes());
  }
}

void RunReader::add(uint16_t ordinal, std::shared_ptr<const RunFile> run) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto files = std::make_shared<Files>(*files_);
  if (files->size() <= ordinal) files->resize(ordinal + size_t{1});
  if ((*files)[ordinal] != nullptr) throw std::invalid_argument("a run has this ordinal");
  (*files)[ordinal] = std::move(run);
  files_ = std::move(files);
}

void RunReader::remove(uint16_t ordinal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto files = std::make_shared<Files>(*files_);
  if (ordinal < files->size()) (*files)[ordinal] = nullptr;
  files_ = std::move(files);
}

RunReader::Means* RunReader::take_means() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!given_back_.wait_for(lock, kStalledMax, [this] { return !free_means_.empty(); })) return nullptr;
  Means* means = free_means_.back();
  free_means_.pop_back();
  return means;
}

// Those with a read that hangs are never taken again.
void RunReader::give_back(Means* means) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (means->free_slots.size() == shape_.depth) free_means_.push_back(means);
  }
  given_back_.notify_one();
}

// One `read`, from its sorted places to the last record.
class RunReader::Call {
 public:
  Call(RunReader& reader, Means& means, const Files& files, const int64_t* row_ids, uint8_t* out, size_t out_stride)
      : reader_(reader), means_(means), files_(files), row_ids_(row_ids), out_(out), out_stride_(out_stride) {}

  // Sorts, checks that every place exists, and plans the reads.
  void plan(const uint16_t* runs, const uint32_t* places, size_t count) {
    wanted_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const uint16_t ordinal = runs[i];  // another thread may change the array: loaded once
      const uint32_t place = places[i];
      const RunFile* run = ordinal < files_.size() ? files_[ordinal].get() : nullptr;
      if (run == nullptr || place >= run->num_records)
        return note({RunFaultKind::kNoRun, ordinal, place, row_ids_[i], 0});
      wanted_.push_back({uint64_t{ordinal} << 32 | place, static_cast<uint32_t>(i)});
    }
    std::sort(wanted_.begin(), wanted_.end(), [](const Wanted& a, const Wanted& b) { return a.where < b.where; });
    groups_.reserve(count);
    for (size_t i = 0; i < count; ++i) add_to_groups(i);
    flights_.resize(reader_.shape_.depth);
    reads_.reserve(reader_.shape_.depth);
    done_.reserve(reader_.shape_.depth);
  }

  RunFault run(const std::function<bool()>& interrupted) {
    auto last_arrival = Clock::now(), last_look = last_arrival;
    while (in_flight() > 0 || (fault_.kind == RunFaultKind::kNone && next_group_ < groups_.size())) {
      if (fault_.kind == RunFaultKind::kNone) start();
      done_.clear();
      means_.queue->reap(done_, std::max<size_t>(1, in_flight() / 2), kSliceMs);
      for (const PageDone& done : done_) complete(done);
      const auto now = Clock::now();
      if (!done_.empty()) last_arrival = now;
      if (now - last_arrival > kStalledMax) {
        note({RunFaultKind::kTimeout, 0, 0, 0, static_cast<int>(kStalledMax.count())});
        break;  // what is in flight keeps its slots, and so these means are never used again
      }
      if (now - last_look > std::chrono::milliseconds(kSliceMs)) {
        last_look = now;
        if (fault_.kind == RunFaultKind::kNone && interrupted()) note({RunFaultKind::kInterrupted, 0, 0, 0, 0});
      }
    }
    return fault_;
  }

  const RunFault& fault() const { return fault_; }

 private:
  const RunFile& file_of(const Wanted& wanted) const { return *files_[wanted.where >> 32]; }
  uint64_t byte_of(const Wanted& wanted) const {
    return file_of(wanted).byte_start + (wanted.where & UINT32_MAX) * reader_.shape_.record.record_bytes;
  }
  size_t in_flight() const { return reader_.shape_.depth - means_.free_slots.size(); }

  void add_to_groups(size_t i) {
    const uint64_t start = byte_of(wanted_[i]) / kUnitBytes * kUnitBytes;
    const uint64_t end =
        (byte_of(wanted_[i]) + reader_.shape_.record.record_bytes + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
    if (!groups_.empty()) {
      Group& last = groups_.back();
      const bool same_run = wanted_[last.begin].where >> 32 == wanted_[i].where >> 32;
      if (same_run && start <= last.byte_start + last.num_bytes + kGapBytes &&
          end - last.byte_start <= reader_.shape_.read_bytes) {
        last.end = i + 1;
        last.num_bytes = static_cast<uint32_t>(std::max(end - last.byte_start, uint64_t{last.num_bytes}));
        return;
      }
    }
    groups_.push_back({i, i + 1, start, static_cast<uint32_t>(end - start)});
  }

  void start() {
    reads_.clear();
    uint64_t num_bytes = 0;
    while (!means_.free_slots.empty() && next_group_ < groups_.size()) {
      const Group& group = groups_[next_group_];
      const uint32_t slot = means_.free_slots.back();
      means_.free_slots.pop_back();
      flights_[slot] = next_group_++;
      reads_.push_back({&file_of(wanted_[group.begin]).file, group.byte_start, group.num_bytes, slot, at(slot)});
      num_bytes += group.num_bytes;
    }
    if (reads_.empty()) return;
    reader_.num_reads_.fetch_add(reads_.size(), std::memory_order_relaxed);
    reader_.num_bytes_read_.fetch_add(num_bytes, std::memory_order_relaxed);
    means_.queue->start(reads_);
  }

  uint8_t* at(uint32_t slot) const { return means_.staging + slot * reader_.shape_.read_bytes; }

  void complete(PageDone done) {
    const Group& group = groups_[flights_[done.slot]];
    const uint8_t* bytes = at(done.slot);
    reader_.faults_.apply(done, at(done.slot), group.num_bytes);
    means_.free_slots.push_back(done.slot);
    if (fault_.kind != RunFaultKind::kNone) return;
    for (size_t i = group.begin; i < group.end; ++i) {
      const Wanted& wanted = wanted_[i];
      const RunFaultKind kind =
          done.error != 0 ? RunFaultKind::kDisk : check(wanted, bytes + (byte_of(wanted) - group.byte_start));
      if (kind != RunFaultKind::kNone) {
        return note({kind, static_cast<uint16_t>(wanted.where >> 32), static_cast<uint32_t>(wanted.where),
                     row_ids_[wanted.index], done.error});
      }
      std::memcpy(out_ + wanted.index * out_stride_, bytes + (byte_of(wanted) - group.byte_start),
                  reader_.shape_.record.record_bytes - kRecordTrailerBytes);
    }
  }

  RunFaultKind check(const Wanted& wanted, const uint8_t* record) const {
    const RecordShape& shape = reader_.shape_.record;
    if (!record_is_whole(record, shape)) return RunFaultKind::kDamaged;
    const bool is_it = record_is_of(record, shape, file_of(wanted).number, row_ids_[wanted.index]);
    return is_it ? RunFaultKind::kNone : RunFaultKind::kOtherRow;
  }

  void note(const RunFault& fault) { fault_ = fault; }

  RunReader& reader_;
  Means& means_;
  const Files& files_;
  const int64_t* row_ids_;
  uint8_t* out_;
  size_t out_stride_;
  std::vector<Wanted> wanted_;
  std::vector<Group> groups_;
  std::vector<size_t> flights_;  // by slot: its group
  std::vector<PageRead> reads_;
  std::vector<PageDone> done_;
  size_t next_group_ = 0;
  RunFault fault_;
};

RunFault RunReader::read(const int64_t* row_ids, const uint16_t* runs, const uint32_t* places, size_t count,
                         uint8_t* out, size_t out_stride, const std::function<bool()>& interrupted) {
  if (owner_ != getpid()) throw std::invalid_argument("runs were opened before this process forked; open them again");
  if (count == 0) return {};
  Means* const means = take_means();
  if (means == nullptr) return {RunFaultKind::kTimeout, 0, 0, 0, static_cast<int>(kStalledMax.count())};
  std::shared_ptr<const Files> files;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    files = files_;
  }
  RunFault fault;
  try {
    Call call(*this, *means, *files, row_ids, out, out_stride);
    call.plan(runs, places, count);
    fault = call.fault().kind == RunFaultKind::kNone ? call.run(interrupted) : call.fault();
  } catch (...) {
    give_back(means);
    throw;
  }
  if (fault.kind == RunFaultKind::kTimeout) new std::shared_ptr<const Files>(files);  // a read that hangs needs them
  give_back(means);
  return fault;
}

}  // namespace tierstore

#include "reports.h"

#include <algorithm>
#include <new>

#include "mix.h"

namespace tierstore {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr int kReserveTries = 16;  // each fails only because another writer's did not

uint32_t seal_of(uint64_t position, int64_t key) {
  return static_cast<uint32_t>(position / kNumRingReports + 1) ^ static_cast<uint32_t>(mix(static_cast<uint64_t>(key)));
}

}  // namespace

void init_client_block(uint8_t* block) {
  auto* made = new (block) ClientBlock{};
  made->magic.store(kClientBlockMagic, std::memory_order_release);
}

void ReportWriter::add(const Report* reports, size_t num_reports) {
  // Room is reserved by compare-exchange and not by adding: a sum that has gone past the room cannot be taken back once
  // another writer has added to it. `read` only grows, so a value from before the exchange leaves too little room and
  // never too much; and it is loaded first, so that it is not ahead of `start`.
  uint64_t start = 0;
  size_t num_added = 0;
  for (int tries = 0; tries < kReserveTries; ++tries) {
    const uint64_t read = block_->read.value.load(std::memory_order_acquire);
    start = block_->written.value.load(kRelaxed);
    const uint64_t unread = start - read;
    const size_t room = unread < kNumRingReports ? kNumRingReports - static_cast<size_t>(unread) : 0;
    const size_t wanted = std::min(num_reports, room);
    if (wanted == 0) break;
    if (block_->written.value.compare_exchange_strong(start, start + wanted, kRelaxed)) {
      num_added = wanted;
      break;
    }
  }
  for (size_t i = 0; i < num_added; ++i) {
    const Report& report = reports[i];
    auto& record = block_->records[(start + i) % kNumRingReports];
    record.key.store(report.key, kRelaxed);
    record.rest.store(report.table | uint64_t{report.order} << 16 | uint64_t{report.source_and_weight} << 24 |
                          uint64_t{seal_of(start + i, report.key)} << 32,
                      std::memory_order_release);
  }
  if (num_added < num_reports) block_->dropped.value.fetch_add(num_reports - num_added, kRelaxed);
}

size_t ReportReader::take(Report* out, size_t max) {
  const uint64_t written = block_->written.value.load(std::memory_order_acquire);
  uint64_t waiting = written - position_;
  if (waiting > kNumRingReports) {  // no writer goes so far: the block says nonsense, and the reader goes on from there
    lost_ += kNumRingReports;
    position_ = written;
    waiting = overdue_ = 0;
  }
  size_t num_taken = 0;
  uint64_t passed = 0;
  for (; passed < waiting && num_taken < max; ++passed) {
    const auto& record = block_->records[(position_ + passed) % kNumRingReports];
    const uint64_t rest = record.rest.load(std::memory_order_acquire);
    const int64_t key = record.key.load(kRelaxed);
    if (rest >> 32 == seal_of(position_ + passed, key)) {
      out[num_taken++] = {key, static_cast<uint16_t>(rest), static_cast<uint8_t>(rest >> 16),
                          static_cast<uint8_t>(rest >> 24)};
    } else if (passed < overdue_) {
      ++lost_;
    } else {
      break;
    }
  }
  position_ += passed;
  overdue_ = waiting - passed;
  block_->read.value.store(position_, std::memory_order_release);
  return num_taken;
}

}  // namespace tierstore

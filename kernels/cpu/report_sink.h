// What one lookup has to report to the daemon, gathered so that the ring is reserved once for many.
//
// Reported are all misses, since the daemon reads them for the recency cache; all hits there whose uses it still
// counts, since a reader of a read-only mapping cannot count them itself; and of the others, which only learning wants,
// one in 16 by chance, with that weight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reports.h"

namespace tierstore {

class ReportSink {
 public:
  ReportSink(ReportWriter& writer, uint16_t table) : writer_(writer), table_(table) {}
  ~ReportSink() { flush(); }
  ReportSink(const ReportSink&) = delete;
  ReportSink& operator=(const ReportSink&) = delete;

  void all(uint8_t order, int64_t key, uint8_t source) { add(order, key, source); }

  void some(uint8_t order, int64_t key, uint8_t source) {
    // The generator of MMIX (Knuth, TAOCP 2, 3.3.4); its high bits are good enough for chance.
    thread_local uint64_t state = reinterpret_cast<uintptr_t>(&state);
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    if (state >> (64 - kShareLog2) == 0) add(order, key, static_cast<uint8_t>(source | kShareLog2 << 3));
  }

 private:
  static constexpr unsigned kShareLog2 = 4;
  static constexpr size_t kBuffered = 64;

  void add(uint8_t order, int64_t key, uint8_t source_and_weight) {
    buffer_[num_buffered_++] = {key, table_, order, source_and_weight};
    if (num_buffered_ == kBuffered) flush();
  }

  void flush() {
    if (num_buffered_ > 0) writer_.add(buffer_, num_buffered_);
    num_buffered_ = 0;
  }

  ReportWriter& writer_;
  const uint16_t table_;
  size_t num_buffered_ = 0;
  Report buffer_[kBuffered];
};

}  // namespace tierstore

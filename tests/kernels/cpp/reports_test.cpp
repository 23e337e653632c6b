// Reports and counts under threads, and a writer of reports that is killed: built and run as lookup_path_test.cpp is.
// Prints what failed; exit status 1 if anything did.
//
//   reports_test ring    many write while one takes: every report taken was written, none twice, and the sums are right
//   reports_test counts  many count while others look and halve: no key is counted more often than it was reported
//   reports_test kill    a writer in another process is killed after every instruction of an `add`
#include "reports.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "key_counts.h"
#include "mix.h"

using namespace tierstore;

namespace {

// Every field of a report is told by its key, so that a torn one shows.
Report told(int64_t key) {
  const uint64_t mixed = mix(static_cast<uint64_t>(key) + 1);
  return {key, static_cast<uint16_t>(mixed), static_cast<uint8_t>(mixed >> 16), static_cast<uint8_t>(mixed >> 24)};
}

bool is_told(const Report& report) {
  const Report expected = told(report.key);
  return report.table == expected.table && report.order == expected.order &&
         report.source_and_weight == expected.source_and_weight;
}

constexpr int64_t kThreads = 4;

struct Ring {
  Block block{kClientBlockBytes};
  std::atomic<bool> enough{false};
  std::atomic<uint64_t> num_calls{0}, num_written{0};
  std::atomic<int64_t> writing{kThreads};
};

// Thread t writes keys t, t + kThreads, ... until enough were taken, and no more than two rings of them between two
// calls of the reader: so both are at work at once, however they run.
void write_until_enough(Ring& ring, int64_t key, size_t batch) {
  ReportWriter writer(ring.block.data);
  std::vector<Report> reports(batch);
  uint64_t calls = 0;
  for (size_t since_call = 0; !ring.enough; ring.num_written += batch) {
    while (since_call >= 2 * kNumRingReports && calls == ring.num_calls && !ring.enough) std::this_thread::yield();
    since_call = calls == ring.num_calls ? since_call + batch : batch;
    calls = ring.num_calls;
    for (Report& report : reports) {
      report = told(key);
      key += kThreads;
    }
    writer.add(reports.data(), batch);
  }
  --ring.writing;
}

void test_ring(size_t batch) {
  constexpr uint64_t kEnough = 100'000;
  Ring ring;
  init_client_block(ring.block.data);
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < kThreads; ++first) {
    threads.emplace_back([&ring, first, batch] { write_until_enough(ring, first, batch); });
  }
  ReportReader reader(ring.block.data);
  std::vector<bool> seen;
  std::vector<Report> out(kNumRingReports);
  uint64_t num_taken = 0, wrong = 0;
  for (int calls_left = 3; calls_left > 0;) {
    if (ring.writing == 0) --calls_left;
    ++ring.num_calls;
    const size_t count = reader.take(out.data(), out.size());
    if (count == 0) std::this_thread::yield();  // who asks without end takes every stopped writer for dead
    num_taken += count;
    ring.enough = num_taken >= kEnough;
    for (size_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(out[i].key);
      if (!is_told(out[i])) {
        ++wrong;
        continue;
      }
      if (at >= seen.size()) seen.resize(2 * at + 1);
      wrong += seen[at];
      seen[at] = true;
    }
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(num_taken + reader.lost() + reader.dropped() == ring.num_written);
  std::printf("ring, %zu at once: %llu reports checked, %llu lost, %llu dropped\n", batch,
              static_cast<unsigned long long>(num_taken), static_cast<unsigned long long>(reader.lost()),
              static_cast<unsigned long long>(reader.dropped()));
}

void test_counts() {
  constexpr size_t kSets = 64, kKeys = 400, kEach = 50'000;
  Block memory(kSets * sizeof(KeyCountSet));
  KeyCounts counts(memory.data, kSets);
  std::atomic<uint32_t> reported[kKeys] = {};
  std::atomic<uint64_t> wrong{0}, checked{0};
  std::atomic<int> writing{3};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      for (size_t i = 0; i < kEach; i += 10) {
        Report reports[10];
        for (Report& report : reports) {
          report = {static_cast<int64_t>(next_random(state) * next_random(state) % kKeys), 1, 2, 0};
          ++reported[report.key];
        }
        counts.add(reports, 10);
        if (i % 10'000 == 0) counts.age();
      }
      --writing;
    });
  }
  threads.emplace_back([&] {
    std::vector<uint8_t> order_index(kSets * kCountSlots);
    std::vector<int64_t> keys(order_index.size());
    std::vector<uint32_t> found(order_index.size());
    while (writing > 0) {
      const size_t count = counts.copy_above(1, 1, {}, {order_index.data(), keys.data(), found.data(), keys.size()});
      for (size_t i = 0; i < count; ++i) {
        if (order_index[i] != 2 || static_cast<size_t>(keys[i]) >= kKeys || found[i] > reported[keys[i]]) ++wrong;
      }
      checked += count;
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(counts.num_used() == counts.num_above(1, 1, {}));
  while (counts.num_used() > 0) counts.age();
  CHECK(std::all_of(memory.data, memory.data + memory.num_bytes, [](uint8_t byte) { return byte == 0; }));
  std::printf("counts: %llu checked\n", static_cast<unsigned long long>(checked.load()));
}

void test_kill() {
  Block block(kClientBlockBytes, MAP_SHARED);
  std::vector<Report> out(kNumRingReports), old, reports;
  for (int64_t key = 0; key < static_cast<int64_t>(kNumRingReports); ++key) old.push_back(told(key));
  for (int64_t key = 0; key < 4; ++key) reports.push_back(told(1'000'000 + key));
  uint64_t num_checked = 0, num_lost = 0;
  long steps = 0;
  for (bool more = true; more; ++steps) {
    init_client_block(block.data);
    ReportReader reader(block.data);
    ReportWriter writer(block.data);
    writer.add(old.data(), old.size());  // a lap that the dead one's records lie in
    CHECK(reader.take(out.data(), out.size()) == old.size());
    more = run_and_kill([&] { writer.add(reports.data(), reports.size()); }, steps);
    size_t count = reader.take(out.data(), out.size());
    writer.add(reports.data(), 1);  // behind what the dead one reserved
    count += reader.take(out.data() + count, out.size() - count);
    CHECK(count >= 1 && count + reader.lost() <= reports.size() + 1);
    CHECK(more || count == reports.size() + 1);
    for (size_t i = 0; i < count; ++i) CHECK(is_told(out[i]) && out[i].key >= 1'000'000);
    num_checked += count;
    num_lost += reader.lost();
    const uint64_t lost = reader.lost();
    writer.add(old.data(), old.size());  // the ring is whole again
    CHECK(reader.take(out.data(), out.size()) == old.size() && reader.lost() == lost);
  }
  CHECK(steps > 50);
  CHECK(num_lost > 100);
  std::printf("kill: %ld instructions, %llu reports checked\n", steps, static_cast<unsigned long long>(num_checked));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "ring") {
    for (const size_t batch : {1, 50, 1000}) test_ring(batch);
  } else if (what == "counts") {
    test_counts();
  } else if (what == "kill") {
    test_kill();
  } else {
    std::printf("usage: reports_test ring | counts | kill\n");
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

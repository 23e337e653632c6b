// The lookup path under threads, and a cache whose writer is killed: built plainly by the suite, and by `make sanitize`
// with ThreadSanitizer, then with AddressSanitizer and UndefinedBehaviorSanitizer. Prints what failed; exit status 1 if
// anything did.
//
//   lookup_path_test cache          readers copy while writers replace: every copied entry is whole and its pair's
//   lookup_path_test crew           threads that share work: each part once, exceptions come out
//   lookup_path_test engine FOLDER  lookups, tickets and closing over shards in FOLDER, by every way of reading
//   lookup_path_test epochs FOLDER  a daemon writes over slots while clients are in the epochs that named them
//   lookup_path_test kill           what a writer in another process would leave, killed after any instruction of an
//   update
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "crew.h"
#include "engine.h"
#include "reports.h"
#include "shared_rows.h"
#include "store_files.h"

using namespace tierstore;

namespace {

constexpr size_t kEntryBytes = 2112;

void test_cache() {
  constexpr size_t kSets = 16;
  constexpr int64_t kKeys = 400;
  Block block(EntryCache::block_bytes(kSets, kEntryBytes));
  EntryCache cache(block.data, kSets, kEntryBytes);
  cache.clear();
  std::atomic<uint64_t> hits{0}, torn{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      std::vector<uint8_t> entry(kEntryBytes);
      while (!stop) {
        const auto order = static_cast<uint8_t>(next_random(state) % 3);
        const auto key = static_cast<int64_t>(next_random(state) % kKeys);
        const Probe probe = cache.probe(cache.find_set(order, key), order, key);
        if (probe.way < 0 || !cache.copy(probe, order, key, entry.data())) continue;
        ++hits;
        if (!entry_is_whole(entry.data(), kEntryBytes, order, key)) ++torn;
      }
    });
  }
  for (uint64_t seed = 100; seed < 102; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      std::vector<uint8_t> entry(kEntryBytes);
      for (int i = 0; i < 60'000; ++i) {
        const auto order = static_cast<uint8_t>(next_random(state) % 3);
        const auto key = static_cast<int64_t>(next_random(state) % kKeys);
        fill_entry(entry.data(), kEntryBytes, order, key);
        cache.count_accesses(1);
        const std::lock_guard<std::mutex> lock(cache.writer());
        cache.offer(order, key, entry.data());
      }
    });
  }
  for (size_t i = threads.size(); i-- > 4;) threads[i].join();
  stop = true;
  for (size_t i = 0; i < 4; ++i) threads[i].join();
  CHECK(hits > 1000);
  CHECK(torn == 0);
  std::printf("cache: %llu hits checked\n", static_cast<unsigned long long>(hits.load()));
}

// Parts are done once each, by more threads than the caller's; what one throws comes out, and the next work is whole.
void test_crew() {
  Crew crew(3);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::atomic<uint64_t> checked{0};
  const auto run_checked = [&](size_t num_parts) {
    std::vector<std::atomic<int>> times(num_parts);
    crew.run(num_parts, [&](size_t part) {
      ++times[part];
      const std::lock_guard<std::mutex> lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
    CHECK(std::all_of(times.begin(), times.end(), [](const auto& each) { return each == 1; }));
    checked += num_parts;
  };
  for (int round = 0; round < 20000 && seen.size() < 3; ++round) run_checked(round % 40);
  CHECK(seen.size() >= 2);  // a busy machine may not wake all of them in time
  for (int round = 0; round < 200; ++round) {
    bool thrown = false;
    try {
      crew.run(20, [&](size_t part) {
        if (part == static_cast<size_t>(round) % 20) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    CHECK(thrown);
    run_checked(20);
  }
  std::vector<std::thread> callers;  // one has the crew, others do their parts alone
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) run_checked(10);
    });
  }
  for (std::thread& caller : callers) caller.join();
  crew.stop();
  std::printf("crew: %llu parts checked\n", static_cast<unsigned long long>(checked.load()));
}

// Each row is in one range, whatever their number, the ranges' length and the threads.
void test_shared_rows() {
  uint64_t checked = 0;
  for (const size_t num_rows : {0, 1, 7, 100, 1'000, 4'097}) {
    for (const size_t rows_each : {0, 1, 3, 64, 5'000}) {
      for (const size_t num_threads : {0, 1, 2, 4}) {
        std::vector<std::atomic<int>> times(num_rows);
        share_rows(num_rows, rows_each, num_threads, [&](size_t start, size_t end) {
          CHECK(start < end && end <= num_rows);
          for (size_t row = start; row < end; ++row) ++times[row];
        });
        CHECK(std::all_of(times.begin(), times.end(), [](const auto& each) { return each == 1; }));
        checked += num_rows;
      }
    }
  }
  std::printf("shared rows: %llu checked\n", static_cast<unsigned long long>(checked));
}

void test_engine(const std::string& folder, ReadMode mode, const char* name, size_t num_readers) {
  const Files files(folder);
  Block block(EntryCache::block_bytes(20, 2 * Files::kRowBytes));
  std::vector<Table> tables;
  tables.push_back(files.table(block, 20));
  // Of as many threads that share a lookup as page readers; of one or two keys each, so that nearly all are shared.
  EngineShape shape{
      mode, true, num_readers, num_readers, 3 * Files::kRowBytes, 4, 8, 60.0, {16, 2 * Files::kPageBytes, 4096}};
  Engine engine(std::move(tables), shape);
  std::atomic<uint64_t> wrong{0}, checked{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      for (int round = 0; round < 60; ++round) {
        std::vector<int64_t> keys(1 + next_random(state) % 40);
        for (int64_t& key : keys) key = static_cast<int64_t>(next_random(state) % 500) * Files::kKeyStep;
        std::vector<uint8_t> out(keys.size() * 2 * Files::kRowBytes, 0xA5);
        Gathered gathered;
        std::shared_ptr<Job> job;
        {
          const Engine::Use use(engine);
          if (!use) std::abort();
          if (!engine.gather(use.view(), 0, {keys.data(), keys.size()}, out.data(), gathered)) ++wrong;
          engine.count_batch(gathered);
          job = engine.make_job(std::move(gathered), {{0, out.data()}});
          if (seed % 2 == 0 && !job->misses.empty()) {
            while (engine.submit(job) == Engine::Submitted::kNoRoom) engine.wait_for_room();
            if (!job->wait(60.0)) ++wrong;
          } else {
            engine.fetch(job);
          }
        }
        if (job->fault.kind != FaultKind::kNone || !rows_are_right(keys.data(), keys.size(), out.data())) ++wrong;
        checked += keys.size();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(engine.close(60.0));
  CHECK(!Engine::Use(engine));
  std::printf("engine, %s, %zu readers: %llu keys checked\n", name, num_readers,
              static_cast<unsigned long long>(checked.load()));
  CHECK(engine.read_counters.entries > 0);
  const TableCounters& counts = engine.table_counters[0];
  CHECK(counts.static_hits[0] > 0);
  CHECK(counts.hits[0] + counts.misses[0] == checked);
  files.close();
}

// A daemon's memory as its clients map it, and the store of `Files` over it: slots for entries that the daemon moves
// about.
struct SharedTiers {
  static constexpr size_t kSlots = 24, kAreaBuckets = 12;
  Block control{kControlBytes}, client{kClientBlockBytes}, cache{EntryCache::block_bytes(1, 2 * Files::kRowBytes)};
  std::vector<uint8_t> records;
  IndexHead head{{0}, {kAreaBuckets}};
  std::vector<IndexBucket> areas[2];

  SharedTiers() : records(kSlots * Files::record_shape().record_bytes) {
    areas[0].resize(kAreaBuckets);
    areas[1].resize(kAreaBuckets);
    init_client_block(client.data);
  }

  std::unique_ptr<Engine> make_engine(const Files& files, uint64_t version) {
    std::vector<Table> tables;
    tables.push_back(files.table(cache, 1));
    StaticSet& statics = tables[0].statics;
    for (size_t parity = 0; parity < 2; ++parity) statics.areas[parity] = {&head, areas[parity].data(), kAreaBuckets};
    statics.in_file = {&files.head, files.index.data(), Files::kBuckets};
    statics.records = records.data();
    statics.loaded_start = 0;
    statics.num_loaded = kSlots;
    EngineShape shape{
        ReadMode::kPread, false, 3, 2, 3 * Files::kRowBytes, 4, 8, 60.0, {16, 2 * Files::kPageBytes, 4096}};
    shape.epochs = EpochLine::at(control.data, version % 2);
    shape.version = version;
    shape.client_block = client.data;
    shape.reports = true;
    return std::make_unique<Engine>(std::move(tables), shape);
  }

  void write(size_t slot, int64_t key) {
    uint8_t* record = records.data() + slot * Files::record_shape().record_bytes;
    fill_entry(record, Files::kRowBytes, 0, key % 2003);
    fill_entry(record + Files::kRowBytes, Files::kRowBytes, 0, key % 2011 + 2003);
  }

  void index(uint64_t epoch, const std::vector<int64_t>& keys, const std::vector<uint32_t>& slots) {
    if (!index_entries(keys.data(), slots.data(), keys.size(), areas[epoch % 2].data(), kAreaBuckets)) std::abort();
  }

  EpochLine& line(uint64_t version) { return *EpochLine::at(control.data, version % 2); }
  uint64_t readers(uint64_t epoch) const { return ClientBlock::of(client.data)->active[epoch % 2].value.load(); }
};

void test_gate() {
  EpochLine line;
  std::atomic<uint64_t> even{0}, odd{0};
  EpochGate gate(&line, 3, &even, &odd);
  CHECK(!gate.enter().alive && even == 1);  // nothing was published
  gate.leave({0, false});
  line.publish(3, 5);
  const EpochView view = gate.enter();
  CHECK(view.alive && view.epoch == 5 && odd == 1 && even == 0 && gate.holds(view));
  line.publish(3, 6);
  const EpochView next = gate.enter();
  CHECK(next.alive && next.epoch == 6 && even == 1);
  CHECK(gate.holds(view) && gate.holds(next));  // two are alive
  line.reclaim_before(6);
  CHECK(!gate.holds(view) && gate.holds(next));
  line.publish(3, 7);
  line.reclaim_before(7);
  CHECK(!gate.holds(next));
  const EpochView last = gate.enter();
  CHECK(gate.holds(last) && !gate.is_empty());
  line.reclaim_all();
  CHECK(!gate.holds(last) && !gate.enter().alive);
  line.publish(5, 8);  // another version in the same line
  CHECK(!gate.holds(last) && !gate.enter().alive);
  gate.leave({8, false});
  CHECK(even == 2 && odd == 2);
}

// Pins, while epochs pass as fast as nobody pins the one before: what is pinned has not been reclaimed.
void test_pins() {
  EpochLine line;
  std::atomic<uint64_t> even{0}, odd{0}, ended{0}, wrong{0}, pinned{0};
  std::atomic<bool> stop{false};
  line.publish(1, 1);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      EpochGate gate(&line, 1, &even, &odd);
      while (!stop) {
        const EpochView view = gate.pin();
        if (!view.alive || ended.load() >= view.epoch) ++wrong;
        ++pinned;
        gate.leave(view);
      }
    });
  }
  uint64_t epoch = 1;
  for (; epoch < 30'000; ++epoch) {
    line.publish(1, epoch + 1);
    const std::atomic<uint64_t>& readers = epoch % 2 == 0 ? even : odd;
    while (readers.load() > 0) std::this_thread::yield();
    ended.store(epoch);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0 && even == 0 && odd == 0);
  line.publish(2, epoch);  // another version in the same line
  EpochGate gate(&line, 1, &even, &odd);
  CHECK(!gate.pin().alive && !gate.newest() && even == 0 && odd == 0);
  std::printf("pins: %llu in %llu epochs\n", static_cast<unsigned long long>(pinned.load()),
              static_cast<unsigned long long>(epoch));
}

// What a client that was stopped in the middle of a lookup finds when it goes on: each step of the daemon's, then the
// copy.
void test_stopped_reader(const Files& files) {
  SharedTiers tiers;
  const std::unique_ptr<Engine> engine = tiers.make_engine(files, 1);
  const int64_t key = 7 * Files::kKeyStep, other = 9 * Files::kKeyStep;
  std::vector<uint8_t> out(2 * Files::kRowBytes);
  const auto look_up = [&](const Engine::Use& use, bool from_memory) {
    std::fill(out.begin(), out.end(), 0xA5);
    Gathered gathered;
    CHECK(engine->gather(use.view(), 0, {&key, 1}, out.data(), gathered));
    CHECK(gathered.misses.empty() == from_memory);
    const std::shared_ptr<Job> job = engine->make_job(std::move(gathered), {{0, out.data()}});
    engine->fetch(job);
    CHECK(job->fault.kind == FaultKind::kNone && rows_are_right(&key, 1, out.data()));
  };
  tiers.write(3, key);
  tiers.index(1, {key}, {3});
  tiers.line(1).publish(1, 1);
  const Engine::Use use(*engine);
  look_up(use, true);
  tiers.write(4, other);
  tiers.index(2, {other}, {4});
  tiers.line(1).publish(1, 2);
  look_up(use, true);  // its epoch is still read
  CHECK(tiers.readers(1) == 1 && tiers.readers(2) == 0);
  const uint64_t static_hits = engine->table_counters[0].static_hits[0];
  tiers.line(1).reclaim_before(2);
  tiers.write(3, other);  // what it copies now is another key's
  look_up(use, false);
  CHECK(engine->table_counters[0].static_hits[0] == static_hits);  // discarded, and counted as read
  tiers.index(3, {key}, {3});  // the area that it searches says what is not so for it
  look_up(use, false);
  tiers.line(1).reclaim_all();
  look_up(use, false);
  const Engine::Use late(*engine);
  CHECK(!late.view().alive);
  look_up(late, false);
}

// Lookups while slots are written over as fast as can be. Without a sanitizer nobody waits for them to leave an epoch.
void test_changing_epochs(const Files& files) {
#if defined(__SANITIZE_THREAD__)
  constexpr bool kWaits = true;  // that racing copies are discarded is nothing that it knows
#else
  constexpr bool kWaits = false;
#endif
  SharedTiers tiers;
  const std::unique_ptr<Engine> engine = tiers.make_engine(files, 1);
  tiers.index(1, {}, {});
  tiers.line(1).publish(1, 1);
  std::atomic<uint64_t> wrong{0}, checked{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      while (!stop) {
        std::vector<int64_t> keys(1 + next_random(state) % 200);
        for (int64_t& key : keys) key = static_cast<int64_t>(next_random(state) % 40) * Files::kKeyStep;
        std::vector<uint8_t> out(keys.size() * 2 * Files::kRowBytes, 0xA5);
        Gathered gathered;
        const Engine::Use use(*engine);
        // Counted too late for the writer to wait for it, as `EpochGate::pin` says: its copies would race.
        if (kWaits && tiers.line(1).current.load() != (uint64_t{1} << kVersionShift | use.view().epoch)) continue;
        if (!engine->gather(use.view(), 0, {keys.data(), keys.size()}, out.data(), gathered)) ++wrong;
        const std::shared_ptr<Job> job = engine->make_job(std::move(gathered), {{0, out.data()}});
        engine->fetch(job);
        if (job->fault.kind != FaultKind::kNone || !rows_are_right(keys.data(), keys.size(), out.data())) ++wrong;
        checked += keys.size();
      }
    });
  }
  uint64_t state = 99;
  uint64_t epoch = 1;
  while (epoch < 3000 || engine->table_counters[0].static_hits[0] < 1000) {
    ++epoch;
    const size_t first = epoch % 2 * SharedTiers::kSlots / 2;  // half of the slots are of one parity's epochs
    std::vector<int64_t> keys;
    std::vector<uint32_t> slots;
    const int64_t shift = static_cast<int64_t>(next_random(state) % 40);
    for (size_t i = 0; i < SharedTiers::kSlots / 2; ++i) {
      keys.push_back((static_cast<int64_t>(i) + shift) % 40 * Files::kKeyStep);
      slots.push_back(static_cast<uint32_t>(first + (i + epoch) % (SharedTiers::kSlots / 2)));
      tiers.write(slots.back(), keys.back());
    }
    tiers.index(epoch, keys, slots);
    tiers.line(1).publish(1, epoch);
    while (kWaits && tiers.readers(epoch - 1) > 0) std::this_thread::yield();
    tiers.line(1).reclaim_before(epoch);
    if (epoch % 16 == 0) std::this_thread::yield();
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(engine->close(60.0));
  CHECK(tiers.readers(0) == 0 && tiers.readers(1) == 0);
  std::printf("epochs: %llu changes, %llu keys checked, %llu from slots\n", static_cast<unsigned long long>(epoch),
              static_cast<unsigned long long>(checked.load()),
              static_cast<unsigned long long>(engine->table_counters[0].static_hits[0].load()));
}

void test_kill() {
  constexpr size_t kSets = 1;
  const size_t block_bytes = EntryCache::block_bytes(kSets, kEntryBytes);
  Block block(block_bytes, MAP_SHARED), copied(block_bytes);
  EntryCache cache(block.data, kSets, kEntryBytes), left(copied.data, kSets, kEntryBytes);
  std::vector<uint8_t> entry(kEntryBytes), ninth(kEntryBytes);
  uint64_t hits = 0;
  cache.clear();
  for (int64_t key = 0; key < 8; ++key) {  // a full set: the ninth takes another's place
    fill_entry(entry.data(), kEntryBytes, 1, key);
    cache.offer(1, key, entry.data());
  }
  fill_entry(ninth.data(), kEntryBytes, 1, 8);
  const auto check_all = [&] {
    for (int64_t key = 0; key < 10; ++key) {
      const Probe probe = left.probe(left.find_set(1, key), 1, key);
      if (probe.way < 0 || !left.copy(probe, 1, key, entry.data())) continue;
      ++hits;
      CHECK(entry_is_whole(entry.data(), kEntryBytes, 1, key));
    }
  };
  const auto check_what_is_left = [&] {
    std::memcpy(copied.data, block.data, block_bytes);
    check_all();
    fill_entry(entry.data(), kEntryBytes, 1, 9);
    left.offer(1, 9, entry.data());  // the next writer finds what the dead one left
    check_all();
    const Probe probe = left.probe(left.find_set(1, 9), 1, 9);
    CHECK(probe.way >= 0 && left.copy(probe, 1, 9, entry.data()) && entry_is_whole(entry.data(), kEntryBytes, 1, 9));
  };
  const long steps = look_after_each_instruction([&] { cache.offer(1, 8, ninth.data()); }, check_what_is_left);
  const Probe probe = cache.probe(cache.find_set(1, 8), 1, 8);
  CHECK(probe.way >= 0);  // it ended, and was seen at every step until then
  CHECK(steps > 100);
  CHECK(hits > 100);
  std::printf("kill: %ld instructions, %llu hits checked\n", steps, static_cast<unsigned long long>(hits));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "cache") {
    test_cache();
  } else if (what == "crew") {
    test_crew();
    test_shared_rows();
  } else if (what == "engine" && argc > 2) {
    for (const size_t num_readers : {1, 3}) {
      if (probe_uring() == 0) test_engine(argv[2], ReadMode::kUring, "uring", num_readers);
      test_engine(argv[2], ReadMode::kMmap, "mmap", num_readers);
      test_engine(argv[2], ReadMode::kPread, "pread", num_readers);
    }
  } else if (what == "epochs" && argc > 2) {
    const Files files(argv[2]);
    test_gate();
    test_pins();
    test_stopped_reader(files);
    test_changing_epochs(files);
  } else if (what == "kill") {
    test_kill();
  } else {
    std::printf("usage: lookup_path_test cache | crew | engine FOLDER | epochs FOLDER | kill\n");
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

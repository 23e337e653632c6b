// The lookup path under threads, and a cache whose writer is killed: built plainly by the suite, and by `make sanitize` with
// ThreadSanitizer, then with AddressSanitizer and UndefinedBehaviorSanitizer. Prints what failed; exit status 1 if anything did.
//
//   lookup_path_test cache          readers copy while writers replace: every copied entry is whole and its pair's
//   lookup_path_test engine FOLDER  lookups, tickets and closing over shards in FOLDER, by every way of reading
//   lookup_path_test kill           a writer in another process is killed after every instruction of an update
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"

using namespace tierstore;

namespace {

int failures = 0;

#define CHECK(holds)                                                      \
  do {                                                                    \
    if (!(holds)) {                                                       \
      std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #holds); \
      ++failures;                                                         \
    }                                                                     \
  } while (0)

constexpr size_t kEntryBytes = 2112;

// Every word of an entry is told by its pair, so that a torn or strange entry shows.
void fill_entry(uint8_t* entry, size_t num_bytes, uint8_t order, int64_t key) {
  for (size_t i = 0; i + 8 <= num_bytes; i += 8) {
    const uint64_t word = (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull) ^ (i << 8) ^ order;
    std::memcpy(entry + i, &word, 8);
  }
}

bool entry_is_whole(const uint8_t* entry, size_t num_bytes, uint8_t order, int64_t key) {
  std::vector<uint8_t> expected(num_bytes);
  fill_entry(expected.data(), num_bytes, order, key);
  return std::memcmp(entry, expected.data(), num_bytes) == 0;
}

uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return state >> 33;
}

struct Block {
  explicit Block(size_t num_bytes, int flags = MAP_PRIVATE) : num_bytes(num_bytes) {
    data = static_cast<uint8_t*>(mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0));
    if (data == MAP_FAILED) std::abort();
  }
  ~Block() { munmap(data, num_bytes); }
  uint8_t* data;
  size_t num_bytes;
};

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

// A table of one order and two rows a key, whose row r holds words told by r, in two shards under `folder`.
struct Files {
  static constexpr size_t kRowBytes = 264, kRowsPerPage = 15, kPageBytes = 4096, kPages = 300, kPagesPerShard = 200;
  static constexpr uint32_t kVersion = 1, kSeed = 77;
  static constexpr size_t kPlaced = 150, kLoaded = 75, kBuckets = 40;  // keys 0, kKeyStep, ... have records
  static constexpr int64_t kKeyStep = 1'000'003;
  std::vector<ShardFile> shards;
  ShardFile placed;
  std::vector<IndexBucket> index{kBuckets};
  std::vector<uint8_t> records;

  Files(const std::string& folder) {
    const PageShape shape{kPageBytes, kRowsPerPage, kVersion, kSeed};
    std::vector<uint8_t> rows(kPages * kRowsPerPage * kRowBytes), pages(kPages * kPageBytes);
    for (size_t row = 0; row < kPages * kRowsPerPage; ++row) {
      fill_entry(rows.data() + row * kRowBytes, kRowBytes, 0, static_cast<int64_t>(row));
    }
    seal_pages({{rows.data(), kRowBytes}}, kPages * kRowsPerPage, shape, 0, pages.data());
    for (size_t start = 0; start < kPages; start += kPagesPerShard) {
      const size_t num_bytes = std::min(kPagesPerShard, kPages - start) * kPageBytes;
      shards.push_back(write_file(folder + "/" + std::to_string(start), pages.data() + start * kPageBytes, num_bytes));
    }
    place(folder);
  }

  static RecordShape record_shape() { return {2 * kRowBytes, 2 * kRowBytes + kRecordTrailerBytes, kSeed}; }

  static ShardFile write_file(const std::string& name, const uint8_t* data, size_t num_bytes) {
    const int fd = open(name.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, num_bytes) != static_cast<ssize_t>(num_bytes)) std::abort();
    fsync(fd);
    void* map = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, fd, 0);
    return {fd, open(name.c_str(), O_RDONLY | O_DIRECT), static_cast<uint8_t*>(map), num_bytes};
  }

  void place(const std::string& folder) {
    const RecordShape shape = record_shape();
    records.resize((kPlaced * shape.record_bytes + kReadUnitBytes - 1) / kReadUnitBytes * kReadUnitBytes);
    std::vector<int64_t> keys;
    std::vector<uint32_t> places, orders(kPlaced, 0);
    for (size_t i = 0; i < kPlaced; ++i) {
      keys.push_back(static_cast<int64_t>(i) * kKeyStep);
      places.push_back(static_cast<uint32_t>(i));
      uint8_t* record = records.data() + i * shape.record_bytes;
      fill_entry(record, kRowBytes, 0, keys[i] % 2003);
      fill_entry(record + kRowBytes, kRowBytes, 0, keys[i] % 2011 + 2003);
    }
    seal_records(keys.data(), orders.data(), kPlaced, shape, records.data());
    if (!index_entries(keys.data(), places.data(), kPlaced, index.data(), kBuckets)) std::abort();
    placed = write_file(folder + "/placed", records.data(), records.size());
  }

  IndexHead head{{0}, {kBuckets}};

  Table table(Block& block, size_t num_sets) const {
    Table made;
    made.num_orders = 1;
    made.rows_per_key = 2;
    made.row_bytes = kRowBytes;
    made.num_rows = kPages * kRowsPerPage;
    made.is_plain = false;
    made.moduli = {2003, 2011};
    made.offsets = {0, 2003};
    made.page_bytes = kPageBytes;
    made.rows_per_page = kRowsPerPage;
    made.num_pages = kPages;
    made.pages_per_shard = kPagesPerShard;
    made.shape = {kPageBytes, kRowsPerPage, kVersion, kSeed};
    made.shards = shards;
    made.cache = std::make_shared<EntryCache>(block.data, num_sets, made.entry_bytes());
    made.cache->clear();
    made.statics.areas[0] = made.statics.areas[1] = {&head, index.data(), kBuckets};
    made.statics.records = records.data();
    made.statics.num_loaded = kLoaded;
    made.statics.placed = {placed, 0, record_shape()};
    return made;
  }
};

bool rows_are_right(const int64_t* keys, size_t num_keys, const uint8_t* out) {
  for (size_t i = 0; i < num_keys; ++i) {
    const uint8_t* entry = out + i * 2 * Files::kRowBytes;
    const int64_t ids[] = {keys[i] % 2003, keys[i] % 2011 + 2003};
    for (int head = 0; head < 2; ++head) {
      if (!entry_is_whole(entry + head * Files::kRowBytes, Files::kRowBytes, 0, ids[head])) return false;
    }
  }
  return true;
}

void test_engine(const std::string& folder, ReadMode mode, const char* name, size_t num_lanes) {
  const Files files(folder);
  Block block(EntryCache::block_bytes(20, 2 * Files::kRowBytes));
  std::vector<Table> tables;
  tables.push_back(files.table(block, 20));
  Engine engine(std::move(tables), {mode, true, num_lanes, 4, 8, 60.0, {16, 2 * Files::kPageBytes, 4096}});
  std::atomic<uint64_t> wrong{0}, checked{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      for (int round = 0; round < 60; ++round) {
        std::vector<int64_t> keys(1 + next_random(state) % 40);
        for (int64_t& key : keys) key = static_cast<int64_t>(next_random(state) % 500) * Files::kKeyStep;
        std::vector<uint8_t> out(keys.size() * 2 * Files::kRowBytes, 0xA5);
        auto job = std::make_shared<Job>();
        const Engine::Use use(engine);
        if (!use) std::abort();
        engine.gather(use.view(), 0, keys.data(), keys.size(), out.data(), *job);
        engine.count_batch(*job);
        if (seed % 2 == 0 && !job->misses.empty()) {
          engine.submit(job);
          if (!job->wait(60.0)) ++wrong;
        } else {
          engine.fetch(*job);
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
  std::printf("engine, %s, %zu lanes: %llu keys checked\n", name, num_lanes, static_cast<unsigned long long>(checked.load()));
  CHECK(engine.read_counters.entries > 0);
  CHECK(engine.table_counters[0].static_hits[0] > 0);
  std::vector<ShardFile> opened = files.shards;
  opened.push_back(files.placed);
  for (const ShardFile& shard : opened) {
    munmap(const_cast<uint8_t*>(shard.map), shard.num_bytes);
    close(shard.buffered_fd);
    if (shard.direct_fd >= 0) close(shard.direct_fd);
  }
}

// Runs `offer` in a child, stops it after `steps` instructions and kills it there. Returns false where the child ended before.
bool offer_and_kill(EntryCache& cache, int64_t key, long steps) {
  const pid_t child = fork();
  if (child == 0) {
    std::vector<uint8_t> entry(kEntryBytes);
    fill_entry(entry.data(), kEntryBytes, 1, key);
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    cache.offer(1, key, entry.data());
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  bool ended = false;
  for (long step = 0; step < steps && !ended; ++step) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) std::exit(77);  // not allowed here
    waitpid(child, &status, 0);
    ended = !WIFSTOPPED(status) || WSTOPSIG(status) == SIGSTOP;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return !ended;
}

void test_kill() {
  constexpr size_t kSets = 1;
  Block block(EntryCache::block_bytes(kSets, kEntryBytes), MAP_SHARED);
  EntryCache cache(block.data, kSets, kEntryBytes);
  std::vector<uint8_t> entry(kEntryBytes);
  uint64_t hits = 0;
  long steps = 0;
  for (bool more = true; more; ++steps) {
    cache.clear();
    for (int64_t key = 0; key < 8; ++key) {  // a full set: the ninth takes another's place
      fill_entry(entry.data(), kEntryBytes, 1, key);
      cache.offer(1, key, entry.data());
    }
    more = offer_and_kill(cache, 8, steps);
    const auto check_all = [&] {
      for (int64_t key = 0; key < 10; ++key) {
        const Probe probe = cache.probe(cache.find_set(1, key), 1, key);
        if (probe.way < 0 || !cache.copy(probe, 1, key, entry.data())) continue;
        ++hits;
        CHECK(entry_is_whole(entry.data(), kEntryBytes, 1, key));
      }
    };
    check_all();
    fill_entry(entry.data(), kEntryBytes, 1, 9);
    cache.offer(1, 9, entry.data());  // the next writer finds what the dead one left
    check_all();
    const Probe probe = cache.probe(cache.find_set(1, 9), 1, 9);
    CHECK(probe.way >= 0 && cache.copy(probe, 1, 9, entry.data()) && entry_is_whole(entry.data(), kEntryBytes, 1, 9));
  }
  CHECK(steps > 100);
  CHECK(hits > 100);
  std::printf("kill: %ld instructions, %llu hits checked\n", steps, static_cast<unsigned long long>(hits));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "cache") {
    test_cache();
  } else if (what == "engine" && argc > 2) {
    for (const size_t num_lanes : {1, 3}) {
      if (probe_uring() == 0) test_engine(argv[2], ReadMode::kUring, "uring", num_lanes);
      test_engine(argv[2], ReadMode::kMmap, "mmap", num_lanes);
      test_engine(argv[2], ReadMode::kPread, "pread", num_lanes);
    }
  } else if (what == "kill") {
    test_kill();
  } else {
    std::printf("usage: lookup_path_test cache | engine FOLDER | kill\n");
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

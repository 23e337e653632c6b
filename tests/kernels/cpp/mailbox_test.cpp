// Mailboxes under threads that play GPUs: built plainly by the suite, and by `make sanitize` with ThreadSanitizer, then
// with AddressSanitizer and UndefinedBehaviorSanitizer. Prints what failed; exit status 1 if anything did.
//
//   mailbox_test devices FOLDER  devices ask, come and go, while others look up: every entry is whole and its pair's
//   mailbox_test wild FOLDER     devices write whatever they like, whenever they like, while one that does not is
//   served
#include "mailbox.h"

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "engine.h"
#include "store_files.h"

using namespace tierstore;

namespace {

constexpr MailboxShape kShape{64, 2 * Files::kRowBytes};

// A block as a device uses it: words one by one, the number of the step last.
struct Device {
  Block block{kShape.num_bytes()};
  int64_t step = 0;

  void write(size_t at, int64_t value, int order = __ATOMIC_RELAXED) {
    __atomic_store_n(reinterpret_cast<int64_t*>(block.data + at), value, order);
  }
  void write_pair(size_t i, int64_t key, int32_t pair) {
    write(kMailboxKeys + 8 * i, key);
    __atomic_store_n(reinterpret_cast<int32_t*>(block.data + kShape.pairs_start()) + i, pair, __ATOMIC_RELAXED);
  }
  int64_t answered() const {
    return __atomic_load_n(reinterpret_cast<const int64_t*>(block.data + kMailboxAnswered), __ATOMIC_ACQUIRE);
  }

  // Asks for keys, and waits for the answer.
  MailboxStatus ask(const std::vector<int64_t>& keys) {
    for (size_t i = 0; i < keys.size(); ++i) write_pair(i, keys[i], static_cast<int32_t>(i));
    write(kMailboxNumMisses, static_cast<int64_t>(keys.size()));
    write(kMailboxRequested, ++step, __ATOMIC_RELEASE);
    while (answered() != step) std::this_thread::yield();
    return static_cast<MailboxStatus>(
        __atomic_load_n(reinterpret_cast<const int64_t*>(block.data + kMailboxStatus), __ATOMIC_RELAXED));
  }
  bool is_right(const std::vector<int64_t>& keys) const {
    return rows_are_right(keys.data(), keys.size(), block.data + kShape.entries_start());
  }
};

std::vector<int64_t> some_keys(uint64_t& state) {
  std::vector<int64_t> keys(next_random(state) % (kShape.pairs_max + 1));
  for (int64_t& key : keys) key = static_cast<int64_t>(next_random(state) % 500) * Files::kKeyStep;
  return keys;
}

struct Store {
  Files files;
  Block cache{EntryCache::block_bytes(20, kShape.entry_bytes)};
  Engine engine;

  explicit Store(const std::string& folder)
      : files(folder),
        engine(tables(), {ReadMode::kPread, false, 2, 1, 1 << 20, 4, 8, 60.0, {16, 2 * Files::kPageBytes, 4096}}) {}
  ~Store() {
    CHECK(engine.close(60.0));
    files.close();
  }
  std::vector<Table> tables() {
    std::vector<Table> made;
    made.push_back(files.table(cache, 20));
    return made;
  }
};

void test_devices(const std::string& folder) {
  Store store(folder);
  MailboxServer server(store.engine);
  std::atomic<uint64_t> wrong{0}, asked{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    threads.emplace_back([&, seed] {
      uint64_t state = seed;
      for (int life = 0; life < 8; ++life) {
        Device device;
        const uint64_t id = server.add(0, device.block.data, kShape.pairs_max);
        for (int round = 0; round < 20; ++round) {
          const std::vector<int64_t> keys = some_keys(state);
          if (device.ask(keys) != MailboxStatus::kThere || !device.is_right(keys)) ++wrong;
          ++asked;
        }
        if (server.served(id) != 20 || server.take_fault(id)) ++wrong;
        if (!server.remove(id, 60.0)) ++wrong;
      }
    });
  }
  threads.emplace_back([&] {
    uint64_t state = 9;
    for (int round = 0; round < 200; ++round) {
      const std::vector<int64_t> keys = some_keys(state);
      std::vector<uint8_t> out(keys.size() * kShape.entry_bytes);
      Gathered gathered;
      const Engine::Use use(store.engine);
      if (!store.engine.gather(use.view(), 0, {keys.data(), keys.size()}, out.data(), gathered)) ++wrong;
      const std::shared_ptr<Job> job = store.engine.make_job(std::move(gathered), {{0, out.data()}});
      store.engine.fetch(job);
      if (job->fault.kind != FaultKind::kNone || !rows_are_right(keys.data(), keys.size(), out.data())) ++wrong;
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  Device last;
  const uint64_t id = server.add(0, last.block.data, kShape.pairs_max);
  CHECK(last.ask({}) == MailboxStatus::kThere);
  store.engine.faults.set(FaultInjection::kFailing, 0, 1);
  const std::vector<int64_t> paged(1, 499 * Files::kKeyStep + 1);
  CHECK(last.ask(paged) == MailboxStatus::kFaulty);
  CHECK(last.ask(paged) == MailboxStatus::kThere && last.is_right(paged));
  CHECK(server.take_fault(id).has_value() && !server.take_fault(id));
  CHECK(server.close(60.0));
  std::printf("devices: %llu requests checked\n", static_cast<unsigned long long>(asked.load()));
}

void test_wild(const std::string& folder) {
  Store store(folder);
  MailboxServer server(store.engine);
  std::atomic<bool> stop{false};
  std::vector<Device> wild(2);
  std::vector<std::thread> threads;
  std::vector<uint64_t> ids;
  for (Device& device : wild) ids.push_back(server.add(0, device.block.data, kShape.pairs_max));
  for (Device& device : wild) {
    threads.emplace_back([&] {
      auto state = reinterpret_cast<uint64_t>(&device);
      while (!stop) {
        device.write(kMailboxNumMisses, static_cast<int64_t>(next_random(state) % 70) - 2);
        for (size_t i = 0; i < kShape.pairs_max; ++i) {
          device.write_pair(i, static_cast<int64_t>(next_random(state) << 33) >> (next_random(state) % 40),
                            static_cast<int32_t>(next_random(state) % 70) - (next_random(state) % 50 == 0));
        }
        device.write(kMailboxRequested, static_cast<int64_t>(next_random(state)), __ATOMIC_RELEASE);
      }
    });
  }
  Device device;
  server.add(0, device.block.data, kShape.pairs_max);
  uint64_t state = 5, wrong = 0;
  for (int round = 0; round < 200; ++round) {
    const std::vector<int64_t> keys = some_keys(state);
    if (device.ask(keys) != MailboxStatus::kThere || !device.is_right(keys)) ++wrong;
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  for (const uint64_t id : ids) CHECK(server.served(id) > 0);
  CHECK(server.close(60.0));
  std::printf("wild: 200 requests checked\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "devices" && argc > 2) {
    test_devices(argv[2]);
  } else if (what == "wild" && argc > 2) {
    test_wild(argv[2]);
  } else {
    std::printf("usage: mailbox_test devices FOLDER | wild FOLDER\n");
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

// The lookup path when the system gives less than is asked for: built plainly by the suite, and by `make sanitize` with
// ThreadSanitizer, then with AddressSanitizer and UndefinedBehaviorSanitizer. Prints what failed; exit status 1 if
// anything did.
//
//   scarcity_test memory FOLDER         allocation 1, 2, 3 ... fails, alone or with all that follow
//   scarcity_test threads FOLDER        thread 1, 2, 3 ... cannot be made
//   scarcity_test cancel FOLDER TRIALS  jobs are cancelled at any time, and their buffers freed at once
//   scarcity_test ring FOLDER           the kernel answers "not now"; then other code closes the ring's descriptor
//
// After each, lookups are right, every page reader comes back, every buffer is let go, and the engine closes.
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "checks.h"
#include "engine.h"
#include "mailbox.h"
#include "store_files.h"

using namespace tierstore;

namespace {

// Number `at` of what is asked for is refused from the moment this is armed; `onwards`: all that follow too.
struct Refusal {
  std::atomic<long> at{-1}, seen{0}, refused{0};
  std::atomic<bool> onwards{false};

  bool applies() {
    if (at.load() < 0) return false;
    const long number = seen.fetch_add(1);
    if (number != at.load() && !(onwards.load() && number > at.load())) return false;
    ++refused;
    return true;
  }
  void arm(long number, bool all_that_follow) {
    seen = refused = 0;
    onwards = all_that_follow;
    at = number;
  }
  // Returns whether it was ever hit.
  bool disarm() {
    at = -1;
    return refused.load() > 0;
  }
};

Refusal memory, threads;
std::atomic<bool> ring_is_busy{false};

}  // namespace

// Not inlined: the compiler would take the pair of malloc and free for a mistake.
__attribute__((noinline)) void* operator new(size_t num_bytes) {
  void* memory_there = memory.applies() ? nullptr : std::malloc(num_bytes > 0 ? num_bytes : 1);
  if (memory_there == nullptr) throw std::bad_alloc();
  return memory_there;
}
__attribute__((noinline)) void operator delete(void* gone) noexcept { std::free(gone); }
__attribute__((noinline)) void operator delete(void* gone, size_t) noexcept { std::free(gone); }

#if !defined(__SANITIZE_THREAD__)  // which has its own of these two
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) {
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return threads.applies() ? EAGAIN : real(thread, attributes, start, argument);
}

// Passes on more arguments than most calls have: what lies where those would be.
extern "C" __attribute__((no_sanitize("address"))) long syscall(long number, ...) {
  static const auto real = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  va_list list;
  va_start(list, number);
  long arguments[6];
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  static std::atomic<unsigned> turn{0};
  if (number == 426 && ring_is_busy && turn++ % 3 != 0) {  // io_uring_enter
    errno = turn % 2 == 0 ? EAGAIN : EBUSY;
    return -1;
  }
  return real(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}
#endif

namespace {

constexpr size_t kEntryBytes = 2 * Files::kRowBytes;
constexpr size_t kReaders = 2, kKeys = 60;
constexpr size_t kPartBytes = 5 * kEntryBytes;  // so that lookups are shared by two threads

const std::vector<int64_t>& some_keys() {
  static const std::vector<int64_t> keys = [] {
    std::vector<int64_t> made;
    for (size_t i = 0; i < kKeys; ++i)
      made.push_back(static_cast<int64_t>(i * 7 % 300) * Files::kKeyStep + static_cast<int64_t>(i % 3));
    return made;
  }();
  return keys;
}

// A buffer that a job holds, gone when it is let go: whoever writes to it later is told of by AddressSanitizer.
class Buffer final : public Held {
 public:
  inline static std::atomic<long> there{0};

  explicit Buffer(size_t num_bytes) : data_(num_bytes, 0xA5) { ++there; }
  void release() noexcept override { delete this; }
  uint8_t* data() { return data_.data(); }

 private:
  ~Buffer() { --there; }
  std::vector<uint8_t> data_;
};

struct Store {
  const Files& files;
  Block cache{EntryCache::block_bytes(1, kEntryBytes)};
  std::unique_ptr<Engine> engine;

  Store(const Files& files, ReadMode mode, bool made_under_refusal = false) : files(files) {
    std::vector<Table> tables;
    if (!made_under_refusal) {
      tables.push_back(files.table(cache, 1));
    } else {
      const long at = memory.at.exchange(-1);
      tables.push_back(files.table(cache, 1));
      memory.at = at;
    }
    engine = std::make_unique<Engine>(
        std::move(tables),
        EngineShape{mode, true, kReaders, 2, kPartBytes, 3, 8, 60.0, {16, 2 * Files::kPageBytes, 4096}});
  }

  std::shared_ptr<Job> gathered(uint8_t* out) {
    Gathered gathered;
    const Engine::Use use(*engine);
    if (!engine->gather(use.view(), 0, {some_keys().data(), kKeys}, out, gathered)) std::abort();
    return engine->make_job(std::move(gathered), {{0, out}});
  }

  // Looks up, by `fetch` or by a worker; returns how it ended. Rows that come are right.
  FaultKind look_up(bool submits) {
    static std::vector<uint8_t> out(kKeys * kEntryBytes);
    std::fill(out.begin(), out.end(), 0xA5);
    FaultKind ended = FaultKind::kNoMemory;
    try {
      const std::shared_ptr<Job> job = gathered(out.data());
      const Engine::Use use(*engine);
      if (!submits || engine->submit(job) == Engine::Submitted::kNoWorker) {
        engine->fetch(job);
      } else if (!job->wait(30.0)) {
        return FaultKind::kTimeout;
      }
      ended = job->fault.kind;
    } catch (const std::bad_alloc&) {
    }
    memory.at = -1;  // what follows is the test's own
    if (ended == FaultKind::kNone && !rows_are_right(some_keys().data(), kKeys, out.data()))
      ended = FaultKind::kBadPage;
    return ended;
  }

  bool readers_come_back() const {
    for (int i = 0; i < 3000 && engine->num_free_readers() < engine->num_readers(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return engine->num_free_readers() == engine->num_readers();
  }

  // What must be so again, whatever was refused before.
  void check_all_is_well() {
    CHECK(look_up(false) == FaultKind::kNone);
    CHECK(look_up(true) == FaultKind::kNone);
    CHECK(readers_come_back());
    CHECK(Buffer::there == 0);
    CHECK(engine->close(30.0));
  }
};

std::vector<ReadMode> modes() {
  std::vector<ReadMode> all{ReadMode::kMmap, ReadMode::kPread};
  if (probe_uring() == 0) all.push_back(ReadMode::kUring);
  return all;
}

void test_memory(const Files& files) {
  uint64_t checked = 0;
  for (const ReadMode mode : modes()) {
    for (const bool onwards : {false, true}) {
      bool hit = true;
      for (long number = 0; hit; ++number) {  // while it is opened
        memory.arm(number, onwards);
        std::unique_ptr<Store> store;
        try {
          store = std::make_unique<Store>(files, mode, true);
        } catch (const std::exception&) {
        }
        hit = memory.disarm();
        if (store != nullptr) store->check_all_is_well();
        ++checked;
      }
      for (const bool submits : {false, true}) {
        hit = true;
        for (long number = 0; hit; ++number) {
          Store store(files, mode);
          memory.arm(number, onwards);
          const FaultKind ended = store.look_up(submits);
          hit = memory.disarm();
          CHECK(ended == FaultKind::kNone || (hit && ended == FaultKind::kNoMemory));
          store.check_all_is_well();
          ++checked;
        }
        CHECK(checked > 8);
      }
    }
  }
  std::printf("memory: %llu refusals checked\n", static_cast<unsigned long long>(checked));
}

void test_threads(const Files& files) {
  uint64_t checked = 0;
  for (const ReadMode mode : modes()) {
    for (const bool onwards : {false, true}) {
      bool hit = true;
      for (long number = 0; hit; ++number) {
        threads.arm(number, onwards);
        Store store(files, mode);
        for (const bool submits : {true, false, true}) CHECK(store.look_up(submits) == FaultKind::kNone);
        {  // a lookup that somebody gave up: the next one drains its page reader, if nobody else can
          auto* buffer = new Buffer(kKeys * kEntryBytes);
          const std::shared_ptr<Job> job = store.gathered(buffer->data());
          job->hold(buffer);
          store.engine->faults.set(FaultInjection::kSlow, 0, 8);
          Engine::Carrier carrier(*store.engine, job);
          CHECK(carrier.run() == Engine::Carrier::State::kUnderWay);
          job->cancel();
        }
        store.engine->faults.set(FaultInjection::kNone, 0, 0);
        for (size_t i = 0; i < kReaders; ++i) CHECK(store.look_up(false) == FaultKind::kNone);
        hit = threads.disarm();
        store.check_all_is_well();
        ++checked;
      }
    }
  }
  Store store(files, ReadMode::kPread);
  Block block(MailboxShape{4, kEntryBytes}.num_bytes());
  {
    MailboxServer server(*store.engine);
    threads.arm(0, true);
    bool refused = false;
    try {
      server.add(0, block.data, 4);
    } catch (const std::system_error&) {
      refused = true;
    }
    threads.disarm();
    CHECK(refused && server.close(10.0));
  }
  store.check_all_is_well();
  std::printf("threads: %llu refusals checked\n", static_cast<unsigned long long>(checked));
}

void test_cancel(const Files& files, long trials) {
  uint64_t state = 1, ended_before = 0;
  for (const ReadMode mode : modes()) {
    Store store(files, mode);
    for (long trial = 0; trial < trials; ++trial) {
      if (trial % 64 == 0) store.engine->faults.set(FaultInjection::kSlow, next_random(state) % 8, 1);
      auto* buffer = new Buffer(kKeys * kEntryBytes);
      std::shared_ptr<Job> job = store.gathered(buffer->data());
      job->hold(buffer);
      const uint64_t pause_us = next_random(state) % 400;
      if (trial % 3 == 0) {  // on this thread, and perhaps handed on
        Engine::Carrier carrier(*store.engine, job);
        std::thread canceller([&, job] {
          std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
          job->cancel();
        });
        if (trial % 2 == 0) carrier.let_hand_on();
        const Engine::Carrier::State ended = carrier.run();
        canceller.join();
        if (ended == Engine::Carrier::State::kHandedOn) CHECK(job->wait(30.0));
        job->let_go();  // as its last holder would
      } else {
        while (store.engine->submit(job) == Engine::Submitted::kNoRoom) store.engine->wait_for_room();
        std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
        ended_before += job->is_done();
        job->cancel();
        CHECK(job->wait(30.0));
        CHECK(job->fault.kind == FaultKind::kNone || job->fault.kind == FaultKind::kCancelled);
      }
      CHECK(Buffer::there == 0);
    }
    store.engine->faults.set(FaultInjection::kNone, 0, 0);
    store.check_all_is_well();
  }
  std::printf("cancel: %ld trials a way of reading checked, %llu had ended before\n", trials,
              static_cast<unsigned long long>(ended_before));
}

void close_rings() {
  DIR* folder = opendir("/proc/self/fd");
  std::vector<int> rings;
  while (const dirent* entry = readdir(folder)) {
    char target[64] = {};
    const std::string name = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(name.c_str(), target, sizeof target - 1) > 0 && std::string(target) == "anon_inode:[io_uring]") {
      rings.push_back(std::atoi(entry->d_name));
    }
  }
  closedir(folder);
  CHECK(!rings.empty());
  for (const int fd : rings) close(fd);
}

// A ring that is left with a read that hangs keeps no file open: its queue has none any more.
void test_files_let_go(const Files& files) {
  ShardFile shard = files.shards[0];
  shard.number = 0;
  const std::unique_ptr<PageQueue> queue = make_uring_queue(4, {&shard});
  alignas(4096) static uint8_t page[4096];
  queue->register_memory(page, sizeof page);
  CHECK(queue->is_registered());
  for (const bool let_go : {false, true}) {
    if (let_go) queue->let_files_go();
    std::vector<PageDone> done;
    done.reserve(4);
    queue->start({{&shard, 0, sizeof page, 0, page}});
    for (int i = 0; i < 100 && done.empty(); ++i) queue->reap(done, 1, 100);
    CHECK(done.size() == 1 && done[0].error == (let_go ? EBADF : 0));
  }
}

void test_ring(const Files& files) {
  if (probe_uring() == 0) {
    test_files_let_go(files);
    Store store(files, ReadMode::kUring);
    ring_is_busy = true;
    for (int i = 0; i < 50; ++i) CHECK(store.look_up(i % 2 == 0) == FaultKind::kNone);
    ring_is_busy = false;
    close_rings();
    const auto started = std::chrono::steady_clock::now();
    for (int i = 0; i < 6; ++i) CHECK(store.look_up(i % 2 == 0) == FaultKind::kDisk);
    CHECK(std::chrono::steady_clock::now() - started < std::chrono::seconds(20));
    CHECK(store.readers_come_back() && store.engine->close(30.0));
  }
  std::printf("ring: checked\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc < 3) return 2;
  const Files files(argv[2]);
  if (what == "memory") {
    test_memory(files);
  } else if (what == "threads") {
    test_threads(files);
  } else if (what == "cancel") {
    test_cancel(files, argc > 3 ? std::atol(argv[3]) : 300);
  } else if (what == "ring") {
    test_ring(files);
  } else {
    std::printf("usage: scarcity_test memory | threads | ring FOLDER, or cancel FOLDER TRIALS\n");
    return 2;
  }
  files.close();
  return failures == 0 ? 0 : 1;
}

#include "mailbox.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "engine.h"

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

// Layers ask one after the other within a step: the next request is met by a thread that is awake. Between steps it
// sleeps longer and longer, and where no GPU works longer still: measured, looking every 200 us takes 6 % of a core,
// every 1,000 us 2 %.
constexpr std::chrono::microseconds kBusy{200};
constexpr std::chrono::microseconds kPauseMin{20}, kPauseMax{200}, kPauseIdle{1000};
constexpr std::chrono::milliseconds kIdle{100};
constexpr unsigned long kTimerSlackNs =
    1000;  // by default, sleeps take 50 us longer than asked: a third of such a pause
constexpr const char* kThreadName = "tierstore-mail";  // at most 15 letters
constexpr int kPausesAPoll = 16;  // instructions between two looks, about a microsecond, in which others get the lock

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::chrono::duration<double> limit(double seconds) { return std::chrono::duration<double>(std::min(seconds, 1e9)); }

int64_t load_word(const uint8_t* from) {
  return __atomic_load_n(reinterpret_cast<const int64_t*>(from), __ATOMIC_RELAXED);
}

struct Outcome {
  MailboxStatus status;
  Fault fault;
};

}  // namespace

// A block with what its requests are checked by. The thread alone serves it; fault and count are under the server's
// lock.
struct MailboxServer::Mailbox {
  Mailbox(uint64_t id, const Table& table, size_t index, uint8_t* block, size_t pairs_max, bool by_row_id)
      : id(id),
        index(index),
        is_plain(table.is_plain),
        num_rows(table.num_rows),
        shape{pairs_max, table.entry_bytes(), by_row_id ? table.rows_per_key : 0},
        block(block),
        keys(pairs_max),
        pairs(pairs_max) {
    std::memset(block, 0, kMailboxKeys);
  }

  bool has_request() {
    requested = __atomic_load_n(reinterpret_cast<const int64_t*>(block + kMailboxRequested), __ATOMIC_ACQUIRE);
    return requested != answered;
  }

  // The same for another thread: what is being served stays what it is.
  bool is_waiting() const { return load_word(block + kMailboxRequested) != answered; }

  // Copies the request out of the block; false where it cannot be.
  bool take_request(size_t& num_misses) {
    const int64_t count = load_word(block + kMailboxNumMisses);
    if (count < 0 || count > static_cast<int64_t>(shape.pairs_max)) return false;
    num_misses = static_cast<size_t>(count);
    const auto* from = reinterpret_cast<const int32_t*>(block + shape.pairs_start());
    bool good = true;
    for (size_t i = 0; i < num_misses; ++i) {
      keys[i] = load_word(block + kMailboxKeys + i * sizeof(int64_t));
      pairs[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
      const bool is_key = keys[i] >= 0 && (!is_plain || static_cast<uint64_t>(keys[i]) < num_rows);
      good &= is_key || (keys[i] == kMailboxRowIds && shape.rows_per_key > 0);
      good &= pairs[i] >= 0 && static_cast<size_t>(pairs[i]) < shape.pairs_max;
    }
    return good;
  }

  // Brings the entries. Blocks on the disk.
  Outcome serve(Engine& engine) {
    size_t num_misses = 0;
    if (!take_request(num_misses)) return {MailboxStatus::kDamaged, {}};
    try {
      const Engine::Use use(engine);
      if (!use) return {MailboxStatus::kClosed, {}};
      uint8_t* entries = block + shape.entries_start();
      Gathered gathered;
      if (!gather(engine, use.view(), num_misses, entries, gathered)) return {MailboxStatus::kDamaged, {}};
      engine.count_batch(gathered);
      const std::shared_ptr<Job> job = engine.make_job(std::move(gathered), {{index, entries}});
      engine.fetch(job);
      return {job->fault.kind == FaultKind::kNone ? MailboxStatus::kThere : MailboxStatus::kFaulty, job->fault};
    } catch (const std::exception&) {  // of this thread, an exception would end the process
      return {MailboxStatus::kFaulty, {FaultKind::kNoMemory, static_cast<uint32_t>(index), 0, 0}};
    }
  }

  // Keys that follow one another are gathered at once; the rows of a pair without one are misses by themselves.
  bool gather(Engine& engine, const EpochView& view, size_t num_misses, uint8_t* entries, Gathered& gathered) {
    for (size_t i = 0; i < num_misses;) {
      size_t end = i;
      while (end < num_misses && keys[end] != kMailboxRowIds) ++end;
      if (end > i && !engine.gather(view, index, {keys.data() + i, end - i, pairs.data() + i, i}, entries, gathered))
        return false;
      for (i = end; i < num_misses && keys[i] == kMailboxRowIds; ++i) {
        const size_t heads = shape.rows_per_key;
        const auto* ids = reinterpret_cast<const int64_t*>(block + shape.row_ids_start()) + i * heads;
        if (!engine.gather_rows(index, {ids, heads, nullptr, i * heads}, entries, false, gathered)) return false;
      }
    }
    return true;
  }

  void answer(MailboxStatus status) {
    __atomic_store_n(reinterpret_cast<int64_t*>(block + kMailboxStatus), static_cast<int64_t>(status),
                     __ATOMIC_RELAXED);
    answered = requested;
    __atomic_store_n(reinterpret_cast<int64_t*>(block + kMailboxAnswered), answered, __ATOMIC_RELEASE);
  }

  const uint64_t id;
  const size_t index;
  const bool is_plain;
  const uint64_t num_rows;
  const MailboxShape shape;
  uint8_t* const block;
  std::vector<int64_t> keys;
  std::vector<int32_t> pairs;
  int64_t requested = 0, answered = 0;  // the block's own words might be written by anybody
  uint64_t num_served = 0;
  bool timed = false;
  Fault fault;  // the first that nobody took
};

struct MailboxServer::State {
  explicit State(Engine& engine) : engine(&engine) {}

  Mailbox& find(uint64_t id) {
    for (const std::shared_ptr<Mailbox>& mailbox : mailboxes) {
      if (mailbox->id == id) return *mailbox;
    }
    throw std::invalid_argument("there is no such mailbox");
  }

  // The next mailbox that asks, so that none waits for another twice; null where none does.
  std::shared_ptr<Mailbox> next_asking() {
    for (size_t i = 0; i < mailboxes.size(); ++i) {
      const size_t at = (next + i) % mailboxes.size();
      if (!mailboxes[at]->has_request()) continue;
      next = at + 1;
      return mailboxes[at];
    }
    return nullptr;
  }

  Engine* engine;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::shared_ptr<Mailbox>> mailboxes;
  std::shared_ptr<Mailbox> serving;  // without the lock; null between two requests
  Engine* served_by = nullptr;       // that one
  size_t next = 0;
  uint64_t last_id = 0;
  bool running = false;  // whether there is a thread
  bool closed = false;
};

MailboxServer::MailboxServer(Engine& engine) : state_(std::make_shared<State>(engine)) {}

MailboxServer::~MailboxServer() { close(kEndWaitS); }

uint64_t MailboxServer::add(size_t table, uint8_t* block, size_t pairs_max, bool by_row_id) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const Engine::Use use(*state.engine);
  if (!use) throw std::runtime_error("the engine is closed");
  if (state.closed) throw std::runtime_error("the mailbox server is closed, as it is in a forked child");
  auto mailbox =
      std::make_shared<Mailbox>(++state.last_id, state.engine->tables()[table], table, block, pairs_max, by_row_id);
  state.mailboxes.push_back(mailbox);
  if (!state.running) {
    try {
      // Nobody joins it, so that nothing of it is left over in a forked child: `running` says when it has ended.
      std::thread([shared = state_] { poll(shared); }).detach();
    } catch (...) {
      state.mailboxes.pop_back();
      throw;
    }
    state.running = true;
  }
  state.changed.notify_all();
  return mailbox->id;
}

bool MailboxServer::remove(uint64_t id, double seconds) {
  State& state = *state_;
  std::unique_lock<std::mutex> lock(state.mutex);
  auto& all = state.mailboxes;
  all.erase(std::remove_if(all.begin(), all.end(), [id](const auto& mailbox) { return mailbox->id == id; }), all.end());
  state.changed.notify_all();
  return state.changed.wait_for(lock, limit(seconds),
                                [&] { return state.serving == nullptr || state.serving->id != id; });
}

std::optional<Fault> MailboxServer::take_fault(uint64_t id) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  Mailbox& mailbox = state_->find(id);
  if (mailbox.fault.kind == FaultKind::kNone) return std::nullopt;
  const Fault fault = mailbox.fault;
  mailbox.fault = {};
  return fault;
}

void MailboxServer::time(uint64_t id) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->find(id).timed = true;
}

uint64_t MailboxServer::served(uint64_t id) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->find(id).num_served;
}

bool MailboxServer::move_to(Engine& engine, double seconds) {
  State& state = *state_;
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit(seconds));
  std::unique_lock<std::mutex> lock(state.mutex);
  std::vector<std::pair<std::shared_ptr<Mailbox>, uint64_t>>
      asking;  // and how many requests each has had when this one is answered
  for (const std::shared_ptr<Mailbox>& mailbox : state.mailboxes) {
    if (mailbox->is_waiting()) asking.emplace_back(mailbox, mailbox->num_served + 1);
  }
  const auto answered = [&] {
    return state.closed || std::all_of(asking.begin(), asking.end(), [&](const auto& each) {
             return each.first->num_served >= each.second ||
                    std::find(state.mailboxes.begin(), state.mailboxes.end(), each.first) == state.mailboxes.end();
           });
  };
  if (!state.changed.wait_until(lock, until, answered)) return false;
  state.engine = &engine;
  return state.changed.wait_until(lock, until,
                                  [&] { return state.serving == nullptr || state.served_by == state.engine; });
}

bool MailboxServer::close(double seconds) {
  State& state = *state_;
  std::unique_lock<std::mutex> lock(state.mutex);
  state.closed = true;
  state.mailboxes.clear();
  state.changed.notify_all();
  return state.changed.wait_for(lock, limit(seconds), [&] { return !state.running; });
}

void MailboxServer::before_fork() { state_->mutex.lock(); }

void MailboxServer::after_fork(bool in_child) {
  state_->mutex.unlock();
  if (!in_child) return;
  // Threads of the parent that wait for `changed` are not here, but counted in it: it must not be destroyed.
  static std::vector<std::shared_ptr<State>>& left = *new std::vector<std::shared_ptr<State>>;
  left.push_back(state_);
  state_ = std::make_shared<State>(*left.back()->engine);
  state_->closed = true;
}

// The thread: as long as there are mailboxes, looks whether one asks.
void MailboxServer::poll(const std::shared_ptr<State>& shared) {
  State& state = *shared;
  std::unique_lock<std::mutex> lock(state.mutex);
  prctl(PR_SET_NAME, kThreadName);
  prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  Clock::time_point last = Clock::now();
  std::chrono::microseconds pause = kPauseMin;
  while (!state.mailboxes.empty()) {
    state.serving = state.next_asking();
    if (state.serving != nullptr) {
      Engine& engine = *(state.served_by = state.engine);
      const auto started = state.serving->timed ? Latency::begin() : Latency::Clock::time_point{};
      lock.unlock();
      const Outcome outcome = state.serving->serve(engine);
      lock.lock();
      if (outcome.status == MailboxStatus::kClosed && state.engine != &engine) continue;  // another has taken its place
      Mailbox& served = *state.serving;
      if (outcome.status == MailboxStatus::kThere) engine.latency.end(started);
      ++served.num_served;
      if (served.fault.kind == FaultKind::kNone) served.fault = outcome.fault;
      served.answer(outcome.status);  // last: who sees it finds fault and count
      state.serving = nullptr;
      state.changed.notify_all();
      last = Clock::now();
      pause = kPauseMin;
      continue;
    }
    const Clock::duration unasked = Clock::now() - last;
    if (unasked < kBusy) {
      lock.unlock();
      for (int i = 0; i < kPausesAPoll; ++i) pause_briefly();
      lock.lock();
    } else {
      state.changed.wait_for(lock, unasked < kIdle ? pause : kPauseIdle);
      pause = std::min(2 * pause, kPauseMax);
    }
  }
  state.running = false;
  state.changed.notify_all();
}

}  // namespace tierstore

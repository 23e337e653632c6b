// Mailboxes: a kernel on a GPU writes what it missed into a block of page-locked host memory, and a thread here brings
// the entries.
//
//   from                 bytes                    what                                                     written by
//   0                    8                        requested: the number of the step, unlike the one before device, last
//   8                    8                        num_misses                                               device
//   64                   8                        answered: what was requested                             thread, last
//   72                   8                        status: a MailboxStatus                                  thread
//   128                  8                        timed_out: the step that was given up, for the owner     device
//   136                  8                        invalid_token_position: 1 + that of an invalid token id  device
//   144                  8                        failed: a step whose entries did not come                device
//   192                  8 * pairs_max            keys, i64                                                device
//   behind               4 * pairs_max            pairs, i32: key i is of order pairs[i] % O               device
//   next multiple of 64  entry_bytes * pairs_max  entries, entry i being that of key i                     thread
//   next multiple of 64  8 * H * pairs_max        row ids, i64, of keys that are kMailboxRowIds            device
//
// Only a mailbox by row id has the last part. Row ids that are those of no key are read one by one, -1 for a zero row.
//
// Nothing that the device wrote is trusted: it is copied, each word loaded once, and the copy checked, so that a GPU
// gone wrong gets a status and never harms the host. One thread polls all mailboxes of an engine and serves one request
// after the other: a page reader reads as deep as the disk gives, whoever asks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>

#include "job.h"

namespace tierstore {

class Engine;

constexpr size_t kMailboxRequested = 0, kMailboxNumMisses = 8;
constexpr size_t kMailboxAnswered = 64, kMailboxStatus = 72;
constexpr size_t kMailboxTimedOut = 128, kMailboxInvalidTokenPosition = 136, kMailboxFailed = 144;
constexpr size_t kMailboxKeys = 192;
constexpr int64_t kMailboxRowIds = -2;  // in place of a key: its entry is that of the pair's row ids
constexpr size_t kMailboxAlignment = 64;
constexpr size_t kMailboxPairsMax = INT32_MAX;  // places of pairs are int32
static_assert(kMailboxRequested / 64 == kMailboxNumMisses / 64 && kMailboxNumMisses / 64 != kMailboxAnswered / 64 &&
                  kMailboxAnswered / 64 == kMailboxStatus / 64 && kMailboxStatus / 64 != kMailboxTimedOut / 64,
              "a cache line has one writer");
static_assert(kMailboxKeys % kMailboxAlignment == 0 && kMailboxKeys >= kMailboxFailed + 8,
              "words and keys do not meet");

enum class MailboxStatus : int64_t {
  kThere,    // the entries are
  kFaulty,   // they are not: `take_fault` says why
  kDamaged,  // the count, a key or a pair cannot be
  kClosed,   // the engine was closed
};
constexpr const char* kMailboxStatusNames[] = {"there", "fault", "damaged", "closed"};
static_assert(std::size(kMailboxStatusNames) == static_cast<size_t>(MailboxStatus::kClosed) + 1, "a name each");

struct MailboxShape {
  size_t pairs_max;  // 1 to kMailboxPairsMax: of one request, and of the batch that its pairs are of
  size_t entry_bytes;
  size_t rows_per_key = 0;  // of a mailbox by row id; 0 of others

  size_t pairs_start() const { return kMailboxKeys + pairs_max * sizeof(int64_t); }
  size_t entries_start() const { return aligned(pairs_start() + pairs_max * sizeof(int32_t)); }
  size_t entries_end() const { return entries_start() + pairs_max * entry_bytes; }
  size_t row_ids_start() const { return aligned(entries_end()); }
  size_t num_bytes() const {
    return rows_per_key == 0 ? entries_end() : row_ids_start() + pairs_max * rows_per_key * sizeof(int64_t);
  }

  static constexpr size_t aligned(size_t start) {
    return (start + kMailboxAlignment - 1) / kMailboxAlignment * kMailboxAlignment;
  }
};

class MailboxServer {
 public:
  static constexpr double kEndWaitS = 300.0;

  // The engine that serves, and the blocks of mailboxes, must outlive the server's thread: see `close`. The engine may
  // be closed before.
  explicit MailboxServer(Engine& engine);
  // Closes; where the thread does not end within kEndWaitS, it goes on with what it was given.
  ~MailboxServer();
  MailboxServer(const MailboxServer&) = delete;
  MailboxServer& operator=(const MailboxServer&) = delete;

  // Clears the words of a block, which nobody may use yet, and serves it from now on. Starts the thread where there is
  // none. Throws std::runtime_error where the server or the engine is closed, std::system_error where no thread can be
  // had. by_row_id: whether keys may be kMailboxRowIds.
  uint64_t add(size_t table, uint8_t* block, size_t pairs_max, bool by_row_id = false);

  // Ends the service of a mailbox. Returns whether its block is touched no more; false where `seconds` ran out, and it
  // is still written to: call again. The last one takes the thread with it.
  bool remove(uint64_t id, double seconds);

  // The first fault of a mailbox since one was taken. Throws std::invalid_argument where there is no such mailbox.
  std::optional<Fault> take_fault(uint64_t id);
  // Has the engine's latencies count what each request of a mailbox took to answer, from now on, one in eight of them.
  // Throws as `take_fault` does.
  void time(uint64_t id);
  // Requests that were answered, whatever the answer. Throws as `take_fault` does.
  uint64_t served(uint64_t id);

  // Serves what has been asked for already, then by another engine of the same tables; a request is served by one of
  // the two. Returns whether all that is done and the old one is used no more; false where `seconds` ran out: call
  // again.
  bool move_to(Engine& engine, double seconds);

  // Removes all mailboxes, for ever. Returns as `remove` does: after true, no thread uses engine or blocks.
  bool close(double seconds);

  // Around a fork; the lock is held between the two. The child's server is closed: the parent's thread is not there,
  // and no GPU is.
  void before_fork();
  void after_fork(bool in_child);

 private:
  struct Mailbox;
  struct State;

  static void poll(const std::shared_ptr<State>& state);

  std::shared_ptr<State> state_;  // the thread's too
};

}  // namespace tierstore

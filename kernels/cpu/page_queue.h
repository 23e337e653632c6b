// How pages get from shards into memory: one contract, four implementations.
//
// A queue belongs to one thread at a time. It hands pages back unchecked, in whatever order they come; short reads and
// interruptions are its own business. No call blocks longer than its time limit, or than one read of a page that it
// makes itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace tierstore {

// One open shard. `direct_fd` is -1 where its file system has no O_DIRECT; `map` is null unless pages are read by mmap.
// `buffered_fd` is -1 if it is no file of this process's, but served by another one.
struct ShardFile {
  int buffered_fd = -1;
  int direct_fd = -1;
  const uint8_t* map = nullptr;
  size_t num_bytes = 0;
  uint32_t number = 0;            // of the files that a queue was made for
  uint32_t table = 0, index = 0;  // of a shard: which one of which table
};

struct PageRead {
  const ShardFile* shard;
  uint64_t byte_start;
  uint32_t num_bytes;
  uint32_t slot;  // which of the caller's buffers, below the queue's depth; names the read when it is done
  uint8_t* to;
};

constexpr int kCutShort = -1;  // the file ends before the page does

struct PageDone {
  uint32_t slot;
  int error;  // 0, an errno, or kCutShort
};

// Made for a depth: at most so many reads are under way, each in a slot of its own. What that needs is taken when the
// queue is made, so that neither call below can fail: a read that cannot be begun, or whose queue is broken, comes back
// with its errno.
class PageQueue {
 public:
  virtual ~PageQueue() = default;

  // Declares the memory that all reads go to. Comes before the first.
  virtual void register_memory(uint8_t*, size_t) noexcept {}

  // Whether files and memory are registered with the kernel, where that is of use: reads cost less then.
  virtual bool is_registered() const { return true; }

  // Takes on reads, sorted. Does not wait for their pages. They may begin as late as the next `send` or `reap`: whoever
  // reaps at once saves a system call.
  virtual void start(const std::vector<PageRead>& reads) noexcept = 0;

  // Begins what was taken on.
  virtual void send() noexcept {}

  // Appends finished reads to `done`, which has room for all that have arrived; if nothing has, waits for one, or for
  // several: about `wanted`. Appends nothing after `timeout_ms`.
  virtual void reap(std::vector<PageDone>& done, size_t wanted, int timeout_ms) noexcept = 0;

  // Called for a queue that is never destroyed, because a read of it hangs: no file stays registered with the kernel
  // but those of reads under way. Any thread may call; reads that start later fail.
  virtual void let_files_go() noexcept {}

  // Called in a forked child instead of the destructor: gives back what is the child's own, touches nothing shared.
  virtual void abandon_after_fork() {}
};

enum class ReadMode { kUring, kMmap, kPread, kServed };

// Returns 0 where io_uring can be used by this process, else the errno that says why not.
int probe_uring();
// Returns 0 where process_madvise(MADV_WILLNEED) can be used by this process on itself, else the errno.
int probe_process_madvise();

// files: all that will be read, in the order of their numbers.
std::unique_ptr<PageQueue> make_uring_queue(size_t depth, const std::vector<const ShardFile*>& files);
std::unique_ptr<PageQueue> make_mmap_queue(size_t depth, bool use_process_madvise);
// slot_bytes: of the longest read. address: of the Unix socket that serves shards. wait_s: for any answer, at most.
std::unique_ptr<PageQueue> make_served_queue(size_t depth, size_t slot_bytes, const std::string& address,
                                             double wait_s);

// Threads that pread for any number of queues, joined when destroyed. With fewer threads than asked for, because the
// system gives no more, reads are slower; with none at all, whoever reaps reads.
class PreadPool {
 public:
  static std::unique_ptr<PreadPool> make(size_t num_threads);
  virtual ~PreadPool() = default;
  virtual std::unique_ptr<PageQueue> make_queue(size_t depth) = 0;
};

// Reads with pread until all is there; returns 0, an errno or kCutShort.
int read_whole(int fd, uint8_t* to, size_t num_bytes, uint64_t byte_start);

}  // namespace tierstore

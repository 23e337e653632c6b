// Pages through the page cache: by memory maps with read-ahead on request, or by a pool of threads.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "line.h"
#include "page_queue.h"

#ifndef __NR_pidfd_open
#define __NR_pidfd_open 434
#endif
#ifndef __NR_process_madvise
#define __NR_process_madvise 440
#endif

namespace tierstore {
namespace {

constexpr size_t kRangesMax = 1024;  // of one process_madvise; the kernel's UIO_MAXIOV

int open_self() { return static_cast<int>(syscall(__NR_pidfd_open, getpid(), 0)); }

ssize_t advise(int pidfd, const iovec* ranges, size_t count) {
  return syscall(__NR_process_madvise, pidfd, ranges, count, MADV_WILLNEED, 0);
}

// Maps announce to the kernel in one call which pages will be wanted; the bytes are then copied by pread, which reports
// a file that was cut meanwhile as an error where a load from the map would be a signal.
class MmapQueue : public PageQueue {
 public:
  MmapQueue(size_t depth, bool use_process_madvise) : reads_(depth) {
    ranges_.reserve(std::min(depth, kRangesMax));
    if (use_process_madvise) pidfd_ = open_self();
  }

  ~MmapQueue() override {
    if (pidfd_ >= 0) close(pidfd_);
  }

  void abandon_after_fork() override {
    if (pidfd_ >= 0) close(pidfd_);
    pidfd_ = -1;
  }

  void start(const std::vector<PageRead>& reads) noexcept override {
    for (const PageRead& read : reads) reads_[(first_ + count_++) % reads_.size()] = read;
    for (size_t i = 0; i < reads.size();) {
      size_t end = i + 1;
      uint64_t byte_end = reads[i].byte_start + reads[i].num_bytes;
      for (; end < reads.size() && reads[end].shard == reads[i].shard && reads[end].byte_start == byte_end; ++end) {
        byte_end += reads[end].num_bytes;
      }
      const ShardFile& shard = *reads[i].shard;
      if (pidfd_ >= 0 && shard.map != nullptr) {
        ranges_.push_back({const_cast<uint8_t*>(shard.map) + reads[i].byte_start, byte_end - reads[i].byte_start});
        if (ranges_.size() == ranges_.capacity()) flush();
      } else {
        posix_fadvise(shard.buffered_fd, static_cast<off_t>(reads[i].byte_start),
                      static_cast<off_t>(byte_end - reads[i].byte_start), POSIX_FADV_WILLNEED);
      }
      i = end;
    }
    flush();
  }

  void reap(std::vector<PageDone>& done, size_t, int) noexcept override {
    if (count_ == 0) return;
    const PageRead read = reads_[first_];
    first_ = (first_ + 1) % reads_.size();
    --count_;
    done.push_back({read.slot, read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start)});
  }

 private:
  // Advice is no promise: if it fails, the reads that follow are slower and right all the same.
  void flush() {
    if (!ranges_.empty()) advise(pidfd_, ranges_.data(), ranges_.size());
    ranges_.clear();
  }

  int pidfd_ = -1;
  std::vector<PageRead> reads_;  // a ring of those not yet made
  size_t first_ = 0, count_ = 0;
  std::vector<iovec> ranges_;  // scratch
};

// What the queue and the pool's threads share of one queue. Guarded by `mutex`.
struct DoneList {
  explicit DoneList(size_t depth) { done.reserve(depth); }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<PageDone> done;
  size_t in_flight = 0;
};

// A read that waits for a thread; its slot's, so that there is always one for a read that a queue takes on.
struct PoolTask {
  PageRead read;
  std::shared_ptr<DoneList> list;
  PoolTask* next_in_line = nullptr;
};

class ThreadedPreadPool : public PreadPool {
 public:
  explicit ThreadedPreadPool(size_t num_threads) {
    threads_.reserve(num_threads);
    try {
      while (threads_.size() < num_threads) threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {  // no more threads, or no memory for one's stack: those there are do it
    }
  }

  ~ThreadedPreadPool() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::unique_ptr<PageQueue> make_queue(size_t depth) override;

  bool has_threads() const { return !threads_.empty(); }

  // tasks: of a queue, by slot.
  void add(const std::vector<PageRead>& reads, std::vector<PoolTask>& tasks) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const PageRead& read : reads) line_.push(tasks[read.slot]);
    }
    changed_.notify_all();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !line_.empty(); });
      if (stop_) return;
      // Copied: once it is done, the queue may use its slot again, or be gone.
      PoolTask* task = line_.pop();
      const PageRead read = task->read;
      const std::shared_ptr<DoneList> list = task->list;
      lock.unlock();
      const int error = read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start);
      {
        const std::lock_guard<std::mutex> guard(list->mutex);
        list->done.push_back({read.slot, error});
      }
      list->changed.notify_one();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  Line<PoolTask> line_;  // guarded by mutex_, as is
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class PreadQueue : public PageQueue {
 public:
  PreadQueue(ThreadedPreadPool& pool, size_t depth)
      : pool_(pool), list_(std::make_shared<DoneList>(depth)), tasks_(depth) {
    for (PoolTask& task : tasks_) task.list = list_;
  }

  void start(const std::vector<PageRead>& reads) noexcept override {
    {
      const std::lock_guard<std::mutex> lock(list_->mutex);
      list_->in_flight += reads.size();
    }
    for (const PageRead& read : reads) tasks_[read.slot].read = read;
    if (pool_.has_threads()) {
      pool_.add(reads, tasks_);
    } else {
      for (const PageRead& read : reads) own_line_.push(tasks_[read.slot]);
    }
  }

  void reap(std::vector<PageDone>& done, size_t, int timeout_ms) noexcept override {
    if (PoolTask* task = own_line_.pop()) {
      const PageRead& read = task->read;
      const int error = read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start);
      const std::lock_guard<std::mutex> lock(list_->mutex);
      list_->done.push_back({read.slot, error});
    }
    std::unique_lock<std::mutex> lock(list_->mutex);
    if (list_->in_flight == 0) return;
    list_->changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return !list_->done.empty(); });
    list_->in_flight -= list_->done.size();
    done.insert(done.end(), list_->done.begin(), list_->done.end());
    list_->done.clear();
  }

 private:
  ThreadedPreadPool& pool_;
  std::shared_ptr<DoneList> list_;
  std::vector<PoolTask> tasks_;  // by slot
  Line<PoolTask> own_line_;      // of a pool without threads
};

std::unique_ptr<PageQueue> ThreadedPreadPool::make_queue(size_t depth) {
  return std::make_unique<PreadQueue>(*this, depth);
}

}  // namespace

int read_whole(int fd, uint8_t* to, size_t num_bytes, uint64_t byte_start) {
  for (size_t done = 0; done < num_bytes;) {
    const ssize_t count = pread(fd, to + done, num_bytes - done, static_cast<off_t>(byte_start + done));
    if (count == 0) return kCutShort;
    if (count > 0) {
      done += static_cast<size_t>(count);
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

int probe_process_madvise() {
  const int pidfd = open_self();
  if (pidfd < 0) return errno;
  // An anonymous page of our own: asking for it is harmless.
  void* page = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const iovec range{page, 4096};
  errno = 0;
  const int code = page == MAP_FAILED ? errno : advise(pidfd, &range, 1) < 0 ? errno : 0;
  if (page != MAP_FAILED) munmap(page, 4096);
  close(pidfd);
  return code == EBADF ? 0
                       : code;  // before 6.x, WILLNEED of memory without a file is EBADF: the call itself is allowed
}

std::unique_ptr<PageQueue> make_mmap_queue(size_t depth, bool use_process_madvise) {
  return std::make_unique<MmapQueue>(depth, use_process_madvise);
}

std::unique_ptr<PreadPool> PreadPool::make(size_t num_threads) {
  return std::make_unique<ThreadedPreadPool>(num_threads);
}

}  // namespace tierstore

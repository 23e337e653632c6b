// Pages through the page cache: by memory maps with read-ahead on request, or by a pool of threads.
#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

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

// Maps tell the kernel in one call which pages will be wanted; the bytes are then copied by pread, which reports a file that
// was cut meanwhile as an error where a load from the map would be a signal.
class MmapQueue : public PageQueue {
 public:
  explicit MmapQueue(bool use_process_madvise) : pidfd_(use_process_madvise ? open_self() : -1) {}

  ~MmapQueue() override {
    if (pidfd_ >= 0) close(pidfd_);
  }

  void abandon_after_fork() override {
    if (pidfd_ >= 0) close(pidfd_);
    pidfd_ = -1;
  }

  void start(const std::vector<PageRead>& reads) override {
    queue_.insert(queue_.end(), reads.begin(), reads.end());
    std::vector<iovec> ranges;
    for (size_t i = 0; i < reads.size();) {
      size_t end = i + 1;
      uint64_t byte_end = reads[i].byte_start + reads[i].num_bytes;
      for (; end < reads.size() && reads[end].shard == reads[i].shard && reads[end].byte_start == byte_end; ++end) {
        byte_end += reads[end].num_bytes;
      }
      const ShardFile& shard = *reads[i].shard;
      if (pidfd_ >= 0 && shard.map != nullptr) {
        ranges.push_back({const_cast<uint8_t*>(shard.map) + reads[i].byte_start, byte_end - reads[i].byte_start});
        if (ranges.size() == kRangesMax) flush(ranges);
      } else {
        posix_fadvise(shard.buffered_fd, static_cast<off_t>(reads[i].byte_start),
                      static_cast<off_t>(byte_end - reads[i].byte_start), POSIX_FADV_WILLNEED);
      }
      i = end;
    }
    flush(ranges);
  }

  void reap(std::vector<PageDone>& done, int) override {
    if (queue_.empty()) return;
    const PageRead read = queue_.front();
    queue_.pop_front();
    done.push_back({read.slot, read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start)});
  }

 private:
  // Advice is no promise: where it fails, the reads that follow are slower and right all the same.
  void flush(std::vector<iovec>& ranges) {
    if (!ranges.empty()) advise(pidfd_, ranges.data(), ranges.size());
    ranges.clear();
  }

  int pidfd_;
  std::deque<PageRead> queue_;
};

struct DoneList {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<PageDone> done;
  size_t in_flight = 0;
};

class ThreadedPreadPool : public PreadPool {
 public:
  explicit ThreadedPreadPool(size_t num_threads) {
    for (size_t i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadedPreadPool() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::unique_ptr<PageQueue> make_queue() override;

  void add(const std::vector<PageRead>& reads, const std::shared_ptr<DoneList>& list) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const PageRead& read : reads) queue_.push_back({read, list});
    }
    changed_.notify_all();
  }

 private:
  struct Task {
    PageRead read;
    std::shared_ptr<DoneList> list;
  };

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      const Task task = queue_.front();
      queue_.pop_front();
      lock.unlock();
      const PageRead& read = task.read;
      const int error = read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start);
      {
        const std::lock_guard<std::mutex> guard(task.list->mutex);
        task.list->done.push_back({read.slot, error});
      }
      task.list->changed.notify_one();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class PreadQueue : public PageQueue {
 public:
  explicit PreadQueue(ThreadedPreadPool& pool) : pool_(pool), list_(std::make_shared<DoneList>()) {}

  void start(const std::vector<PageRead>& reads) override {
    {
      const std::lock_guard<std::mutex> lock(list_->mutex);
      list_->in_flight += reads.size();
    }
    pool_.add(reads, list_);
  }

  void reap(std::vector<PageDone>& done, int timeout_ms) override {
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
};

std::unique_ptr<PageQueue> ThreadedPreadPool::make_queue() { return std::make_unique<PreadQueue>(*this); }

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
  return code == EBADF ? 0 : code;  // before 6.x, WILLNEED of memory without a file is EBADF: the call itself is allowed
}

std::unique_ptr<PageQueue> make_mmap_queue(bool use_process_madvise) {
  return std::make_unique<MmapQueue>(use_process_madvise);
}

std::unique_ptr<PreadPool> PreadPool::make(size_t num_threads) { return std::make_unique<ThreadedPreadPool>(num_threads); }

}  // namespace tierstore

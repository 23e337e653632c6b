// Pages by io_uring, through bare system calls: no library beyond the kernel's header.
//
// Kernel interface: io_uring_setup(2), io_uring_enter(2). Needs 5.11 (waits with a time limit, IORING_FEAT_EXT_ARG).
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "line.h"
#include "page_queue.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <linux/time_types.h>
#endif

#if defined(IORING_FEAT_EXT_ARG)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <csignal>

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#define __NR_io_uring_register 427
#endif

namespace tierstore {
namespace {

int setup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}

constexpr unsigned kFeatures = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;

constexpr unsigned kAgainMax = 64;              // how often the kernel may say of one read "not now"
constexpr std::chrono::milliseconds kPause{1};  // before the kernel is asked again, if it is short of something

class UringQueue : public PageQueue {
 public:
  UringQueue(size_t depth, const std::vector<const ShardFile*>& files) : slots_(depth) {
    refused_.reserve(depth);
    std::vector<int> fds;
    for (const ShardFile* file : files) fds.insert(fds.end(), {file->direct_fd, file->buffered_fd});
    no_files_.assign(fds.size(), -1);
    io_uring_params params{};
    params.flags = IORING_SETUP_CLAMP;
    fd_ = setup(static_cast<unsigned>(depth), &params);
    if (fd_ < 0) throw std::runtime_error(std::string("io_uring_setup: ") + std::strerror(errno));
    ring_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                   params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    ring_ = map(ring_bytes_, IORING_OFF_SQ_RING);
    sqes_ = static_cast<io_uring_sqe*>(static_cast<void*>(map(sqes_bytes_, IORING_OFF_SQES)));
    sq_tail_ = at(params.sq_off.tail);
    sq_head_ = at(params.sq_off.head);
    sq_mask_ = *at(params.sq_off.ring_mask);
    sq_entries_ = params.sq_entries;
    sq_array_ = at(params.sq_off.array);
    cq_head_ = at(params.cq_off.head);
    cq_tail_ = at(params.cq_off.tail);
    cq_mask_ = *at(params.cq_off.ring_mask);
    cqes_ = static_cast<io_uring_cqe*>(static_cast<void*>(ring_ + params.cq_off.cqes));
    has_files_ = register_all(IORING_REGISTER_FILES, fds.data(), fds.size());
  }

  // The kernel takes a ring apart some time after it is closed. Until then registered files would be open, their file
  // system in use, and registered memory locked, so that the next ring might get none.
  ~UringQueue() override {
    if (has_files_) register_all(IORING_UNREGISTER_FILES, nullptr, 0);
    if (has_memory_) register_all(IORING_UNREGISTER_BUFFERS, nullptr, 0);
    close_all();
  }

  // Takes the files out one by one, which waits for no read. To unregister all waits, before Linux 5.19, for those
  // under way.
  void let_files_go() noexcept override {
    io_uring_files_update nothing{};
    nothing.fds = reinterpret_cast<uint64_t>(no_files_.data());
    if (has_files_) register_all(IORING_REGISTER_FILES_UPDATE, &nothing, no_files_.size());
  }

  // The rings are shared with the parent: only this process's mappings and descriptor go.
  void abandon_after_fork() override { close_all(); }

  // Pinned once, and not for each read. The kernel refuses what is above the limit of locked memory.
  void register_memory(uint8_t* start, size_t num_bytes) noexcept override {
    const iovec memory{start, num_bytes};
    has_memory_ = register_all(IORING_REGISTER_BUFFERS, &memory, 1);
  }

  bool is_registered() const override { return has_files_ && has_memory_; }

  void start(const std::vector<PageRead>& reads) noexcept override {
    for (const PageRead& read : reads) {
      slots_[read.slot] = {read, 0, 0, read.shard->direct_fd >= 0};
      push_or_keep(slots_[read.slot]);
    }
  }

  void send() noexcept override {
    if (unsubmitted_ > 0) enter(0, 0);
  }

  void reap(std::vector<PageDone>& done, size_t wanted, int timeout_ms) noexcept override {
    if (collect(done) > 0 || in_flight_ + unsubmitted_ == 0) return send();
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    for (int left_ms = timeout_ms; left_ms > 0;) {
      const auto min_complete = std::min(static_cast<unsigned>(wanted), in_flight_ + unsubmitted_);
      if (!enter(min_complete, left_ms)) std::this_thread::sleep_for(kPause);
      if (collect(done) > 0) return;
      left_ms = static_cast<int>((until - std::chrono::steady_clock::now()) / std::chrono::milliseconds(1));
    }
  }

 private:
  struct Slot {
    PageRead read;
    uint32_t bytes_done;
    uint32_t num_again;  // how often the kernel could not take it
    bool direct;
    Slot* next_in_line = nullptr;
  };

  bool register_all(unsigned what, const void* items, size_t count) const {
    return syscall(__NR_io_uring_register, fd_, what, items, static_cast<unsigned>(count)) == 0;
  }

  uint8_t* map(size_t num_bytes, off_t offset) {
    void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
    if (address == MAP_FAILED) {
      const int code = errno;
      close_all();
      throw std::runtime_error(std::string("mapping an io_uring: ") + std::strerror(code));
    }
    return static_cast<uint8_t*>(address);
  }

  void close_all() {
    if (sqes_ != nullptr) munmap(sqes_, sqes_bytes_);
    if (ring_ != nullptr) munmap(ring_, ring_bytes_);
    if (fd_ >= 0) close(fd_);
    sqes_ = nullptr;
    ring_ = nullptr;
    fd_ = -1;
  }

  unsigned* at(uint32_t offset) { return static_cast<unsigned*>(static_cast<void*>(ring_ + offset)); }

  bool has_room() const { return *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE) < sq_entries_; }

  void push_or_keep(Slot& wanted) {
    if (broken_ == 0 && to_push_.empty() && has_room()) {
      push(wanted);
    } else {
      to_push_.push(wanted);
      push_all();
    }
  }

  // Puts reads into the submission queue, as many as it has room for: what the kernel has not taken from it yet stays
  // as it is.
  void push_all() {
    if (broken_ != 0) {
      while (const Slot* wanted = to_push_.pop()) refused_.push_back({wanted->read.slot, broken_});
    }
    while (!to_push_.empty() && has_room()) push(*to_push_.pop());
  }

  void push(const Slot& wanted) {
    const ShardFile& shard = *wanted.read.shard;
    const unsigned tail = *sq_tail_;
    io_uring_sqe& sqe = sqes_[tail & sq_mask_];
    std::memset(&sqe, 0, sizeof sqe);
    sqe.opcode = has_memory_ ? IORING_OP_READ_FIXED : IORING_OP_READ;
    sqe.flags = has_files_ ? IOSQE_FIXED_FILE : 0;
    sqe.fd = has_files_      ? static_cast<int>(2 * shard.number + !wanted.direct)
             : wanted.direct ? shard.direct_fd
                             : shard.buffered_fd;
    sqe.addr = reinterpret_cast<uint64_t>(wanted.read.to + wanted.bytes_done);
    sqe.len = wanted.read.num_bytes - wanted.bytes_done;
    sqe.off = wanted.read.byte_start + wanted.bytes_done;
    sqe.user_data = wanted.read.slot;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++unsubmitted_;
  }

  // Submits what is queued and waits, at most timeout_ms, for `min_complete` to finish (no wait if that is 0). Returns
  // false if nothing was waited for: the kernel is short of something for now, or the ring is broken.
  bool enter(unsigned min_complete, int timeout_ms) {
    if (broken_ != 0) return false;
    __kernel_timespec limit{timeout_ms / 1000, timeout_ms % 1000 * 1'000'000ll};
    io_uring_getevents_arg argument{0, _NSIG / 8, 0, reinterpret_cast<uint64_t>(&limit)};
    const unsigned flags = min_complete > 0 ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0u;
    const long submitted = syscall(__NR_io_uring_enter, fd_, unsubmitted_, min_complete, flags,
                                   min_complete > 0 ? &argument : nullptr, sizeof argument);
    if (submitted >= 0) {
      unsubmitted_ -= static_cast<unsigned>(submitted);
      in_flight_ += static_cast<unsigned>(submitted);
      return true;
    }
    if (errno == EINTR || errno == ETIME) return true;
    if (errno != EAGAIN && errno != EBUSY) give_up(errno);
    return false;
  }

  // The ring cannot be entered any more, as when other code of this process has closed its descriptor. What the kernel
  // has not taken is refused, from now on at once; what it has taken still comes by the ring's memory, which stays
  // mapped.
  void give_up(int error) {
    broken_ = error;
    for (unsigned head = __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE); head != *sq_tail_; ++head) {
      refused_.push_back({static_cast<uint32_t>(sqes_[head & sq_mask_].user_data), error});
    }
    unsubmitted_ = 0;
    push_all();
  }

  // Takes what has completed or was refused; reads that came short or were interrupted are started again.
  size_t collect(std::vector<PageDone>& done) {
    size_t count = refused_.size();
    done.insert(done.end(), refused_.begin(), refused_.end());
    refused_.clear();
    unsigned head = *cq_head_;
    const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    for (; head != tail; ++head) {
      const io_uring_cqe& cqe = cqes_[head & cq_mask_];
      const auto slot = static_cast<uint32_t>(cqe.user_data);
      const int32_t result = cqe.res;
      Slot& wanted = slots_[slot];
      --in_flight_;
      if (result > 0) wanted.bytes_done += static_cast<uint32_t>(result);
      const bool came_short = result > 0 && wanted.bytes_done < wanted.read.num_bytes;
      const bool refused_direct = result == -EINVAL && wanted.direct;
      if (came_short || refused_direct) wanted.direct = false;  // the rest may not be aligned as O_DIRECT wants it
      const bool not_now = (result == -EINTR || result == -EAGAIN) && wanted.num_again++ < kAgainMax;
      if (came_short || refused_direct || not_now) {
        push_or_keep(wanted);
      } else {
        done.push_back({slot, result < 0 ? -result : result == 0 ? kCutShort : 0});
        ++count;
      }
    }
    __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    if (!to_push_.empty()) push_all();
    return count;
  }

  int fd_ = -1;
  uint8_t* ring_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  size_t ring_bytes_ = 0, sqes_bytes_ = 0;
  unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, sq_entries_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  unsigned unsubmitted_ = 0, in_flight_ = 0;
  bool has_files_ = false, has_memory_ = false;  // registered
  std::vector<int> no_files_;                    // -1 for each that was
  int broken_ = 0;                               // the errno of an `enter` after which there is no other
  std::vector<Slot> slots_;
  Line<Slot> to_push_;             // reads that the submission queue has not got yet
  std::vector<PageDone> refused_;  // by a broken ring
};

}  // namespace

int probe_uring() {
  io_uring_params params{};
  const int fd = setup(1, &params);
  if (fd < 0) return errno;
  close(fd);
  return (params.features & kFeatures) == kFeatures ? 0 : ENOSYS;
}

std::unique_ptr<PageQueue> make_uring_queue(size_t depth, const std::vector<const ShardFile*>& files) {
  return std::make_unique<UringQueue>(depth, files);
}

}  // namespace tierstore

#else  // no kernel header, or one from before 5.11

namespace tierstore {

int probe_uring() { return ENOSYS; }

std::unique_ptr<PageQueue> make_uring_queue(size_t, const std::vector<const ShardFile*>&) {
  throw std::runtime_error("io_uring: this build has no header linux/io_uring.h of 5.11 or newer");
}

}  // namespace tierstore

#endif

// Pages that another process of this host serves, wherever it has them from: asked for over a Unix socket, handed over
// in shared memory. tiers/served.py is the same in Python, and says what travels; tiers/mooncake_worker.py answers.
//
// What arrives is copied to the caller's slot before anybody checks it, so a server that writes too late, or at any
// time, changes no page that was checked. A server that ends, or does not answer within the limit, fails the reads that
// are under way; the next ones ask again, over a new connection with new memory.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>

#include "page_queue.h"

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kMagic = 0x31505354;  // "TSP1"
constexpr size_t kPerMessageMax = 1024;  // requests, of 24 bytes: far below any socket's buffer

struct Hello {
  uint32_t magic, num_slots, slot_bytes, writes;
};
struct Request {
  uint32_t slot, table, shard, num_bytes;
  uint64_t byte_start;
};
struct Reply {
  uint32_t slot;
  int32_t error;  // 0, an errno, or kCutShort
};
static_assert(sizeof(Hello) == 16 && sizeof(Request) == 24 && sizeof(Reply) == 8, "as they travel");

// Sends the hello with the descriptor of the shared memory. Returns 0 or an errno.
int send_hello(int socket, Hello hello, int memory_fd) {
  iovec part{&hello, sizeof hello};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &memory_fd, sizeof(int));
  return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? errno : 0;
}

class ServedQueue : public PageQueue {
 public:
  ServedQueue(size_t depth, size_t slot_bytes, const std::string& address, double wait_s)
      : slot_bytes_(slot_bytes),
        per_message_(std::min(kPerMessageMax, (depth + 1) / 2)),
        limit_(static_cast<int64_t>(wait_s * 1000)),
        reads_(depth),
        is_asked_(depth, false) {
    address_.sun_family = AF_UNIX;
    if (address.size() >= sizeof address_.sun_path) throw std::bad_alloc();
    std::memcpy(address_.sun_path, address.c_str(), address.size() + 1);
    requests_.reserve(depth);
    local_.reserve(depth);
    failed_.reserve(depth);
    replies_.resize(depth);
  }

  ~ServedQueue() override { disconnect(); }

  void abandon_after_fork() override {
    if (socket_ >= 0) close(socket_);  // the memory is not in the child: MADV_DONTFORK
    socket_ = -1;
    shared_ = nullptr;
  }

  void start(const std::vector<PageRead>& reads) noexcept override {
    requests_.clear();
    for (const PageRead& read : reads) {
      reads_[read.slot] = read;
      if (read.shard->buffered_fd >= 0) {  // placements and versions are files of this host
        local_.push_back(read.slot);
        continue;
      }
      requests_.push_back({read.slot, read.shard->table, read.shard->index, read.num_bytes, read.byte_start});
      is_asked_[read.slot] = true;
    }
    if (requests_.empty()) return;
    int error = socket_ < 0 ? connect_anew() : 0;
    if (num_asked_ == 0) {
      last_reply_ = Clock::now();
      if (error == 0 && has_ended()) {  // since the last read; there is another by now
        disconnect();
        error = connect_anew();
      }
    }
    num_asked_ += requests_.size();
    for (size_t i = 0; error == 0 && i < requests_.size(); i += per_message_) {
      const size_t count = std::min(per_message_, requests_.size() - i);
      if (send_message(&requests_[i], count * sizeof(Request)) < 0) error = errno;
    }
    if (error == EAGAIN) error = ETIMEDOUT;  // it takes nothing off its socket
    if (error == EPIPE) error = ECONNRESET;
    if (error != 0) fail_all(error);
  }

  void reap(std::vector<PageDone>& done, size_t, int timeout_ms) noexcept override {
    if (failed_.empty() && !local_.empty()) {
      const PageRead& read = reads_[local_.back()];
      local_.pop_back();
      done.push_back({read.slot, read_whole(read.shard->buffered_fd, read.to, read.num_bytes, read.byte_start)});
      return;
    }
    if (failed_.empty() && num_asked_ > 0) await(done, timeout_ms);
    done.insert(done.end(), failed_.begin(), failed_.end());
    failed_.clear();
  }

 private:
  // Waits for a message, and takes what has come.
  void await(std::vector<PageDone>& done, int timeout_ms) noexcept {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(last_reply_ + limit_ - Clock::now());
    pollfd waited{socket_, POLLIN, 0};
    const int wait_ms = std::max(0, std::min(timeout_ms, static_cast<int>(left.count())));
    if (poll(&waited, 1, wait_ms) > 0) {
      take(done);
    } else if (left.count() <= 0) {
      fail_all(ETIMEDOUT);
    }
  }

  void take(std::vector<PageDone>& done) noexcept {
    const ssize_t num_bytes = recv(socket_, replies_.data(), replies_.size() * sizeof(Reply), MSG_DONTWAIT);
    if (num_bytes < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (num_bytes <= 0) return fail_all(ECONNRESET);
    if (num_bytes % sizeof(Reply) != 0) return fail_all(EPROTO);
    last_reply_ = Clock::now();
    for (size_t i = 0; i < static_cast<size_t>(num_bytes) / sizeof(Reply); ++i) {
      const Reply& reply = replies_[i];
      if (reply.slot >= reads_.size() || !is_asked_[reply.slot]) return fail_all(EPROTO);
      const PageRead& read = reads_[reply.slot];
      if (reply.error == 0) std::memcpy(read.to, shared_ + reply.slot * slot_bytes_, read.num_bytes);
      is_asked_[reply.slot] = false;
      --num_asked_;
      done.push_back({reply.slot, reply.error});
    }
  }

  ssize_t send_message(const void* bytes, size_t num_bytes) const noexcept {
    return ::send(socket_, bytes, num_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  bool has_ended() const noexcept {
    pollfd looked_at{socket_, POLLIN, 0};  // nothing is asked for: whatever can be read is its end
    return poll(&looked_at, 1, 0) > 0;
  }

  // Connects with memory of its own. Returns 0 or an errno. Does not wait: whoever listens need not accept yet.
  int connect_anew() noexcept {
    const size_t num_bytes = reads_.size() * slot_bytes_;
    const int memory_fd = memfd_create("tierstore pages", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memory_fd < 0) return errno;
    int error = 0;
    void* memory = MAP_FAILED;
    if (ftruncate(memory_fd, static_cast<off_t>(num_bytes)) != 0 ||
        fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||  // a cut would be a signal
        (memory = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, memory_fd, 0)) == MAP_FAILED ||
        (socket_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) < 0 ||
        connect(socket_, reinterpret_cast<const sockaddr*>(&address_), sizeof address_) != 0) {
      error = errno;
    }
    if (memory != MAP_FAILED) {
      shared_ = static_cast<const uint8_t*>(memory);
      madvise(memory, num_bytes, MADV_DONTFORK);
    }
    const Hello hello{kMagic, static_cast<uint32_t>(reads_.size()), static_cast<uint32_t>(slot_bytes_), 0};
    if (error == 0) error = send_hello(socket_, hello, memory_fd);
    close(memory_fd);
    if (error != 0) disconnect();
    return error;
  }

  void disconnect() noexcept {
    if (socket_ >= 0) close(socket_);
    if (shared_ != nullptr) munmap(const_cast<uint8_t*>(shared_), reads_.size() * slot_bytes_);
    socket_ = -1;
    shared_ = nullptr;
  }

  void fail_all(int error) noexcept {
    disconnect();
    for (uint32_t slot = 0; slot < reads_.size(); ++slot) {
      if (is_asked_[slot]) failed_.push_back({slot, error});
      is_asked_[slot] = false;
    }
    num_asked_ = 0;
  }

  const size_t slot_bytes_;
  const size_t per_message_;               // half of the slots: one half is on its way while the other is looked at
  const std::chrono::milliseconds limit_;  // without any answer
  sockaddr_un address_{};
  int socket_ = -1;
  const uint8_t* shared_ = nullptr;  // slots, which the server writes to
  std::vector<PageRead> reads_;      // by slot
  std::vector<bool> is_asked_;       // by slot: sent, and not answered
  size_t num_asked_ = 0;
  Clock::time_point last_reply_{};
  std::vector<Request> requests_;  // scratch
  std::vector<Reply> replies_;     // scratch
  std::vector<uint32_t> local_;    // slots of reads of files
  std::vector<PageDone> failed_;
};

}  // namespace

std::unique_ptr<PageQueue> make_served_queue(size_t depth, size_t slot_bytes, const std::string& address,
                                             double wait_s) {
  return std::make_unique<ServedQueue>(depth, slot_bytes, address, wait_s);
}

}  // namespace tierstore

// Reads of the yardstick: ranges of files, by io_uring or by WILLNEED and pread. Raw system calls, nothing checked but
// the length of what came.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bare.h"

static int fds[kFilesMax];
static uint8_t* maps[kFilesMax];
static int num_files;

static size_t range_bytes(const int64_t* item) { return item[2]; }

static void open_files(int count, char** paths, int flags) {
  if (count > kFilesMax) {
    errno = EMFILE;
    fail("files");
  }
  for (num_files = 0; num_files < count; ++num_files)
    if ((fds[num_files] = open(paths[num_files], O_RDONLY | flags)) < 0) fail(paths[num_files]);
}

// io_uring
// -----------------------------------------------------------------------------------------------------------------

static struct {
  int fd;
  unsigned depth, sq_mask, cq_mask, tail;
  _Atomic unsigned *sq_tail, *cq_head, *cq_tail;
  struct io_uring_sqe* sqes;
  struct io_uring_cqe* cqes;
  uint8_t* fixed;  // where registered memory begins; NULL: the kernel did not register it
} ring;

static int enter(unsigned submit, unsigned wait) {
  int done;
  do {
    done = syscall(SYS_io_uring_enter, ring.fd, submit, wait, IORING_ENTER_GETEVENTS, NULL, 0);
  } while (done < 0 && errno == EINTR);
  if (done < 0) fail("io_uring_enter");
  return done;
}

static void uring_start(int num_arguments, char** arguments) {
  ring.depth = atoi(arguments[0]);
  if (num_arguments < 3 || ring.depth < 1 || ring.depth > kDepthMax) {
    errno = EINVAL;
    fail("uring DEPTH direct|buffered FILE...");
  }
  open_files(num_arguments - 2, arguments + 2, strcmp(arguments[1], "direct") ? 0 : O_DIRECT);
  struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
  ring.fd = syscall(SYS_io_uring_setup, ring.depth, &params);
  if (ring.fd < 0 && errno == EINVAL) {  // before Linux 6.1
    memset(&params, 0, sizeof params);
    ring.fd = syscall(SYS_io_uring_setup, ring.depth, &params);
  }
  if (ring.fd < 0) fail("io_uring_setup");
  size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
  uint8_t* rings = mmap(NULL, sq_bytes > cq_bytes ? sq_bytes : cq_bytes, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
  ring.sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES);
  if (rings == MAP_FAILED || ring.sqes == MAP_FAILED || !(params.features & IORING_FEAT_SINGLE_MMAP))
    fail("mmap of the ring");
  ring.sq_tail = (void*)(rings + params.sq_off.tail);
  ring.cq_head = (void*)(rings + params.cq_off.head);
  ring.cq_tail = (void*)(rings + params.cq_off.tail);
  ring.cqes = (void*)(rings + params.cq_off.cqes);
  ring.sq_mask = params.sq_entries - 1;
  ring.cq_mask = params.cq_entries - 1;
  unsigned* order = (unsigned*)(rings + params.sq_off.array);
  for (unsigned i = 0; i < params.sq_entries; ++i) order[i] = i;
  if (syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_FILES, fds, num_files) < 0) fail("registering files");
}

static void uring_new_out(uint8_t* out, size_t num_bytes) {
  if (ring.fixed) syscall(SYS_io_uring_register, ring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
  struct iovec memory = {out, num_bytes};
  ring.fixed = syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &memory, 1) < 0 ? NULL : out;
}

static void push(const int64_t* item, uint8_t* place, size_t index) {
  struct io_uring_sqe* sqe = &ring.sqes[ring.tail++ & ring.sq_mask];
  memset(sqe, 0, sizeof *sqe);
  sqe->opcode = ring.fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
  sqe->flags = IOSQE_FIXED_FILE;
  sqe->fd = item[0];
  sqe->off = item[1];
  sqe->len = item[2];
  sqe->addr = (uintptr_t)place;
  sqe->user_data = index;
}

static unsigned reap(const struct list* list) {
  unsigned head = atomic_load_explicit(ring.cq_head, memory_order_relaxed), first = head;
  unsigned tail = atomic_load_explicit(ring.cq_tail, memory_order_acquire);
  for (; head != tail; ++head) {
    const struct io_uring_cqe* cqe = &ring.cqes[head & ring.cq_mask];
    if (cqe->res != list->items[cqe->user_data * 3 + 2]) {
      errno = cqe->res < 0 ? -cqe->res : EIO;
      fail("a read of the list");
    }
  }
  atomic_store_explicit(ring.cq_head, head, memory_order_release);
  return tail - first;
}

static uint8_t* uring_run(const struct list* list, size_t start, size_t end, uint8_t* place) {
  size_t next = start, in_flight = 0, pushed = 0;
  while (next < end || in_flight) {
    for (; next < end && in_flight < ring.depth; ++next, ++in_flight, ++pushed) {
      push(list->items + next * 3, place, next);
      place += list->items[next * 3 + 2];
    }
    atomic_store_explicit(ring.sq_tail, ring.tail, memory_order_release);
    pushed -= enter(pushed, next < end ? 1 : in_flight);  // the last ones are waited for together
    in_flight -= reap(list);
  }
  return place;
}

const struct mode uring_mode = {"uring", 3, uring_start, NULL, range_bytes, uring_new_out, uring_run};

// WILLNEED and pread
// -------------------------------------------------------------------------------------------------------

static int process_fd;
static size_t window;  // batches of advice ahead of the copies

static void willneed_start(int num_arguments, char** arguments) {
  window = atoi(arguments[0]);
  open_files(num_arguments - 1, arguments + 1, 0);
  for (int i = 0; i < num_files; ++i) {
    struct stat status;
    if (fstat(fds[i], &status)) fail("fstat");
    maps[i] = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED, fds[i], 0);
    if (maps[i] == MAP_FAILED) fail("mmap of a file");
    posix_fadvise(fds[i], 0, 0, POSIX_FADV_RANDOM);  // pread is not to read ahead of what was asked for
  }
  if ((process_fd = syscall(SYS_pidfd_open, getpid(), 0)) < 0) fail("pidfd_open");
}

static void advise(const struct list* list, size_t start, size_t end) {
  static struct iovec ranges[kRangesPerCall];
  size_t count = end - start;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* item = list->items + (start + i) * 3;
    ranges[i] = (struct iovec){maps[item[0]] + item[1], item[2]};
  }
  if (count && syscall(SYS_process_madvise, process_fd, ranges, count, MADV_WILLNEED, 0) < 0) fail("process_madvise");
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static uint8_t* willneed_run(const struct list* list, size_t start, size_t end, uint8_t* place) {
  size_t advised = start;
  for (size_t i = start; i < end; ++i) {
    while (advised < end && advised < i + window * kRangesPerCall) {
      size_t batch_end = least(advised + kRangesPerCall, end);
      advise(list, advised, batch_end);
      advised = batch_end;
    }
    const int64_t* item = list->items + i * 3;
    if (pread(fds[item[0]], place, item[2], item[1]) != item[2]) fail("a pread of the list");
    place += item[2];
  }
  return place;
}

static void ignore_out(uint8_t* out, size_t num_bytes) { (void)out, (void)num_bytes; }

const struct mode willneed_mode = {"willneed", 3, willneed_start, NULL, range_bytes, ignore_out, willneed_run};

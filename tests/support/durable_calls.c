// Loaded before libc (LD_PRELOAD): records what a process does to the files below a folder, and lets it fail or die.
//
// Environment: DURABLE_ROOT, the folder, and DURABLE_LOG, the file that the records go to. Functions for the process
// itself, by ctypes: durable_fail_at, durable_die_at, durable_count. A record is a `struct record`, a path, a second
// path (of a rename), and the bytes that were written. tests/support/durable_replay.py reads them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, SYNC_FOLDER, MARK };

struct record {
  uint32_t what, path_bytes, other_bytes, is_synced;  // is_synced: of a write, by O_DSYNC
  uint64_t inode, byte_start, num_bytes;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // guards the log's order, and the counts
static int log_fd = -2;
static long count, fail_at = -1, die_at = -1;
static int fail_errno;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char* root(void) { return getenv("DURABLE_ROOT"); }

static int is_ours(const char* path) {
  const char* const folder = root();
  return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static int path_of(int fd, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return is_ours(path);
}

static uint64_t inode_of(int fd) {
  struct stat found;
  return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

static void note(struct record record, const char* path, const char* other, const void* bytes) {
  if (log_fd == -2) {
    const char* const file = getenv("DURABLE_LOG");
    log_fd = file == NULL ? -1 : REAL(open)(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  }
  if (log_fd < 0) return;
  record.path_bytes = (uint32_t)strlen(path);
  record.other_bytes = (uint32_t)strlen(other);
  struct iovec parts[] = {{&record, sizeof record},
                          {(void*)path, record.path_bytes},
                          {(void*)other, record.other_bytes},
                          {(void*)bytes, bytes == NULL ? 0 : record.num_bytes}};
  if (REAL(writev)(log_fd, parts, 4) < 0) abort();
}

// Counts an operation. Returns whether it must fail, with errno set.
static int begin(void) {
  pthread_mutex_lock(&mutex);
  const long number = ++count;
  if (number == fail_at) {
    errno = fail_errno;
    return 1;
  }
  if (number == die_at) kill(getpid(), SIGKILL);
  return 0;
}

static void end(void) {
  const int kept = errno;
  pthread_mutex_unlock(&mutex);
  errno = kept;
}

// The `at`-th operation from now on fails. 0: none.
void durable_fail_at(long at, int error) {
  count = 0;
  fail_at = at > 0 ? at : -1;
  fail_errno = error;
}
// The process dies before its `at`-th operation from now on. 0: never.
void durable_die_at(long at) {
  count = 0;
  die_at = at > 0 ? at : -1;
}
long durable_count(void) { return count; }
void durable_mark(const char* text) {
  pthread_mutex_lock(&mutex);
  note((struct record){.what = MARK}, text, "", NULL);
  pthread_mutex_unlock(&mutex);
}

static ssize_t noted_write(int fd, const char* path, ssize_t done, uint64_t start, const struct iovec* parts, int num) {
  if (done <= 0) return done;
  char* bytes = malloc((size_t)done);
  size_t at = 0;
  for (int i = 0; i < num && at < (size_t)done; ++i) {
    const size_t left = (size_t)done - at, part = parts[i].iov_len < left ? parts[i].iov_len : left;
    memcpy(bytes + at, parts[i].iov_base, part);
    at += part;
  }
  const int flags = fcntl(fd, F_GETFL);
  note((struct record){.what = WRITE,
                       .is_synced = (flags & O_DSYNC) != 0,
                       .inode = inode_of(fd),
                       .byte_start = start,
                       .num_bytes = (uint64_t)done},
       path, "", bytes);
  free(bytes);
  return done;
}

#define WRITING(fd, call, start, parts, num)       \
  do {                                             \
    char path[PATH_MAX];                           \
    if (!path_of(fd, path)) return call;           \
    ssize_t done = -1;                             \
    if (!begin()) {                                \
      const uint64_t at = (uint64_t)(start);       \
      done = call;                                 \
      noted_write(fd, path, done, at, parts, num); \
    }                                              \
    end();                                         \
    return done;                                   \
  } while (0)

ssize_t write(int fd, const void* data, size_t size) {
  const struct iovec part = {(void*)data, size};
  WRITING(fd, REAL(write)(fd, data, size), lseek(fd, 0, SEEK_CUR), &part, 1);
}
ssize_t writev(int fd, const struct iovec* parts, int num) {
  WRITING(fd, REAL(writev)(fd, parts, num), lseek(fd, 0, SEEK_CUR), parts, num);
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t start) {
  const struct iovec part = {(void*)data, size};
  WRITING(fd, REAL(pwrite)(fd, data, size, start), start, &part, 1);
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t start) {
  const struct iovec part = {(void*)data, size};
  WRITING(fd, REAL(pwrite64)(fd, data, size, start), start, &part, 1);
}
ssize_t pwritev(int fd, const struct iovec* parts, int num, off_t start) {
  WRITING(fd, REAL(pwritev)(fd, parts, num, start), start, parts, num);
}
ssize_t pwritev64(int fd, const struct iovec* parts, int num, off64_t start) {
  WRITING(fd, REAL(pwritev64)(fd, parts, num, start), start, parts, num);
}

static int synced(int fd, int (*real)(int)) {
  char path[PATH_MAX];
  if (!path_of(fd, path)) return real(fd);
  struct stat found;
  int result = -1;
  if (!begin() && fstat(fd, &found) == 0) {
    result = real(fd);
    if (result == 0)
      note((struct record){.what = S_ISDIR(found.st_mode) ? SYNC_FOLDER : SYNC, .inode = found.st_ino}, path, "", NULL);
  }
  end();
  return result;
}
int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

static int truncated(int fd, off64_t size) {
  char path[PATH_MAX];
  if (!path_of(fd, path)) return REAL(ftruncate64)(fd, size);
  int result = -1;
  if (!begin()) {
    result = REAL(ftruncate64)(fd, size);
    if (result == 0)
      note((struct record){.what = TRUNCATE, .inode = inode_of(fd), .byte_start = (uint64_t)size}, path, "", NULL);
  }
  end();
  return result;
}
int ftruncate(int fd, off_t size) { return truncated(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncated(fd, size); }

static int opened(int folder, const char* file, int flags, mode_t mode, int (*real)(int, const char*, int, ...)) {
  struct stat found;
  if (!(flags & O_CREAT) || !is_ours(file) || stat(file, &found) == 0) return real(folder, file, flags, mode);
  int fd = -1;
  if (!begin()) {
    fd = real(folder, file, flags, mode);
    if (fd >= 0) note((struct record){.what = CREATE, .inode = inode_of(fd)}, file, "", NULL);
  }
  end();
  return fd;
}

#define MODE(flags)              \
  mode_t mode = 0;               \
  if ((flags) & O_CREAT) {       \
    va_list rest;                \
    va_start(rest, flags);       \
    mode = va_arg(rest, mode_t); \
    va_end(rest);                \
  }

int open(const char* file, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, file, flags, mode, REAL(openat));
}
int open64(const char* file, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, file, flags, mode, REAL(openat64));
}
int openat(int folder, const char* file, int flags, ...) {
  MODE(flags)
  return opened(folder, file, flags, mode, REAL(openat));
}
int openat64(int folder, const char* file, int flags, ...) {
  MODE(flags)
  return opened(folder, file, flags, mode, REAL(openat64));
}

int rename(const char* from, const char* to) {
  if (!is_ours(from)) return REAL(rename)(from, to);
  int result = -1;
  if (!begin()) {
    result = REAL(rename)(from, to);
    if (result == 0) note((struct record){.what = RENAME}, from, to, NULL);
  }
  end();
  return result;
}
int unlink(const char* file) {
  if (!is_ours(file)) return REAL(unlink)(file);
  int result = -1;
  if (!begin()) {
    result = REAL(unlink)(file);
    if (result == 0) note((struct record){.what = UNLINK}, file, "", NULL);
  }
  end();
  return result;
}

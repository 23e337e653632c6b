// What the C++ tests share: checks that are counted, memory to map, and work that is killed after any of its
// instructions.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

inline int failures = 0;

#define CHECK(holds)                                                        \
  do {                                                                      \
    if (!(holds)) {                                                         \
      std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #holds); \
      ++failures;                                                           \
    }                                                                       \
  } while (0)

inline uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return state >> 33;
}

struct Block {
  explicit Block(size_t num_bytes, int flags = MAP_PRIVATE) : num_bytes(num_bytes) {
    data = static_cast<uint8_t*>(mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0));
    if (data == MAP_FAILED) std::abort();
  }
  ~Block() { munmap(data, num_bytes); }
  uint8_t* data;
  size_t num_bytes;
};

constexpr int kNotAllowed = 77;  // exit status

// Returns a child that is stopped before the first instruction of `work`, and will stop itself after the last.
template <typename Work>
pid_t start_stopped(const Work& work) {
  const pid_t child = fork();
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    work();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return child;
}

// Runs `work` in a child, stops it after `steps` instructions and kills it there. Returns false where the child ended
// before.
template <typename Work>
bool run_and_kill(const Work& work, long steps) {
  const pid_t child = start_stopped(work);
  int status = 0;
  bool ended = false;
  for (long step = 0; step < steps && !ended; ++step) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) std::exit(kNotAllowed);
    waitpid(child, &status, 0);
    ended = !WIFSTOPPED(status) || WSTOPSIG(status) == SIGSTOP;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return !ended;
}

// Runs `work` in a child and stops it before its first instruction and after each for `look`: shared memory is then
// what it would be, had the child been killed there. As sure as `run_and_kill` after 0, 1, 2 .. steps, without running
// all of them again for the next. Returns how many instructions there were.
template <typename Work, typename Look>
long look_after_each_instruction(const Work& work, const Look& look) {
  const pid_t child = start_stopped(work);
  int status = 0;
  long steps = 0;
  for (bool ended = false; !ended; ++steps) {
    look();
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) std::exit(kNotAllowed);
    waitpid(child, &status, 0);
    ended = !WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP;
  }
  look();
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return steps;
}

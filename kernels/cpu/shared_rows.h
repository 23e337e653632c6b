// Rows that several threads of this process turn into something else, each a range of them: what decoders use.
//
// An engine has a crew of its own, which ends with it. Decoders belong to no engine: theirs is one of the process. Its
// threads start with the first work that is large enough and sleep in between; they end with the process. A forked
// child has none of them, and makes its own. Two callers at once: the second works alone.
#pragma once

#include <cstddef>
#include <functional>

namespace tierstore {

constexpr size_t kShareThreadsMax = 64;  // of the process's crew, the caller's included
constexpr size_t kSharedRangesMin = 4;   // fewer ranges are the caller's alone

// Calls work(start, end) for half-open ranges of rows_each rows or a few more, which together are all rows, each once,
// on at most num_threads threads, the caller's included; returns when all have ended. A thread that sleeps takes some
// 30 us until it is at work: a range should take 10 us or more. The caller needs no interpreter's lock, and should let
// go of it. Work must not call this again. Rethrows the first exception.
void share_rows(size_t num_rows, size_t rows_each, size_t num_threads,
                const std::function<void(size_t start, size_t end)>& work);

}  // namespace tierstore

// Sums of the gradients of each distinct row, in a fixed order, and the step that applies them.
//
// The sum of a row: in each group, from 0 on, its gradients as the batch has them; then the groups' sums, from 0 on, in
// the order of their numbers; all in float32. With one group that is what torch's dense backward gives, in bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "distinct_rows.h"
#include "optimizer.h"

namespace tierstore {

constexpr size_t kAllFinite = SIZE_MAX;

struct Gradients {
  const float* values;  // [num_references, dim]
  size_t stride;        // floats from one reference's to the next one's; at least dim
  size_t dim;
  float scale = 1;  // of each sum
};

// Writes the sums of distinct rows start to end, times the scale, into out [end - start, dim]. Returns the first row
// whose sum is not finite, all sums are written all the same; kAllFinite if there is none.
size_t sum_gradients(const DistinctRows& rows, const Gradients& gradients, size_t start, size_t end, float* out,
                     bool plain = false);

// One step: sums, checks that ALL are finite, then updates. Sums of rows that have several references, and that fit
// into `scratch`, are made once; those that do not fit are made twice. Rows with one reference need no scratch.
// records: [rows.count()], where each distinct row's record begins; nobody else touches them meanwhile.
// scratch: scratch_floats, of which each thread uses a part; at least scratch_floats_min(dim, num_threads).
// Returns kAllFinite, or the first distinct row whose sum is not finite: no record is changed then.
// The same bits with any number of threads and any scratch. Does not throw once all sums are checked, unless a thread
// cannot be started, which costs only time.
size_t apply_gradients(const Optimizer& optimizer, const Steps& steps, const DistinctRows& rows,
                       const Gradients& gradients, float* const* records, float* scratch, size_t scratch_floats,
                       size_t num_threads, bool plain = false);

size_t scratch_floats_min(size_t dim, size_t num_threads);

}  // namespace tierstore

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
// whose sum is not finite, or kAllFinite; all sums are written either way.
size_t sum_gradients(const DistinctRows& rows, const Gradients& gradients, size_t start, size_t end, float* out,
                     bool plain = false);

// One step: sums, checks that ALL are finite, then updates. Sums of rows that have several references and fit into
// `scratch` are made once; if they do not fit, all are made twice. Rows with one reference need no scratch.
// records: [rows.count()], where each distinct row's record begins; nobody else touches them meanwhile.
// scratch: [scratch_floats], at least `dim`; rows.repeated_before()[rows.count()] * dim is as much as it can use.
// Returns kAllFinite, or the first distinct row whose sum is not finite: no record is changed then.
// The same bits with any number of threads and any scratch. Throws std::bad_alloc before it changes any record.
size_t apply_gradients(const Optimizer& optimizer, const Steps& steps, const DistinctRows& rows,
                       const Gradients& gradients, float* const* records, float* scratch, size_t scratch_floats,
                       size_t num_threads, bool plain = false);

}  // namespace tierstore

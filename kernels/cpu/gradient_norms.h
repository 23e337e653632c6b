// L2 norms of a table's gradient, block by block: what clipping by the global norm needs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

// Writes the norm of each block's rows into out [num_blocks]. NaN and infinity go through.
//
// rows: [num_rows], distinct, in any order, at least block_starts[0]. sums: [num_rows, dim]. block_starts:
// [num_blocks], ascending, the first row of each block; at least one.
//
// In float64: the squares of a row in 16 parts, then the rows of a block in the order of their ids. So the bits depend
// neither on the order of a batch nor on the processor. Throws std::bad_alloc: it takes 16 bytes a row.
void gradient_norms(const int64_t* rows, const float* sums, size_t num_rows, size_t dim, const int64_t* block_starts,
                    size_t num_blocks, double* out);

// Writes the sum of squares of each row into out [num_rows], in the order of row ids: what a block's norm is made of,
// for blocks whose rows lie on several ranks. Throws as gradient_norms.
void gradient_squares(const int64_t* rows, const float* sums, size_t num_rows, size_t dim, double* out);

}  // namespace tierstore

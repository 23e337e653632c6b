// Lookups as Python asks for them: arrays checked, and kept from being lost or overwritten while they are read.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "job.h"
#include "table.h"

namespace tierstore {

// What one lookup asks of one table. It may be moved once it is filled, and not copied: `list` may point into it.
struct TableRequest {
  size_t index = 0;  // of the table
  PairList list{nullptr, 0};
  Output out{nullptr};
  size_t out_bytes = 0;
  pybind11::object out_object, sources_object;  // what `out` lies in; sources_object is null without sources
  bool by_row_id = false;                       // list.keys are row ids, and rows_out says where their rows go
  bool of_tokens = false;                       // the row ids are those of tokens
  RowsOut rows_out;
  std::vector<int64_t> own_keys;
  std::vector<int32_t> own_pairs;

  // Where the job of this request puts rows.
  RowsOut target() const { return by_row_id ? rows_out : RowsOut(out.rows); }

  // Copies keys and pairs that lie where output goes.
  void keep_keys_from(const void* output, size_t num_bytes);

  // Each of these fills a request that was just made, or returns false: the arrays are not exactly as the lookup path
  // takes them. Every array must be contiguous, aligned, in the machine's byte order and of the stated type, and what
  // is written to must be writable.

  // keys, int64 [N, O]; out, uint8 [N, O * H, row_bytes]; sources, uint8 [N, O], or a null handle.
  bool fill_lookup(const std::vector<Table>& tables, size_t table, pybind11::handle keys, pybind11::handle rows,
                   pybind11::handle sources);
  // keys, int64 [M]; pairs, int32 [M]; entries, uint8 [M, entry_bytes].
  bool fill_pairs(const std::vector<Table>& tables, size_t table, pybind11::handle keys, pybind11::handle pairs,
                  pybind11::handle entries);
  // row_ids, int64 [R] or [N, K]; rows, uint8 of the same shape and [row_bytes], strides of any kind. Ids of a plain
  // table, and of shape [N, O * H], are those of tokens.
  bool fill_rows(const std::vector<Table>& tables, size_t table, pybind11::handle row_ids, pybind11::handle rows,
                 const RowRange& wanted);
  // keys, int64 [N, O]; sources, uint8, N * O in all, which are the request's `out`.
  bool fill_locate(const std::vector<Table>& tables, size_t table, pybind11::handle keys, pybind11::handle sources);

 private:
  void take(size_t table, pybind11::handle keys, pybind11::handle output);
};

}  // namespace tierstore

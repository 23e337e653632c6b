// Lookups as Python asks for them: arrays checked, and kept from being lost or overwritten while they are read.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "job.h"
#include "table.h"

namespace tierstore {

// What one lookup asks of one table.
struct TableRequest {
  size_t index;  // of the table
  PairList list;
  Output out;
  size_t out_bytes;
  pybind11::object out_object, sources_object;  // what `out` lies in; sources_object is null without sources
  bool by_row_id = false;                       // list.keys are row ids
  bool of_tokens = false;                       // the row ids are those of whole tokens
  std::vector<int64_t> own_keys;
  std::vector<int32_t> own_pairs;

  // Copies keys and pairs that lie where output goes.
  void keep_keys_from(const void* output, size_t num_bytes);
};

// Each returns nothing if the arrays are not exactly as the lookup path takes them. Every array must be contiguous,
// aligned, in the machine's byte order and of the stated type, and what is written to must be writable.

// keys, int64 [N, O]; out, uint8 [N, O * H, row_bytes]; sources, uint8 [N, O], or None.
std::optional<TableRequest> lookup_request(const std::vector<Table>& tables, size_t index, pybind11::handle keys,
                                           pybind11::handle out, pybind11::handle sources);

// keys, int64 [M]; pairs, int32 [M]; out, uint8 [M, entry_bytes].
std::optional<TableRequest> pairs_request(const std::vector<Table>& tables, size_t index, pybind11::handle keys,
                                          pybind11::handle pairs, pybind11::handle out);

// row_ids, int64, R in all; out, uint8, R * row_bytes in all. Ids of shape [N, O * H] are those of whole tokens.
std::optional<TableRequest> rows_request(const std::vector<Table>& tables, size_t index, pybind11::handle row_ids,
                                         pybind11::handle out);

// keys, int64 [N, O]; sources, uint8, N * O in all, which the request has in place of out.
std::optional<TableRequest> locate_request(const std::vector<Table>& tables, size_t index, pybind11::handle keys,
                                           pybind11::handle sources);

}  // namespace tierstore

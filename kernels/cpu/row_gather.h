// Rows by their ids: those of whole tokens by their keys, through the caches, others one by one.
//
// A token is whole if every order's row ids are those of one key. Of an order whose ids are all outside the wanted
// range, nothing is looked up. Each id of the caller's is loaded once, and checked as it was loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine.h"
#include "rows_out.h"

namespace tierstore {

class RowGather {
 public:
  // of_tokens: ids come as [N, O * H].
  RowGather(Engine& engine, size_t table, const RowsOut& out, bool of_tokens);

  // How many rows one call of `gather` takes at most: those of whole tokens, if they are of tokens.
  size_t rows_max() const;

  // Copies what memory holds of `count` rows; the first of them is row `first` of the request. The engine's crew shares
  // many. Appends the rest to the misses, keys and single rows. Returns false, with the output undefined, if a wanted
  // id is not one of the table's.
  bool gather(const EpochView& view, const int64_t* row_ids, size_t first, size_t count, Gathered& gathered);

 private:
  size_t whole_tokens(size_t num_rows) const;
  bool gather_part(const EpochView& view, const int64_t* row_ids, size_t first, size_t count, Gathered& gathered);
  bool split_in_runs(const EpochView& view, const int64_t* row_ids, size_t count, Gathered& gathered);
  bool find_keys(size_t row);
  bool end_run(const EpochView& view, Gathered& gathered);

  Engine& engine_;
  const size_t index_;
  const Table& table_;
  const RowsOut out_;
  const bool of_tokens_, by_key_;
  const size_t unit_;       // rows of a token; 1 if they are not of tokens
  size_t rows_each_;        // how many are gathered at a time
  size_t whole_bytes_ = 0;  // of the output that they are a part of; 0: they go through the scratch
  // Of one part. Rows are numbered from its first one.
  size_t first_ = 0;
  uint8_t* to_ = nullptr;             // where its rows go: the output, or the scratch
  size_t run_start_ = 0;              // the row with which keys_, or ids_, begin; one of the two is empty
  std::vector<int64_t> keys_, ids_;   // of whole tokens, [n, O]; of rows that are read one by one
  std::vector<size_t> unwanted_;      // rows of keys_ that are outside the wanted range
  std::vector<int64_t> token_, key_;  // ids and keys of one token
  std::vector<size_t> unwanted_of_token_;
  std::vector<uint8_t> scratch_;  // rows on their way to an output that is not contiguous
};

}  // namespace tierstore

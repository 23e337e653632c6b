#include <string>

#include "arrays.h"
#include "block_codecs.h"
#include "modules.h"
#include "shared_rows.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kValuesOfPart = 1 << 16;  // of a range of rows: some 15 us

void decode(const Input<uint8_t>& rows, py::ssize_t dim, const std::string& values, const std::string& scale,
            py::ssize_t block, float factor, bool divides, py::array& out, size_t threads, bool plain) {
  const auto kind = values_named(values);
  const auto scales = scale_named(scale);
  require(kind && scales, "values and scale must be types that decode_block_rows names");
  require(dim > 0 && block > 0, "dim and block must be positive");
  const BlockCodec codec{*kind, *scales, static_cast<size_t>(block), factor, divides};
  const size_t needed = block_row_bytes(codec, static_cast<size_t>(dim));
  require(needed != 0, "dim must be whole blocks of whole bytes, of a kind that has these scales");
  require(rows.ndim() == 2 && static_cast<size_t>(rows.shape(1)) >= needed,
          "rows must be [rows, row_bytes], of at least the bytes that dim values and their scales take");
  require(has_shape(out, {rows.shape(0), dim}), "out must be [rows, dim]");
  const uint8_t* bytes = rows.data();
  const auto num_rows = static_cast<size_t>(rows.shape(0)), row_bytes = static_cast<size_t>(rows.shape(1));
  uint16_t* to = output_of<uint16_t>(out, "out must be contiguous uint16");
  const auto num_values = static_cast<size_t>(dim);
  const py::gil_scoped_release released;
  share_rows(num_rows, kValuesOfPart / num_values + 1, threads, [&](size_t start, size_t end) {
    decode_block_rows(codec, bytes + start * row_bytes, end - start, row_bytes, num_values, plain,
                      to + start * num_values);
  });
}

}  // namespace

void bind_block_codecs(py::module_& module) {
  module.def("decode_block_rows", &decode, py::arg("rows"), py::arg("dim"), py::arg("values"), py::arg("scale"),
             py::arg("block"), py::arg("factor"), py::arg("divides"), py::arg("out"), py::arg("threads") = 1,
             py::arg("plain") = false);
}

}  // namespace tierstore

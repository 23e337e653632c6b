#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <vector>

#include "arrays.h"
#include "modules.h"
#include "philox.h"
#include "quantize.h"
#include "shared_rows.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kQuantizedEach = 1 << 14;  // values of a range of rows: some 10 us
constexpr size_t kDrawnEach = 1 << 12;

RowCodec codec_named(const std::string& name, float factor) {
  using Kind = RowCodec::Kind;
  if (name == "fp32") return {Kind::kFp32, 1};
  if (name == "fp16") return {Kind::kFp16, 1};
  if (name == "bf16") return {Kind::kBf16, 1};
  if (name == "fp8_e4m3_e8m0x32") return {Kind::kFp8E8m0, 1};
  require(name == "fp8_e4m3", "codec must be fp32, fp16, bf16, fp8_e4m3 or fp8_e4m3_e8m0x32");
  require(factor != 0, "an fp8 table with a factor of 0 holds no values");
  return {Kind::kFp8, factor};
}

template <typename T>
std::vector<T*> each_row(T* first, size_t count, size_t stride) {
  std::vector<T*> rows(count);
  for (size_t i = 0; i < count; ++i) rows[i] = first + i * stride;
  return rows;
}

py::tuple quantize_array(const Input<float>& values, const std::string& name, float factor,
                         const std::optional<Input<uint8_t>>& old, py::array& out, size_t threads, bool plain) {
  const RowCodec codec = codec_named(name, factor);
  require(values.ndim() == 2, "values must be [rows, dim]");
  const auto count = static_cast<size_t>(values.shape(0)), dim = static_cast<size_t>(values.shape(1));
  const size_t row_bytes = codec_row_bytes(codec, dim);
  const auto width = static_cast<py::ssize_t>(row_bytes);
  require(row_bytes > 0, "dim must be positive, and with scales a multiple of 32");
  require(has_shape(out, {values.shape(0), width}), "out must be [rows, row_bytes] of the codec");
  require(!old || has_shape(*old, {values.shape(0), width}), "old must be [rows, row_bytes] of the codec");
  uint8_t* to = output_of<uint8_t>(out, "out must be contiguous uint8");
  const auto rows = each_row(values.data(), count, dim);
  const auto before = old ? each_row(old->data(), count, row_bytes) : std::vector<const uint8_t*>();
  std::atomic<size_t> saturated{0}, not_numbers{0};
  {
    const py::gil_scoped_release released;
    share_rows(count, kQuantizedEach / dim + 1, threads, [&](size_t start, size_t end) {
      const QuantizeCounts counts = quantize_rows(codec, dim, end - start, rows.data() + start,
                                                  old ? before.data() + start : nullptr, to + start * row_bytes, plain);
      saturated += counts.saturated;
      not_numbers += counts.not_numbers;
    });
  }
  return py::make_tuple(saturated.load(), not_numbers.load());
}

void dequantize_array(const Input<uint8_t>& rows, py::ssize_t dim, const std::string& name, float factor,
                      py::array& out, size_t threads, bool plain) {
  const RowCodec codec = codec_named(name, factor);
  require(rows.ndim() == 2 && dim > 0, "rows must be [rows, row_bytes], and dim positive");
  const auto count = static_cast<size_t>(rows.shape(0)), values = static_cast<size_t>(dim);
  const size_t row_bytes = codec_row_bytes(codec, values), stride = static_cast<size_t>(rows.shape(1));
  require(row_bytes > 0 && stride >= row_bytes, "a row must hold dim values and their scales, a multiple of 32");
  require(has_shape(out, {rows.shape(0), dim}), "out must be [rows, dim]");
  const auto to = each_row(output_of<float>(out, "out must be contiguous float32"), count, values);
  const auto from = each_row(rows.data(), count, stride);
  const py::gil_scoped_release released;
  share_rows(count, kQuantizedEach / values + 1, threads, [&](size_t start, size_t end) {
    dequantize_rows(codec, values, end - start, from.data() + start, to.data() + start, plain);
  });
}

UInt32Array philox_words(const Input<uint32_t>& counters, const Input<uint32_t>& key) {
  require(counters.ndim() == 2 && counters.shape(1) == 4 && has_shape(key, {2}), "counters must be [n, 4], key [2]");
  UInt32Array out({counters.shape(0), py::ssize_t{4}});
  for (py::ssize_t i = 0; i < counters.shape(0); ++i) {
    philox4x32_10(counters.data() + 4 * i, key.data(), out.mutable_data() + 4 * i);
  }
  return out;
}

void draw_rows(const Input<int64_t>& row_ids, const std::string& kind, double first, double second, uint64_t seed,
               uint32_t table, py::array& out, size_t threads, bool plain) {
  require(kind == "uniform" || kind == "normal", "kind must be uniform or normal");
  require(row_ids.ndim() == 1 && out.ndim() == 2 && out.shape(0) == row_ids.shape(0) && out.shape(1) > 0,
          "row_ids must be [rows], out [rows, dim]");
  Initializer initializer;
  initializer.kind = kind == "uniform" ? Initializer::Kind::kUniform : Initializer::Kind::kNormal;
  initializer.low = initializer.mean = first;
  initializer.high = initializer.deviation = second;
  initializer.seed = seed;
  initializer.table = table;
  const auto count = static_cast<size_t>(row_ids.shape(0)), dim = static_cast<size_t>(out.shape(1));
  const auto to = each_row(output_of<float>(out, "out must be contiguous float32"), count, dim);
  const int64_t* ids = row_ids.data();
  const py::gil_scoped_release released;
  share_rows(count, kDrawnEach / dim + 1, threads, [&](size_t start, size_t end) {
    initial_rows(initializer, dim, end - start, ids + start, to.data() + start, plain);
  });
}

}  // namespace

void bind_quantize(py::module_& module) {
  module.def("quantize_rows", &quantize_array, py::arg("values"), py::arg("codec"), py::arg("factor"), py::arg("old"),
             py::arg("out"), py::arg("threads") = 1, py::arg("plain") = false);
  module.def("dequantize_rows", &dequantize_array, py::arg("rows"), py::arg("dim"), py::arg("codec"), py::arg("factor"),
             py::arg("out"), py::arg("threads") = 1, py::arg("plain") = false);
  module.def("philox4x32", &philox_words, py::arg("counters"), py::arg("key"));
  module.def("initial_rows", &draw_rows, py::arg("row_ids"), py::arg("kind"), py::arg("first"), py::arg("second"),
             py::arg("seed"), py::arg("table"), py::arg("out"), py::arg("threads") = 1, py::arg("plain") = false);
}

}  // namespace tierstore

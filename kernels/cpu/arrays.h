// NumPy arrays on their way into kernels: as the kernel needs them, or refused.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>

namespace tierstore {

using ByteArray = pybind11::array_t<uint8_t, pybind11::array::c_style>;
using Int64Array = pybind11::array_t<int64_t, pybind11::array::c_style>;
using UInt32Array = pybind11::array_t<uint32_t, pybind11::array::c_style>;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// An array that a kernel reads: the caller's own where it is contiguous, aligned and of type T, else a copy that is; a
// type that T does not hold is a TypeError. py::array_t as an argument does the same, but first makes an empty array
// and then goes through the call that copies either way: with it, the keys of one token took 1.9 us instead of 0.4.
template <typename T>
class Input : public pybind11::array {
 public:
  using Copy = pybind11::array_t<T, pybind11::array::c_style | pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_>;
  using pybind11::array::array;
  // None: pybind11's own default allocates an array.
  Input() : pybind11::array(pybind11::handle(), stolen_t{}) {}

  static bool is_raw(pybind11::handle given) {
    return Copy::check_(given) &&
           pybind11::detail::check_flags(given.ptr(), pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_);
  }
  const T* data() const { return static_cast<const T*>(pybind11::array::data()); }
};

// The data of an array that is written: never a copy, so it must be as the kernel needs it.
template <typename T>
T* output_of(pybind11::array& array, const char* what) {
  require(Input<T>::is_raw(array), what);
  return static_cast<T*>(array.mutable_data());
}

inline bool has_shape(const pybind11::array& array, std::initializer_list<pybind11::ssize_t> shape) {
  return array.ndim() == static_cast<pybind11::ssize_t>(shape.size()) &&
         std::equal(shape.begin(), shape.end(), array.shape());
}

}  // namespace tierstore

template <typename T>
struct pybind11::detail::pyobject_caster<tierstore::Input<T>> {
  using type = tierstore::Input<T>;
  PYBIND11_TYPE_CASTER(type, handle_type_name<typename type::Copy>::name);
  bool load(handle given, bool) {
    if (type::is_raw(given)) {
      value = reinterpret_borrow<type>(given);
    } else {
      value = reinterpret_steal<type>(type::Copy::ensure(given).release());
    }
    return static_cast<bool>(value);
  }
};

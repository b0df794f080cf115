// Reads torch tensors without linking libtorch: through the C exchange table of DLPack 1.2 that torch.Tensor carries
// (torch >= 2.10), else through the tensor's Python methods. So one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fusedrnn {

// A borrowed look at a tensor's memory, valid while the tensor lives.
struct TensorView {
  static constexpr int max_dims = 3;
  void* data = nullptr;
  int dims = 0;
  int64_t shape[max_dims] = {}, stride[max_dims] = {};
  char kind = 0;  // 'f' float (of 16 bits bfloat16), 'i' signed integer, 'b' Boolean, '?' anything else
  int bits = 0;

  explicit operator bool() const { return dims > 0; }
  bool is_float(int width) const { return kind == 'f' && bits == width; }
  bool contiguous() const {
    bool right = true;
    int64_t expected = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (shape[d] == 0) return true;  // whatever the strides, as torch sees it
      if (shape[d] != 1 && stride[d] != expected) right = false;
      expected *= shape[d];
    }
    return right;
  }
};

// Throws std::invalid_argument for tensors that are not on the CPU, have no or more than three dimensions, or whose
// memory does not hold their values. None gives an empty view.
TensorView view(pybind11::handle tensor);

// Whether the object is a torch.Tensor or a Parameter and not of another subclass, or None.
bool is_plain(pybind11::handle object);

// A new contiguous torch.Tensor on the CPU, its values not set, and the view of it.
struct NewTensor {
  pybind11::object object;
  TensorView view;
};
NewTensor new_tensor(std::initializer_list<int64_t> shape, int bits);

}  // namespace fusedrnn

#include "tensor_view.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "memory.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

// The part of the DLPack 1.2 application binary interface that is used here.
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};
struct Exchange {
  ExchangeHeader header;
  void* allocate;
  void* managed_tensor_from_py_object;
  int (*to_py_object)(ManagedTensor* managed, void** out);  // takes over the managed tensor
  int (*tensor_from_py_object)(void* object, Tensor* out);  // fills a borrowed view, no synchronisation
  void* current_work_stream;
};
constexpr int32_t cpu = 1;
constexpr uint8_t code_int = 0, code_float = 2, code_bfloat = 4, code_bool = 6;

// As TensorView names them.
char kind(DataType type) {
  switch (type.code) {
    case code_float:
      return type.bits == 16 ? '?' : 'f';
    case code_bfloat:
      return 'f';
    case code_int:
      return 'i';
    case code_bool:
      return 'b';
    default:
      return '?';
  }
}

}  // namespace dlpack

const dlpack::Exchange* find_exchange() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  const bool usable = exchange->header.version.major == 1 && exchange->tensor_from_py_object && exchange->to_py_object;
  return usable ? exchange : nullptr;
}

void check_dims(int64_t dims) {
  if (dims == 0 || dims > TensorView::max_dims)
    throw std::invalid_argument("a tensor has " + std::to_string(dims) + " dimensions, 1 to 3 are expected");
}

// Torch negates some tensors by a mark beside their memory, which then holds the opposite of the values: parts of
// complex conjugates. No exchange protocol tells.
bool is_negated(py::handle tensor) {
  static const py::object is_neg = py::module_::import("torch").attr("Tensor").attr("is_neg");
  PyObject* const arguments[] = {tensor.ptr()};
  const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg.ptr(), arguments, 1, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Whether the storage has memory. Some refuse to say where, and have none.
bool has_memory(py::handle tensor) {
  try {
    return tensor.attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() != 0;
  } catch (const py::error_already_set&) {
    return false;
  }
}

// Torch adds the offset of a view to null too. Below 2^40 hardly any system puts memory, and no offset goes beyond.
void check_memory(const TensorView& v, py::handle tensor) {
  int64_t count = 1;
  for (int d = 0; d < v.dims; ++d) count *= v.shape[d];
  if (count != 0 && reinterpret_cast<uintptr_t>(v.data) < uintptr_t{1} << 40 && !has_memory(tensor))
    throw std::invalid_argument("a tensor has no memory: its storage has been freed");
}

TensorView through_exchange(const dlpack::Exchange& exchange, py::handle object) {
  dlpack::Tensor tensor;
  if (exchange.tensor_from_py_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    throw std::invalid_argument("a tensor has no memory that can be read: it is sparse, fake or on the meta device");
  }
  if (tensor.device.type != dlpack::cpu) throw std::invalid_argument("a tensor is not on the CPU");
  check_dims(tensor.ndim);
  TensorView result;
  result.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  result.dims = tensor.ndim;
  for (int d = 0; d < tensor.ndim; ++d) result.shape[d] = tensor.shape[d], result.stride[d] = tensor.strides[d];
  result.kind = dlpack::kind(tensor.dtype);
  result.bits = tensor.dtype.bits;
  return result;
}

TensorView through_methods(py::handle tensor) {
  static const py::object torch = py::module_::import("torch");
  static const py::object bfloat16 = torch.attr("bfloat16"), float32 = torch.attr("float32"),
                          float64 = torch.attr("float64"), int64 = torch.attr("int64"), boolean = torch.attr("bool");
  if (!tensor.attr("is_cpu").cast<bool>()) throw std::invalid_argument("a tensor is not on the CPU");
  TensorView result;
  const py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  check_dims(static_cast<int64_t>(shape.size()));
  result.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  result.dims = static_cast<int>(shape.size());
  for (int d = 0; d < result.dims; ++d)
    result.shape[d] = shape[d].cast<int64_t>(), result.stride[d] = stride[d].cast<int64_t>();
  const py::object dtype = tensor.attr("dtype");
  const bool is_float = dtype.is(bfloat16) || dtype.is(float32) || dtype.is(float64);
  result.kind = is_float ? 'f' : dtype.is(int64) ? 'i' : dtype.is(boolean) ? 'b' : '?';
  result.bits = dtype.is(bfloat16) ? 16 : dtype.is(float32) ? 32 : dtype.is(boolean) ? 8 : 64;
  return result;
}

// Null where torch is too old to have one.
const dlpack::Exchange* exchange() {
  static const dlpack::Exchange* const found = find_exchange();
  return found;
}

// A tensor that torch has taken over, at the beginning of its own memory; its values follow, where a line of the cache
// begins.
struct Owned {
  dlpack::ManagedTensor managed;
  int64_t shape[TensorView::max_dims], stride[TensorView::max_dims];
  Memory memory;
};
constexpr uintptr_t line = 64;
constexpr int64_t header = sizeof(Owned) + line;

// Memory that begins anywhere is had, and given back, in a third of the time if there is little of it.
Memory allocate_anywhere(size_t bytes) {
  constexpr size_t little = 1024;
  if (bytes > little) return allocate(bytes);
  void* const memory = std::malloc(bytes);
  if (!memory) throw std::bad_alloc();
  return {static_cast<char*>(memory), bytes};
}

// The exchange table has a function that allocates, too, but with it a small tensor takes 0.26 us longer, and memory is
// always fresh.
NewTensor through_exchange(const dlpack::Exchange& table, std::initializer_list<int64_t> shape, int bits) {
  NewTensor result;
  TensorView& v = result.view;
  v.dims = static_cast<int>(shape.size());
  v.kind = 'f';
  v.bits = bits;
  std::copy(shape.begin(), shape.end(), v.shape);
  int64_t count = 1, bytes = 0;
  bool too_many = false;
  for (int d = v.dims - 1; d >= 0; --d) {
    v.stride[d] = count;
    too_many |= v.shape[d] < 0 || __builtin_mul_overflow(count, v.shape[d], &count);
  }
  too_many |= __builtin_mul_overflow(count, bits / 8, &bytes);
  if (too_many || __builtin_add_overflow(bytes, header, &bytes)) throw std::bad_alloc();
  const Memory memory = allocate_anywhere(static_cast<size_t>(bytes));
  v.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data) + sizeof(Owned) + line - 1) / line * line);
  auto* owned = new (memory.data) Owned{};
  owned->memory = memory;
  std::copy_n(v.shape, v.dims, owned->shape);
  std::copy_n(v.stride, v.dims, owned->stride);
  dlpack::ManagedTensor& managed = owned->managed;
  managed.version = table.header.version;
  managed.manager_context = owned;
  managed.deleter = [](dlpack::ManagedTensor* tensor) {
    release(static_cast<Owned*>(tensor->manager_context)->memory);
  };
  const dlpack::DataType dtype{bits == 16 ? dlpack::code_bfloat : dlpack::code_float, static_cast<uint8_t>(bits), 1};
  managed.tensor = {v.data, {dlpack::cpu, 0}, v.dims, dtype, owned->shape, owned->stride, 0};
  void* object = nullptr;
  if (table.to_py_object(&managed, &object) != 0) throw py::error_already_set();
  result.object = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  return result;
}

py::object torch_empty(std::initializer_list<int64_t> shape, int bits) {
  static const py::object torch = py::module_::import("torch");
  py::list sizes;
  for (const int64_t size : shape) sizes.append(size);
  const char* dtype = bits == 16 ? "bfloat16" : bits == 32 ? "float32" : "float64";
  return torch.attr("empty")(sizes, py::arg("dtype") = torch.attr(dtype), py::arg("device") = "cpu");
}

}  // namespace

TensorView view(py::handle tensor) {
  if (tensor.is_none()) return {};
  const TensorView result = exchange() ? through_exchange(*exchange(), tensor) : through_methods(tensor);
  check_memory(result, tensor);
  if (is_negated(tensor)) throw std::invalid_argument("a tensor's memory holds its values negated");
  return result;
}

bool is_plain(py::handle object) {
  static const py::object tensor = py::module_::import("torch").attr("Tensor");
  static const py::object parameter = py::module_::import("torch").attr("nn").attr("Parameter");
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return object.is_none() || type == tensor.ptr() || type == parameter.ptr();
}

NewTensor new_tensor(std::initializer_list<int64_t> shape, int bits) {
  if (exchange()) return through_exchange(*exchange(), shape, bits);
  NewTensor result;
  result.object = torch_empty(shape, bits);
  result.view = view(result.object);
  return result;
}

}  // namespace fusedrnn

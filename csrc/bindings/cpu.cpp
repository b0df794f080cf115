// Python module fusedrnn._cpu: checks what it is given against the kernels' contract (layer.h) and calls them.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <vector>

#include "../cpu/kernels.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

const Kernels& kernels() {
  const Kernels* in_use = kernels_in_use();
  if (in_use) return *in_use;
  std::string names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names += std::string(names.empty() ? "" : ", ") + (*k)->name;
  throw std::runtime_error(std::string("FUSEDRNN_ISA is ") + std::getenv("FUSEDRNN_ISA") +
                           ", but this machine runs only: " + names);
}

int cell_index(const std::string& name) {
  for (int c = 0; c < static_cast<int>(CellKind::count); ++c)
    if (name == cell_facts[c].name) return c;
  throw std::invalid_argument("no cell is called " + name);
}

// The arguments that forward and backward share, checked, of either precision.
struct Arguments {
  int cell;
  int bits;  // of a value
  Sequence seq{};
  std::vector<int64_t> starts;
  int64_t I, H, R;
  int directions;
  bool projected;
  TensorView input;
  TensorView hx[max_states];
  TensorView weights[max_directions][5];

  Arguments(const std::string& name, py::handle input_, py::handle batch_sizes, const py::sequence& hx_,
            const py::sequence& weights_)
      : cell(cell_index(name)), input(view(input_)) {
    const CellFacts& facts = cell_facts[cell];
    const bool packed = !batch_sizes.is_none();
    require(input.dims == (packed ? 2 : 3), "input has the wrong number of dimensions");
    require(input.is_float(32) || input.is_float(64), "input is neither float32 nor float64");
    bits = input.bits;
    I = input.shape[input.dims - 1];
    require(I <= 1 || input.stride[input.dims - 1] == 1, "the input's features are not side by side");
    if (packed) read_batch_sizes(batch_sizes);
    else seq.T = input.shape[0], seq.B = input.shape[1];
    require(seq.T > 0, "the sequence has no steps");
    require(weights_.size() == 5 || weights_.size() == 10, "expected five weights per direction");
    directions = static_cast<int>(weights_.size()) / 5;
    for (int d = 0; d < directions; ++d)
      for (int w = 0; w < 5; ++w) weights[d][w] = view(weights_[static_cast<size_t>(5 * d + w)]);
    require(weights[0][1].dims == 2, "weight_hh is not a matrix");
    H = weights[0][1].shape[0] / facts.gates;
    R = weights[0][1].shape[1];
    projected = static_cast<bool>(weights[0][4]);
    require(!projected || facts.states > 1, "only an LSTM can be projected");
    require(projected || R == H, "weight_hh is not of shape (gates * H, H)");
    require(H > 0 && R > 0, "the layer has no units");
    for (int d = 0; d < directions; ++d) {
      const int64_t GH = facts.gates * H;
      check(weights[d][0], "weight_ih", {GH, I});
      check(weights[d][1], "weight_hh", {GH, R});
      if (weights[d][2]) check(weights[d][2], "bias_ih", {GH});
      if (weights[d][3]) check(weights[d][3], "bias_hh", {GH});
      require(static_cast<bool>(weights[d][4]) == projected, "weight_hr is missing in one direction");
      if (projected) check(weights[d][4], "weight_hr", {R, H});
    }
    require(hx_.size() == static_cast<size_t>(facts.states), "wrong number of initial states");
    for (int s = 0; s < facts.states; ++s) {
      hx[s] = view(hx_[static_cast<size_t>(s)]);
      if (hx[s]) check_state(hx[s], "initial state", s);
    }
  }

  int64_t state_width(int s) const { return s == 0 ? R : H; }

  void check_state(const TensorView& v, const char* name, int s) const {
    check(v, name, {directions, seq.B, state_width(s)});
  }

  // Of the wanted shape, contiguous, and of the input's dtype.
  void check(const TensorView& v, const char* name, std::initializer_list<int64_t> shape) const {
    bool right = v.dims == static_cast<int>(shape.size()) && v.is_float(bits) && v.contiguous();
    for (int d = 0; right && d < v.dims; ++d) right = v.shape[d] == shape.begin()[d];
    if (!right) fail(std::string(name) + " has the wrong shape or dtype, or is not contiguous");
  }

  // (T, B, features) or (tokens, features), features side by side.
  void check_tokens(const TensorView& v, const char* name, int64_t features) const {
    const bool packed = seq.sizes != nullptr;
    const bool right = v.is_float(bits) && v.dims == (packed ? 2 : 3) && v.shape[v.dims - 1] == features &&
                       (features <= 1 || v.stride[v.dims - 1] == 1) &&
                       (packed ? v.shape[0] == seq.tokens() : v.shape[0] == seq.T && v.shape[1] == seq.B);
    if (!right) fail(std::string(name) + " has the wrong shape, dtype or layout");
  }

  int64_t saved_count() const {
    const CellFacts& facts = cell_facts[cell];
    return directions * saved_size(facts.kept, facts.states, seq.tokens(), H, R, projected);
  }

  template <class T>
  void fill(Layer<T>& layer) const {
    layer.seq = seq;
    layer.I = I, layer.H = H, layer.R = R;
    layer.directions = directions;
    layer.projected = projected;
    layer.input = tokens<const T>(input);
    for (int s = 0; s < max_states; ++s) layer.hx[s] = static_cast<const T*>(hx[s].data);
    for (int d = 0; d < directions; ++d) layer.weights[d] = as_weights<const T>(weights[d]);
  }

  template <class Value>
  TokenRows<Value> tokens(const TensorView& v) const {
    if (!v) return {};
    return {static_cast<Value*>(v.data), v.stride[0], v.stride[seq.sizes ? 0 : 1]};
  }

  template <class Value>
  static Weights<Value> as_weights(const TensorView (&v)[5]) {
    return {static_cast<Value*>(v[0].data), static_cast<Value*>(v[1].data), static_cast<Value*>(v[2].data),
            static_cast<Value*>(v[3].data), static_cast<Value*>(v[4].data)};
  }

 private:
  void read_batch_sizes(py::handle tensor) {
    const TensorView sizes = view(tensor);
    require(sizes.dims == 1 && sizes.kind == 'i' && sizes.bits == 64 && sizes.contiguous(),
            "batch_sizes is not a contiguous vector of int64");
    seq.T = sizes.shape[0];
    require(seq.T > 0, "the sequence has no steps");
    seq.sizes = static_cast<const int64_t*>(sizes.data);
    seq.B = seq.sizes[0];
    starts.resize(static_cast<size_t>(seq.T) + 1);
    for (int64_t t = 0; t < seq.T; ++t) {
      require(seq.sizes[t] > 0 && seq.sizes[t] <= (t ? seq.sizes[t - 1] : input.shape[0]),
              "batch_sizes must be positive and must not rise");
      starts[static_cast<size_t>(t) + 1] = starts[static_cast<size_t>(t)] + seq.sizes[t];
    }
    seq.starts = starts.data();
    require(seq.tokens() == input.shape[0], "batch_sizes do not add up to the rows of the input");
  }
};

// Calls f with a value of the type of `bits` bits.
template <class F>
void with_type(int bits, F&& f) {
  if (bits == 32) f(float{});
  else f(double{});
}

template <class T>
const Functions<T>& functions(int cell) {
  if constexpr (sizeof(T) == 4) return kernels().single_[cell];
  else return kernels().double_[cell];
}

py::tuple measure(const std::string& cell, py::handle input, py::handle batch_sizes, const py::sequence& hx,
                  const py::sequence& weights) {
  const Arguments a(cell, input, batch_sizes, hx, weights);
  return py::make_tuple(a.seq.T, a.seq.B, a.seq.tokens(), a.H, a.R, a.saved_count());
}

void forward(const std::string& cell, py::handle input, py::handle batch_sizes, const py::sequence& hx,
             const py::sequence& weights, py::handle output, const py::sequence& final, py::handle saved,
             int threads) {
  const Arguments a(cell, input, batch_sizes, hx, weights);
  const TensorView output_view = view(output), saved_view = view(saved);
  if (output_view) a.check_tokens(output_view, "output", a.directions * a.R);
  if (saved_view) a.check(saved_view, "saved", {a.saved_count()});
  require(final.size() == static_cast<size_t>(cell_facts[a.cell].states), "wrong number of final states");
  with_type(a.bits, [&](auto zero) {
    using T = decltype(zero);
    Forward<T> args{};
    a.fill(args);
    args.output = a.tokens<T>(output_view);
    args.saved = static_cast<T*>(saved_view.data);
    for (size_t s = 0; s < final.size(); ++s) {
      const TensorView state = view(final[s]);
      a.check_state(state, "final state", static_cast<int>(s));
      args.final[s] = static_cast<T*>(state.data);
    }
    const auto& kernel = functions<T>(a.cell);
    const py::gil_scoped_release release;
    kernel.forward(args, threads);
  });
}

void backward(const std::string& cell, py::handle input, py::handle batch_sizes, const py::sequence& hx,
              const py::sequence& weights, py::handle saved, const py::sequence& grads, const py::sequence& results,
              int threads) {
  const Arguments a(cell, input, batch_sizes, hx, weights);
  const auto states = static_cast<size_t>(cell_facts[a.cell].states), count = weights.size();
  require(grads.size() == 1 + states, "wrong number of gradients");
  require(results.size() == 1 + states + count, "wrong number of results");
  const TensorView saved_view = view(saved), d_output = view(grads[0]), d_input = view(results[0]);
  a.check(saved_view, "saved", {a.saved_count()});
  if (d_output) a.check_tokens(d_output, "the gradient of the output", a.directions * a.R);
  if (d_input) a.check_tokens(d_input, "the gradient of the input", a.I);
  TensorView d_weights[max_directions][5];
  for (size_t w = 0; w < count; ++w) {
    TensorView& v = d_weights[w / 5][w % 5] = view(results[1 + states + w]);
    const TensorView& like = a.weights[w / 5][w % 5];
    if (v && like.dims == 1) a.check(v, "a weight's gradient", {like.shape[0]});
    if (v && like.dims == 2) a.check(v, "a weight's gradient", {like.shape[0], like.shape[1]});
    require(!v || like, "a gradient of a missing weight is asked for");
  }
  with_type(a.bits, [&](auto zero) {
    using T = decltype(zero);
    Backward<T> args{};
    a.fill(args);
    args.saved = static_cast<const T*>(saved_view.data);
    args.d_output = a.tokens<const T>(d_output);
    args.d_input = a.tokens<T>(d_input);
    for (size_t s = 0; s < states; ++s) {
      const TensorView given = view(grads[1 + s]), wanted = view(results[1 + s]);
      if (given) a.check_state(given, "the gradient of a final state", static_cast<int>(s));
      if (wanted) a.check_state(wanted, "the gradient of an initial state", static_cast<int>(s));
      args.d_final[s] = static_cast<const T*>(given.data);
      args.d_hx[s] = static_cast<T*>(wanted.data);
    }
    for (int d = 0; d < a.directions; ++d) args.d_weights[d] = Arguments::as_weights<T>(d_weights[d]);
    const auto& kernel = functions<T>(a.cell);
    const py::gil_scoped_release release;
    kernel.backward(args, threads);
  });
}

py::list isas() {
  py::list names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names.append((*k)->name);
  return names;
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(_cpu, m) {
  using namespace fusedrnn;
  m.doc() = "Compiled CPU kernels. See csrc/cpu/layer.h for the contract and fusedrnn/engines/cpu.py for the use.";
  m.def("measure", &measure, py::arg("cell"), py::arg("input"), py::arg("batch_sizes"), py::arg("hx"),
        py::arg("weights"), "(T, B, tokens, H, R, values to save) of a call; ValueError if it breaks the contract.");
  m.def("forward", &forward, py::arg("cell"), py::arg("input"), py::arg("batch_sizes"), py::arg("hx"),
        py::arg("weights"), py::arg("output"), py::arg("final"), py::arg("saved"), py::arg("threads"),
        "Runs a layer; writes output (or None), final and saved (or None).");
  m.def("backward", &backward, py::arg("cell"), py::arg("input"), py::arg("batch_sizes"), py::arg("hx"),
        py::arg("weights"), py::arg("saved"), py::arg("grads"), py::arg("results"), py::arg("threads"),
        "Gradients of a layer; writes those of `results` that are not None.");
  m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");
  m.def("isas", &isas, "Names of the instruction sets that this machine runs, best first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!use_kernels(name.c_str())) throw std::invalid_argument("this machine runs no kernels called " + name);
      },
      py::arg("name"), "Use another instruction set from now on, in the whole process.");
}

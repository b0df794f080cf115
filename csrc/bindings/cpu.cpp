// Python module fusedrnn._cpu: checks what it is given against the kernels' contract (layer.h) and calls them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "../cpu/team.h"
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
  for (const Kernels* const* k = available_kernels(); *k; ++k)
    names += std::string(names.empty() ? "" : ", ") + (*k)->name;
  throw std::runtime_error(std::string("FUSEDRNN_ISA is ") + std::getenv("FUSEDRNN_ISA") +
                           ", but this machine runs only: " + names);
}

int cell_index(const std::string& name) {
  for (int c = 0; c < static_cast<int>(CellKind::count); ++c)
    if (name == cell_facts[c].name) return c;
  throw std::invalid_argument("no cell is called " + name);
}

// Where a direction's five weights (w_ih, w_hh, b_ih, b_hh, w_hr) stand in a list; -1 for those it does without.
struct Grouping {
  int each = 5;
  int place[5] = {0, 1, 2, 3, 4};
  Grouping() = default;
  Grouping(bool bias, bool projected)
      : each(2 + (bias ? 2 : 0) + (projected ? 1 : 0)),
        place{0, 1, bias ? 2 : -1, bias ? 3 : -1, projected ? each - 1 : -1} {}
};

// What a list or a tuple holds, or part of one, or a dictionary under a list of names; kept alive.
class Items {
 public:
  explicit Items(py::handle sequence, Py_ssize_t first = 0, Py_ssize_t last = PY_SSIZE_T_MAX) {
    require(PyList_Check(sequence.ptr()) || PyTuple_Check(sequence.ptr()), "neither a list nor a tuple");
    PyObject* const* items = PySequence_Fast_ITEMS(sequence.ptr());
    last = std::min(last, PySequence_Fast_GET_SIZE(sequence.ptr()));
    for (Py_ssize_t k = first; k < last; ++k) add(items[k]);
  }
  Items(py::handle dictionary, py::handle names) {
    require(PyDict_Check(dictionary.ptr()), "not a dictionary");
    for (const py::handle name : Items(names)) add(PyDict_GetItemWithError(dictionary.ptr(), name.ptr()));
  }
  size_t size() const { return count_; }
  py::handle operator[](size_t k) const { return items_[k]; }
  const py::object* begin() const { return items_; }
  const py::object* end() const { return items_ + count_; }

 private:
  static constexpr size_t most = 5 * max_directions;
  void add(PyObject* item) {
    if (PyErr_Occurred()) throw py::error_already_set();
    require(item, "a weight is missing");
    require(count_ < most, "too many weights or states");
    items_[count_++] = py::reinterpret_borrow<py::object>(item);
  }
  py::object items_[most];
  size_t count_ = 0;
};

// Of all calls of the process.
std::atomic<bool> batch_invariant{false};

// How a call's input and output lie: (T, B, features), (B, T, features), or (B, features) of one step, whose states
// then lie so too. The kernels count all as (T, B, features).
enum class Layout { time_major, batch_first, one_step };

// Of states, (D, B, width) if there are steps.
Layout layout_of_states(Layout layout) { return layout == Layout::one_step ? layout : Layout::time_major; }

// As the kernels count.
TensorView turned(TensorView v, Layout layout) {
  if (!v || layout == Layout::time_major) return v;
  if (layout == Layout::batch_first) {
    require(v.dims == 3, "a tensor has the wrong number of dimensions");
    std::swap(v.shape[0], v.shape[1]);
    std::swap(v.stride[0], v.stride[1]);
    return v;
  }
  require(v.dims == 2, "a tensor has the wrong number of dimensions");
  for (int d = 2; d > 0; --d) v.shape[d] = v.shape[d - 1], v.stride[d] = v.stride[d - 1];
  v.shape[0] = 1;
  v.dims = 3;
  v.stride[0] = v.shape[1] * v.stride[1];
  return v;
}

// A new tensor that lies as the caller wants it, for what the kernels count as `rows`.
NewTensor new_laid_out(const int64_t (&rows)[3], int bits, Layout layout) {
  NewTensor made = layout == Layout::time_major    ? new_tensor({rows[0], rows[1], rows[2]}, bits)
                   : layout == Layout::batch_first ? new_tensor({rows[1], rows[0], rows[2]}, bits)
                                                   : new_tensor({rows[1], rows[2]}, bits);
  made.view = turned(made.view, layout);
  return made;
}

// What a call may say of its sequences: each None if it does not.
struct Along {
  py::handle batch_sizes = Py_None;        // of a packed batch: int64, T entries
  py::handle lengths = Py_None;            // of a padded batch: int64, B entries
  py::handle resets = Py_None;             // bool (T, B), or (tokens) if packed
  py::sequence reset_state = py::tuple();  // for each state (D, B, width) or None; empty: all None
  py::handle h_mask = Py_None;             // (D, B, R)
  py::sequence zoneout = py::tuple();      // for each state its rate; empty: none
  py::handle seed = Py_None;               // of zoneout's lots; without one its expectation
};

// The arguments that forward and backward share, checked, of any precision.
struct Arguments {
  int cell;
  int bits;  // of a value
  Sequence seq{};
  std::vector<int64_t> sizes, starts, order;
  std::vector<uint8_t> resets;
  int64_t I, H, R;
  int directions;
  bool projected;
  TensorView input;
  TensorView hx[max_states], reset_state[max_states], h_mask;
  Zoneout zoneout;
  bool recompute = false;
  TensorView weights[max_directions][5];

  Arguments(const std::string& name, py::handle input_, const Along& along, const Items& hx_, const Items& weights_,
            const Grouping& grouping = {}, Layout layout = Layout::time_major)
      : cell(cell_index(name)), input(turned(view(input_), layout)) {
    const CellFacts& facts = cell_facts[cell];
    const bool packed = !along.batch_sizes.is_none();
    require(input.dims == (packed ? 2 : 3), "input has the wrong number of dimensions");
    require(input.is_float(16) || input.is_float(32) || input.is_float(64),
            "input is neither bfloat16 nor float32 nor float64");
    bits = input.bits;
    I = input.shape[input.dims - 1];
    require(side_by_side(input), "the input's features are not side by side");
    if (packed)
      read_batch_sizes(along.batch_sizes);
    else
      seq.T = input.shape[0], seq.B = input.shape[1];
    require(seq.T > 0, "the sequence has no steps");
    if (!along.lengths.is_none()) read_lengths(along.lengths);
    if (!along.resets.is_none()) read_resets(along.resets);
    const auto each = static_cast<size_t>(grouping.each);
    require(weights_.size() == each || weights_.size() == 2 * each, "wrong number of weights");
    directions = static_cast<int>(weights_.size() / each);
    for (int d = 0; d < directions; ++d)
      for (int w = 0; w < 5; ++w)
        if (grouping.place[w] >= 0)
          weights[d][w] = view(weights_[static_cast<size_t>(grouping.each * d + grouping.place[w])]);
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
      require(static_cast<bool>(weights[d][2]) == static_cast<bool>(weights[d][3]), "one of the two biases is missing");
      require(static_cast<bool>(weights[d][4]) == projected, "weight_hr is missing in one direction");
      if (projected) check(weights[d][4], "weight_hr", {R, H});
    }
    require(hx_.size() == static_cast<size_t>(facts.states), "wrong number of initial states");
    for (int s = 0; s < facts.states; ++s) {
      hx[s] = turned(view(hx_[static_cast<size_t>(s)]), layout_of_states(layout));
      if (hx[s]) check_state(hx[s], "initial state", s);
    }
    if (!along.h_mask.is_none()) {
      h_mask = view(along.h_mask);
      check_state(h_mask, "the mask of h", 0);
    }
    if (along.zoneout.size() > 0) {
      require(along.zoneout.size() == static_cast<size_t>(facts.states), "wrong number of rates of zoneout");
      require(!projected, "zoneout is not for a projection");
      for (int s = 0; s < facts.states; ++s) zoneout.rate[s] = along.zoneout[static_cast<size_t>(s)].cast<double>();
      zoneout.drawn = !along.seed.is_none();
      if (zoneout.drawn) zoneout.seed = static_cast<uint64_t>(along.seed.cast<int64_t>());
    }
    if (along.reset_state.size() == 0) return;
    require(along.reset_state.size() == static_cast<size_t>(facts.states), "wrong number of reset states");
    for (int s = 0; s < facts.states; ++s) {
      reset_state[s] = view(along.reset_state[static_cast<size_t>(s)]);
      if (reset_state[s]) check_state(reset_state[s], "reset state", s);
    }
  }
  // The sequence points into this.
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  int64_t state_width(int s) const { return s == 0 ? R : H; }

  void check_state(const TensorView& v, const char* name, int s) const {
    check(v, name, {directions, seq.B, state_width(s)});
  }

  static bool side_by_side(const TensorView& v) {
    for (int d = 0; d < v.dims; ++d)
      if (v.shape[d] == 0) return true;
    return v.shape[v.dims - 1] == 1 || v.stride[v.dims - 1] == 1;
  }

  // Of the wanted shape, contiguous, and of the input's dtype.
  void check(const TensorView& v, const char* name, std::initializer_list<int64_t> shape) const {
    bool right = v.dims == static_cast<int>(shape.size()) && v.is_float(bits) && v.contiguous();
    for (int d = 0; right && d < v.dims; ++d) right = v.shape[d] == shape.begin()[d];
    if (!right) fail(std::string(name) + " has the wrong shape or dtype, or is not contiguous");
  }

  // (T, B, features) or (tokens, features), features side by side.
  void check_tokens(const TensorView& v, const char* name, int64_t features) const {
    const bool packed = is_packed();
    const bool right = v.is_float(bits) && v.dims == (packed ? 2 : 3) && v.shape[v.dims - 1] == features &&
                       side_by_side(v) &&
                       (packed ? v.shape[0] == seq.tokens() : v.shape[0] == seq.T && v.shape[1] == seq.B);
    if (!right) fail(std::string(name) + " has the wrong shape, dtype or layout");
  }

  bool is_packed() const { return seq.sizes && !seq.order; }

  // Whether other Python threads should run meanwhile: more than the 0.2 us that letting them costs, by far.
  bool takes_time() const { return seq.tokens() * directions * cell_facts[cell].gates * H * (I + R) > 50000; }

  // A new tensor with a row of features for each token.
  NewTensor new_rows(int64_t features) const {
    return is_packed() ? new_tensor({seq.tokens(), features}, bits) : new_tensor({seq.T, seq.B, features}, bits);
  }

  // Of a padded batch for all of T x B, as a compiler must know it without the lengths; what lies behind the values of
  // the real tokens is not touched, and so takes no memory.
  int64_t saved_count() const {
    const CellFacts& facts = cell_facts[cell];
    const int64_t tokens = seq.order ? seq.T * seq.B : seq.tokens();
    return directions * saved_size(recompute ? 0 : facts.kept, facts.states, tokens, H, R, projected);
  }

  template <class T>
  void fill(Layer<T>& layer) const {
    layer.seq = seq;
    layer.I = I, layer.H = H, layer.R = R;
    layer.directions = directions;
    layer.projected = projected;
    layer.input = tokens<const T>(input);
    for (int s = 0; s < max_states; ++s) {
      layer.hx[s] = static_cast<const T*>(hx[s].data);
      layer.reset_state[s] = static_cast<const T*>(reset_state[s].data);
    }
    for (int d = 0; d < directions; ++d) layer.weights[d] = as_weights<const T>(weights[d]);
    layer.h_mask = static_cast<const T*>(h_mask.data);
    layer.zoneout = zoneout;
    layer.recompute = recompute;
    layer.batch_invariant = batch_invariant;
  }

  template <class Value>
  TokenRows<Value> tokens(const TensorView& v) const {
    if (!v) return {};
    return {static_cast<Value*>(v.data), v.stride[0], v.stride[is_packed() ? 0 : 1]};
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

  void read_lengths(py::handle tensor) {
    const TensorView lengths = view(tensor);
    require(!seq.sizes, "there are both batch_sizes and lengths");
    require(lengths.dims == 1 && lengths.kind == 'i' && lengths.bits == 64 && lengths.contiguous() &&
                lengths.shape[0] == seq.B,
            "lengths is not a contiguous vector of int64, one for each sequence");
    const auto* length = static_cast<const int64_t*>(lengths.data);
    const auto T = static_cast<size_t>(seq.T);
    sizes.resize(T + 1);
    for (int64_t b = 0; b < seq.B; ++b) {
      require(length[b] >= 0 && length[b] <= seq.T, "lengths must be from 0 to the number of steps");
      ++sizes[static_cast<size_t>(length[b])];
    }
    // So far sizes[n] counts the sequences of n steps. The longest come first, so sizes[t], those of more than t steps,
    // is also where those of t steps begin.
    int64_t longer = 0;
    for (size_t n = T + 1; n-- > 0;) longer += std::exchange(sizes[n], longer);
    order.resize(static_cast<size_t>(std::max(seq.B, int64_t{1})));  // not null without sequences: see is_packed
    std::vector<int64_t> next = sizes;
    for (int64_t b = 0; b < seq.B; ++b) order[static_cast<size_t>(next[static_cast<size_t>(length[b])]++)] = b;
    starts.resize(T + 1);
    for (size_t t = 0; t < T; ++t) starts[t + 1] = starts[t] + sizes[t];
    seq.sizes = sizes.data(), seq.starts = starts.data(), seq.order = order.data();
  }

  void read_resets(py::handle tensor) {
    const TensorView given = view(tensor);
    const bool packed = is_packed();
    require(given.kind == 'b' && given.dims == (packed ? 1 : 2) &&
                (packed ? given.shape[0] == seq.tokens() : given.shape[0] == seq.T && given.shape[1] == seq.B),
            "resets is not Boolean, or not of one value for each step of each sequence");
    resets.resize(static_cast<size_t>(seq.tokens()));
    const TokenRows<const uint8_t> rows{static_cast<const uint8_t*>(given.data), given.stride[0],
                                        given.stride[packed ? 0 : 1]};
    for (int64_t t = 0; t < seq.T; ++t)
      for (int64_t b = 0; b < seq.size(t); ++b) resets[static_cast<size_t>(seq.start(t) + b)] = *rows.at(seq, t, b);
    seq.resets = resets.data();
  }
};

// Calls f with a value of the type of `bits` bits.
template <class F>
void with_type(int bits, F&& f) {
  if (bits == 16)
    f(bf16(0.f));
  else if (bits == 32)
    f(float{});
  else
    f(double{});
}

template <class T>
const Functions<T>& functions(int cell) {
  if constexpr (sizeof(T) == 2)
    return kernels().bf16_[cell];
  else if constexpr (sizeof(T) == 4)
    return kernels().single_[cell];
  else
    return kernels().double_[cell];
}

// Other Python threads run while this lives, if the call takes long enough for that.
class Release {
 public:
  explicit Release(const Arguments& a) {
    if (a.takes_time()) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

// Runs a layer whose output, states of every step, final states and saved values are views of memory that is ready to
// be written.
void run_forward(const Arguments& a, const TensorView& output, const TensorView* states, const TensorView* final,
                 const TensorView& saved, int threads) {
  with_type(a.bits, [&](auto zero) {
    using T = decltype(zero);
    Forward<T> args{};
    a.fill(args);
    args.output = a.tokens<T>(output);
    args.saved = static_cast<T*>(saved.data);
    for (int s = 0; s < cell_facts[a.cell].states; ++s) {
      args.states[s] = a.tokens<T>(states[s]);
      args.final[s] = static_cast<T*>(final[s].data);
    }
    const auto& kernel = functions<T>(a.cell);
    const Release release(a);
    kernel.forward(args, threads);
  });
}

py::list forward(const std::string& cell, py::handle input, py::handle batch_sizes, py::handle lengths,
                 py::handle resets, const py::sequence& hx, const py::sequence& reset_state,
                 const py::sequence& weights, py::handle h_mask, const py::sequence& zoneout, py::handle seed,
                 bool recompute, bool sequence, bool every_state, bool save, int threads) {
  const Items of_hx(hx), of_weights(weights);
  Arguments a(cell, input, {batch_sizes, lengths, resets, reset_state, h_mask, zoneout, seed}, of_hx, of_weights);
  a.recompute = recompute;
  const int states = cell_facts[a.cell].states;
  py::list result;
  const auto add = [&](NewTensor made) {
    result.append(std::move(made.object));
    return made.view;
  };
  TensorView every[max_states], final[max_states];
  const TensorView output = add(sequence ? a.new_rows(a.directions * a.R) : NewTensor{py::none(), {}});
  for (int s = 1; s < states && every_state; ++s) every[s] = add(a.new_rows(a.directions * a.H));
  for (int s = 0; s < states; ++s) final[s] = add(new_tensor({a.directions, a.seq.B, a.state_width(s)}, a.bits));
  const TensorView saved = add(save ? new_tensor({a.saved_count()}, a.bits) : NewTensor{py::none(), {}});
  run_forward(a, output, every, final, saved, threads);
  return result;
}

// Whether autograd has to know what becomes of a tensor.
bool requires_grad(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  if (tensor.is_none()) return false;
  const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// The usual call, straight from a module. None where anything is out of the ordinary. Weights come as they are, or as
// the names of some of a module's parameters. With `grad`, if any tensor requires a gradient, what autograd has to be
// told: a list of the outputs with what backward needs, and of the tensors in the order of Call.tensors.
py::object express(const std::string& cell, py::handle input, py::handle states_given, py::handle weights_given,
                   py::handle names, bool bias, bool projected, Layout layout, py::handle lengths, bool grad,
                   int threads) {
  try {
    const Items hx(states_given), weights = names.is_none() ? Items(weights_given) : Items(weights_given, names);
    bool plain = is_plain(input) && is_plain(lengths);
    for (const py::handle state : hx) plain = plain && is_plain(state) && state.is_none() == hx[0].is_none();
    for (const py::handle weight : weights) plain = plain && is_plain(weight);
    if (!plain) return py::none();
    const bool save = grad && (requires_grad(input) || std::any_of(weights.begin(), weights.end(), requires_grad) ||
                               std::any_of(hx.begin(), hx.end(), requires_grad));
    if (save && !lengths.is_none()) return py::none();
    Along along;
    along.lengths = lengths;
    const Grouping grouping(bias, projected);
    const Arguments a(cell, input, along, hx, weights, grouping, layout);
    const auto states = static_cast<size_t>(cell_facts[a.cell].states);
    const Layout of_states = layout_of_states(layout);
    NewTensor output, final[max_states], saved;
    if (layout != Layout::one_step) output = new_laid_out({a.seq.T, a.seq.B, a.directions * a.R}, a.bits, layout);
    TensorView every[max_states], final_views[max_states];
    for (size_t s = 0; s < states; ++s) {
      final[s] = new_laid_out({a.directions, a.seq.B, a.state_width(static_cast<int>(s))}, a.bits, of_states);
      final_views[s] = final[s].view;
    }
    if (save) saved = new_tensor({a.saved_count()}, a.bits);
    run_forward(a, output.view, every, final_views, saved.view, threads);
    const auto pack = [&](size_t first) {
      py::tuple all(first + states);
      if (first > 0) all[0] = std::move(output.object);
      for (size_t s = 0; s < states; ++s) PyTuple_SET_ITEM(all.ptr(), first + s, final[s].object.release().ptr());
      return all;
    };
    if (!save) {
      if (layout == Layout::one_step) return pack(0);
      if (states == 1) return py::make_tuple(std::move(output.object), std::move(final[0].object));
      py::object steps = std::move(output.object);
      return py::make_tuple(std::move(steps), pack(0));
    }
    py::tuple tensors(1 + states + 5 * static_cast<size_t>(a.directions));
    size_t next = 0;
    tensors[next++] = input;
    for (const py::handle state : hx) tensors[next++] = state;
    for (int d = 0; d < a.directions; ++d)
      for (const int place : grouping.place)
        tensors[next++] = place < 0 ? py::handle(Py_None) : weights[static_cast<size_t>(grouping.each * d + place)];
    py::list result;
    result.append(py::make_tuple(pack(layout == Layout::one_step ? 0 : 1), std::move(saved.object)));
    result.append(std::move(tensors));
    return result;
  } catch (const std::invalid_argument&) {
    return py::none();
  }
}

// Gradients of the results, as the kernels count dimensions; empty ones are zeros.
struct Incoming {
  TensorView output, every[max_states], final[max_states];
};

// Gradients of input, states, weights and reset states, None where not needed, of a call laid out in some way.
py::tuple run_backward(const Arguments& a, const TensorView& saved, const Incoming& given, const py::sequence& needs,
                       bool of_reset_state, Layout layout, int threads) {
  const auto states = static_cast<size_t>(cell_facts[a.cell].states), count = 5 * static_cast<size_t>(a.directions);
  require(needs.size() == 1 + states + count + (of_reset_state ? states : 0), "wrong number of needs");
  a.check(saved, "saved", {a.saved_count()});
  if (given.output) a.check_tokens(given.output, "the gradient of the output", a.directions * a.R);
  py::tuple result(needs.size());
  // The gradient of the k-th tensor, shaped as it, if it exists and its gradient is needed.
  const auto gradient = [&](size_t k, const TensorView& like, Layout laid_out) {
    NewTensor made{py::none(), {}};
    if (like && needs[k].cast<bool>())
      made = like.dims == 1   ? new_tensor({like.shape[0]}, a.bits)
             : like.dims == 2 ? new_tensor({like.shape[0], like.shape[1]}, a.bits)
                              : new_laid_out({like.shape[0], like.shape[1], like.shape[2]}, a.bits, laid_out);
    result[k] = std::move(made.object);
    return made.view;
  };
  const TensorView d_input = gradient(0, a.input, layout);
  TensorView d_hx[max_states], d_reset[max_states], d_weights[max_directions][5];
  for (size_t s = 0; s < states; ++s) {
    if (given.every[s]) a.check_tokens(given.every[s], "the gradient of a state at every step", a.directions * a.H);
    if (given.final[s]) a.check_state(given.final[s], "the gradient of a final state", static_cast<int>(s));
    d_hx[s] = gradient(1 + s, a.hx[s], layout_of_states(layout));
    if (of_reset_state) d_reset[s] = gradient(1 + states + count + s, a.reset_state[s], Layout::time_major);
  }
  for (size_t w = 0; w < count; ++w)
    d_weights[w / 5][w % 5] = gradient(1 + states + w, a.weights[w / 5][w % 5], Layout::time_major);
  with_type(a.bits, [&](auto zero) {
    using T = decltype(zero);
    Backward<T> args{};
    a.fill(args);
    args.saved = static_cast<const T*>(saved.data);
    args.d_output = a.tokens<const T>(given.output);
    args.d_input = a.tokens<T>(d_input);
    for (size_t s = 0; s < states; ++s) {
      args.d_states[s] = a.tokens<const T>(given.every[s]);
      args.d_final[s] = static_cast<const T*>(given.final[s].data);
      args.d_hx[s] = static_cast<T*>(d_hx[s].data);
      args.d_reset_state[s] = static_cast<T*>(d_reset[s].data);
    }
    for (int d = 0; d < a.directions; ++d) args.d_weights[d] = Arguments::as_weights<T>(d_weights[d]);
    const auto& kernel = functions<T>(a.cell);
    const Release release(a);
    kernel.backward(args, threads);
  });
  return result;
}

py::tuple backward(const std::string& cell, py::handle input, py::handle batch_sizes, py::handle lengths,
                   py::handle resets, const py::sequence& hx, const py::sequence& reset_state,
                   const py::sequence& weights, py::handle h_mask, const py::sequence& zoneout, py::handle seed,
                   bool recompute, py::handle saved, const py::sequence& grads, const py::sequence& needs,
                   int threads) {
  const Items of_hx(hx), of_weights(weights);
  Arguments a(cell, input, {batch_sizes, lengths, resets, reset_state, h_mask, zoneout, seed}, of_hx, of_weights);
  a.recompute = recompute;
  require(recompute || !a.zoneout.on(), "backward through zoneout recomputes");
  const auto states = static_cast<size_t>(cell_facts[a.cell].states);
  const bool every_state = grads.size() > 1 + states;
  const size_t first_final = every_state ? states : 1;
  require(grads.size() == first_final + states, "wrong number of gradients");
  Incoming given;
  given.output = view(grads[0]);
  for (size_t s = 0; s < states; ++s) {
    if (s > 0 && every_state) given.every[s] = view(grads[s]);
    given.final[s] = view(grads[first_final + s]);
  }
  return run_backward(a, view(saved), given, needs, reset_state.size() > 0, Layout::time_major, threads);
}

// Backward of a call that `express` has run: its tensors, the outputs' gradients. None where anything is out of the
// ordinary.
py::object express_backward(const std::string& cell, py::handle tensors, Layout layout, py::handle saved,
                            py::handle grads_given, const py::sequence& needs, int threads) {
  try {
    const auto states = static_cast<Py_ssize_t>(cell_facts[cell_index(cell)].states);
    const Items hx(tensors, 1, 1 + states), weights(tensors, 1 + states), grads(grads_given);
    const Items input(tensors, 0, 1);
    bool plain = is_plain(saved);
    for (const Items* of : {&input, &hx, &weights, &grads})
      for (const py::handle tensor : *of) plain = plain && is_plain(tensor);
    if (!plain) return py::none();
    const Arguments a(cell, input[0], Along{}, hx, weights, {}, layout);
    Incoming given;
    size_t next = 0;
    if (layout != Layout::one_step) given.output = turned(view(grads[next++]), layout);
    for (size_t s = 0; s < hx.size(); ++s) given.final[s] = turned(view(grads[next++]), layout_of_states(layout));
    return run_backward(a, view(saved), given, needs, false, layout, threads);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
}

// Values that forward saves for each token and direction, for those who must know before there are tensors to look at.
int64_t saved_per_token(const std::string& cell, int64_t H, int64_t R, bool projected, bool recompute) {
  const CellFacts& facts = cell_facts[cell_index(cell)];
  return saved_size(recompute ? 0 : facts.kept, facts.states, 1, H, R, projected);
}

// The most units per second that any of many short trials reached: work(rounds) returns the units that it did.
template <class Work>
double best_rate(double seconds, const Work& work) {
  using Clock = std::chrono::steady_clock;
  constexpr double trial = 2e-3;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const py::gil_scoped_release release;
  work(1);  // warms caches and clocks up
  int64_t rounds = 1;
  double best = 0;
  for (const auto begin = Clock::now(); since(begin) < seconds || best == 0;) {
    const auto start = Clock::now();
    const auto units = static_cast<double>(work(rounds));
    const double took = since(start);
    if (took < trial)
      rounds *= 2;
    else
      best = std::max(best, units / took);
  }
  return best;
}

py::object probe_multiply_adds(const std::string& dtype, double seconds) {
  const Probes& probes = kernels().probes;
  int64_t (*probe)(int64_t) = nullptr;
  if (dtype == "float32")
    probe = probes.multiply_adds_single;
  else if (dtype == "float64")
    probe = probes.multiply_adds_double;
  else if (dtype == "bfloat16")
    probe = probes.dots_bf16;
  else
    fail("there is no probe for " + dtype);
  if (!probe) return py::none();
  return py::float_(best_rate(seconds, probe));
}

double probe_read(int64_t bytes, double seconds) {
  require(bytes > 0 && bytes % 4096 == 0, "bytes is not a positive multiple of 4096");
  constexpr size_t page = size_t{1} << 21;  // so that prefer_huge_pages finds whole ones
  const auto size = (static_cast<size_t>(bytes) + page - 1) / page * page;
  const std::unique_ptr<void, decltype(&std::free)> data(std::aligned_alloc(page, size), &std::free);
  if (!data) throw std::bad_alloc();
  prefer_huge_pages(data.get(), size);
  std::fill_n(static_cast<char*>(data.get()), size, char{1});
  const auto read = kernels().probes.read;
  return best_rate(seconds, [&](int64_t rounds) {
    read(data.get(), bytes, rounds);
    return rounds * bytes;
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
  // As torch says it on the CPU.
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_RuntimeError, "can't allocate memory for a recurrent layer");
    }
  });
  using namespace fusedrnn;
  m.doc() = "Compiled CPU kernels. See csrc/cpu/layer.h for the contract and fusedrnn/engines/cpu.py for the use.";
  py::enum_<Layout>(m, "Layout", "How a call of `express` lies: (T, B, I), (B, T, I), or (B, I) of one step.")
      .value("time_major", Layout::time_major)
      .value("batch_first", Layout::batch_first)
      .value("one_step", Layout::one_step);
  m.def(
      "forward", &forward, py::arg("cell"), py::arg("input"), py::arg("batch_sizes"), py::arg("lengths"),
      py::arg("resets"), py::arg("hx"), py::arg("reset_state"), py::arg("weights"), py::arg("h_mask"),
      py::arg("zoneout"), py::arg("seed"), py::arg("recompute"), py::arg("sequence"), py::arg("every_state"),
      py::arg("save"), py::arg("threads"),
      "Runs a layer: [output or None, with every_state the states but h at every step, *final states, saved or None]. "
      "ValueError if the call breaks the contract.");
  m.def("express", &express, py::arg("cell"), py::arg("input"), py::arg("hx"), py::arg("weights"), py::arg("names"),
        py::arg("bias"), py::arg("projected"), py::arg("layout"), py::arg("lengths"), py::arg("grad"),
        py::arg("threads"),
        "Runs a layer: (output, h) or (output, (h, c)) as a module returns it, or of one step (h,) or (h, c); None if "
        "anything about the call is out of the ordinary. With grad, if any tensor requires a gradient, "
        "[((output, h[, c]), saved), (input, *hx, *weights in fives)].");
  m.def("express_backward", &express_backward, py::arg("cell"), py::arg("tensors"), py::arg("layout"), py::arg("saved"),
        py::arg("grads"), py::arg("needs"), py::arg("threads"),
        "Gradients of a call of express: of its tensors, None where not needed; None if anything is out of the "
        "ordinary.");
  m.def("backward", &backward, py::arg("cell"), py::arg("input"), py::arg("batch_sizes"), py::arg("lengths"),
        py::arg("resets"), py::arg("hx"), py::arg("reset_state"), py::arg("weights"), py::arg("h_mask"),
        py::arg("zoneout"), py::arg("seed"), py::arg("recompute"), py::arg("saved"), py::arg("grads"), py::arg("needs"),
        py::arg("threads"), "Gradients of input, hx, weights and reset_state, None where not needed.");
  m.def("saved_per_token", &saved_per_token, py::arg("cell"), py::arg("hidden"), py::arg("output"),
        py::arg("projected"), py::arg("recompute"), "Values that forward saves for each token and direction.");
  m.def("probe_multiply_adds", &probe_multiply_adds, py::arg("dtype"), py::arg("seconds"),
        "Floating-point operations per second of multiply-adds in registers on the calling thread; of bfloat16, with "
        "float32 sums, None where the instruction set in use has no instruction for it.");
  m.def("probe_read", &probe_read, py::arg("bytes"), py::arg("seconds"),
        "Bytes per second at which the calling thread reads so many bytes again and again.");
  m.def(
      "set_batch_invariant", [](bool enabled) { return batch_invariant.exchange(enabled); }, py::arg("enabled"),
      "Whether from now on, in the whole process, no row's values depend on how many rows there are; returns what "
      "held before.");
  m.def("is_batch_invariant", [] { return batch_invariant.load(); }, "What set_batch_invariant has set.");
  m.def("threads_left_out", &threads_left_out,
        "How many threads calls do without at the moment, because another process keeps their cores busy.");
  m.def(
      "meeting_cost",
      []() -> py::object {
        if (!meeting_cost_is_known()) return py::none();
        return py::float_(meeting_cost());
      },
      "Nanoseconds that threads took to meet when a call measured it a moment ago; None if none did.");
  m.def("assume_meeting_cost", &assume_meeting_cost, py::arg("nanoseconds"),
        "For tests: threads take so long to meet from now on, or what calls measure again if that is not positive.");
  m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");
  m.def(
      "multiplies_bfloat16", [] { return kernels().probes.dots_bf16 != nullptr; },
      "Whether the instruction set in use has products of bfloat16; else they are widened to float32.");
  m.def("isas", &isas, "Names of the instruction sets that this machine runs, best first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!use_kernels(name.c_str())) throw std::invalid_argument("this machine runs no kernels called " + name);
      },
      py::arg("name"), "Use another instruction set from now on, in the whole process.");
}

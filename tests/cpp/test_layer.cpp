// Every kernel against the reference: all instruction sets that run here, all precisions, over random layers that
// cross every tail of vectors, blocks, groups and chunks. One cell per run, named on the command line.
//
// Every buffer is a heap block of exactly its size, for AddressSanitizer; results are filled with NaN beforehand, so
// that what is left unwritten differs from the reference; gaps between rows hold NaN and must keep it.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "check.h"
#include "kernels.h"
#include "problem.h"
#include "team.h"

namespace fusedrnn {

#ifdef FUSEDRNN_TEST_WIDE
extern const Kernels wide_kernels;
#endif

namespace {

using reference::Shape;
using reference::Values;

constexpr const char* cell_names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "lstm_projected"};

// How rows of features lie in memory.
enum class Placing { time_major, batch_first, with_gaps };

struct Case {
  Shape shape;
  bool packed;
  Biases biases;
  unsigned hx, d_final, wanted;  // bits
  bool d_output, sequence;       // gradient of the output given; output wanted without saving
  Placing placing[4];            // of input, output, d_output, d_input
  bool shifted;                  // buffers aligned to a value only
  int threads;
  bool far;        // cores are far apart
  bool nested;     // called inside a parallel region, where the team is smaller than asked for
  bool recompute;  // backward computes the gates again

  std::string text() const {
    char line[256];
    const Shape& s = shape;
    std::snprintf(line, sizeof line,
                  "T=%d B=%d I=%d H=%d R=%d D=%d packed=%d biases=%d hx=%u d_output=%d d_final=%u wanted=%x "
                  "placing=%d%d%d%d shifted=%d threads=%d far=%d nested=%d recompute=%d",
                  static_cast<int>(s.T), static_cast<int>(s.B), static_cast<int>(s.I), static_cast<int>(s.H),
                  static_cast<int>(s.R), s.directions, packed, static_cast<int>(biases), hx, d_output, d_final, wanted,
                  static_cast<int>(placing[0]), static_cast<int>(placing[1]), static_cast<int>(placing[2]),
                  static_cast<int>(placing[3]), shifted, threads, far, nested, recompute);
    return line;
  }
};

// Steps and rows as the kernels are told of them.
struct Tokens {
  std::vector<int64_t> sizes, starts;
  Sequence seq;

  explicit Tokens(const Case& c) : seq{c.shape.T, c.shape.B, nullptr, nullptr} {
    if (!c.packed) return;
    starts.push_back(0);
    for (int64_t t = 0; t < c.shape.T; ++t) {
      sizes.push_back(std::count_if(c.shape.lengths.begin(), c.shape.lengths.end(), [&](int64_t n) { return n > t; }));
      starts.push_back(starts.back() + sizes.back());
    }
    seq.sizes = sizes.data(), seq.starts = starts.data();
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;
};

// Values beyond the end of every buffer, which must keep their NaN: AddressSanitizer does not watch the stores that go
// through a mask. Where it runs, the buffer is exactly of its size.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t guard = 0;
#else
constexpr int64_t guard = 64;
#endif

template <class T>
const T not_a_number = std::numeric_limits<SumOf<T>>::quiet_NaN();

// A block on the heap that starts as NaN, at an address that is every vector's, or one value later.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, bool shifted)
      : size_(size), shift_(shifted ? 1 : 0), block_(new (line) T[static_cast<size_t>(shift_ + size_ + guard)]) {
    std::fill_n(block_.get(), shift_ + size_ + guard, not_a_number<T>);
  }
  Buffer(const Values& values, bool shifted) : Buffer(static_cast<int64_t>(values.size()), shifted) {
    for (size_t k = 0; k < values.size(); ++k) data()[k] = static_cast<T>(values[k]);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    const auto changed = [](T value) { return value == value; };
    const T* end = data() + size_;
    CHECK(std::none_of(block_.get(), block_.get() + shift_, changed), "a value before a buffer is written");
    CHECK(std::none_of(end, end + guard, changed), "a value beyond a buffer is written");
  }
  T* data() const { return block_.get() + shift_; }
  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t line{64};
  struct Delete {
    void operator()(T* block) const { ::operator delete[](block, line); }
  };

  int64_t size_, shift_;
  std::unique_ptr<T[], Delete> block_;
};

// One row of features per token.
template <class T>
class TokenBuffer {
 public:
  TokenBuffer(const Tokens& tokens, int64_t features, Placing placing, bool shifted)
      : tokens_(tokens), features_(features), buffer_(place(placing), shifted) {}
  TokenBuffer(const Tokens& tokens, int64_t features, Placing placing, bool shifted, const Values& padded)
      : TokenBuffer(tokens, features, placing, shifted) {
    each([&](T* value, int64_t index) { *value = static_cast<T>(padded[static_cast<size_t>(index)]); });
  }
  TokenRows<T> rows() const { return {buffer_.data(), step_, row_}; }
  TokenRows<const T> const_rows() const { return {buffer_.data(), step_, row_}; }

  // f(value, its index in a padded tensor).
  template <class F>
  void each(F&& f) const {
    const Sequence& seq = tokens_.seq;
    for (int64_t t = 0; t < seq.T; ++t)
      for (int64_t b = 0; b < seq.size(t); ++b)
        for (int64_t k = 0; k < features_; ++k) f(rows().at(seq, t, b) + k, (t * seq.B + b) * features_ + k);
  }

  // The number of values besides NaN, gaps included.
  int64_t numbers() const {
    return std::count_if(buffer_.data(), buffer_.data() + buffer_.size(), [](T value) { return value == value; });
  }
  int64_t count() const { return tokens_.seq.tokens() * features_; }

 private:
  // Sets the strides; returns the size of the block.
  int64_t place(Placing placing) {
    const Sequence& seq = tokens_.seq;
    const int64_t gap = placing == Placing::with_gaps ? 3 : 0;
    row_ = features_ + gap;
    if (seq.sizes) return seq.tokens() ? (seq.tokens() - 1) * row_ + features_ : 0;
    step_ = seq.B * row_ + gap;
    if (placing == Placing::batch_first) step_ = row_, row_ *= seq.T;
    return seq.tokens() ? (seq.T - 1) * step_ + (seq.B - 1) * row_ + features_ : 0;
  }

  const Tokens& tokens_;
  int64_t features_, step_ = 0, row_ = 0;
  Buffer<T> buffer_;
};

// The largest error seen, in units of the precision relative to the largest value of its tensor (or to 1).
template <class T>
struct Worst {
  static inline double error = 0;
  static inline std::string where;
};

template <class T>
constexpr const char* type_name = "double";
template <>
constexpr const char* type_name<float> = "float";
template <>
constexpr const char* type_name<bf16> = "bf16";

template <class T>
constexpr double epsilon = std::numeric_limits<T>::epsilon();
template <>
constexpr double epsilon<bf16> = 0x1p-7;

// What sums of some hundred terms and a few dozen steps leave; measured, with room for other orders of addition. In
// bfloat16 sums are exact in comparison: there it is what one rounding of h at each step leaves, and of the gate
// gradients and of what is kept for them, each half a unit of its own value.
template <class T>
constexpr double tolerance = 64;
template <>
constexpr double tolerance<bf16> = 4;

class Checker {
 public:
  // Errors may be as large as it takes if `rough`; values must be there.
  Checker(const char* isa, const Case& c, bool rough) : isa_(isa), case_(c), rough_(rough) {}

  template <class T, class Each>
  void compare(const char* of, const Values& want, Each&& each) const {
    double largest = 1, worst = 0;
    for (const double v : want) largest = std::max(largest, std::fabs(v));
    int64_t at = -1;
    T got = 0;
    each([&](const T* value, int64_t index) {
      const double error = std::fabs(static_cast<double>(*value) - want[static_cast<size_t>(index)]);
      if (error <= worst) return;  // false for NaN
      if (std::isnan(worst)) return;
      worst = error, at = index, got = *value;
    });
    worst /= largest * epsilon<T>;
    if (worst > Worst<T>::error && !rough_) Worst<T>::error = worst, Worst<T>::where = of + (" of " + case_.text());
    CHECK(worst <= (rough_ ? std::numeric_limits<float>::max() : tolerance<T>),
          "%s %s: %s[%d] is %.9g, not %.9g (%.0f eps); %s", isa_, type_name<T>, of, static_cast<int>(at),
          static_cast<double>(got), want[static_cast<size_t>(at)], worst, case_.text().c_str());
  }

  template <class T>
  void tokens(const char* name, const TokenBuffer<T>& got, const Values& want) const {
    compare<T>(name, want, [&](auto&& f) { got.each(f); });
    CHECK(got.numbers() <= got.count(), "%s: %s is written between its rows; %s", isa_, name, case_.text().c_str());
  }

  template <class T>
  void values(const char* name, const Buffer<T>& got, const Values& want) const {
    CHECK(got.size() == static_cast<int64_t>(want.size()), "%s", name);
    compare<T>(name, want, [&](auto&& f) {
      for (int64_t k = 0; k < got.size(); ++k) f(got.data() + k, k);
    });
  }

  template <class T>
  void unchanged(const char* name, const Buffer<T>& input, const Values& want) const {
    bool same = true;
    for (size_t k = 0; k < want.size(); ++k) same &= input.data()[k] == static_cast<T>(want[k]);
    CHECK(same, "%s: %s was written to; %s", isa_, name, case_.text().c_str());
  }

  template <class T>
  void unchanged(const char* name, const TokenBuffer<T>& input, const Values& want) const {
    bool same = input.numbers() == input.count();
    input.each([&](T* value, int64_t index) { same &= *value == static_cast<T>(want[static_cast<size_t>(index)]); });
    CHECK(same, "%s: %s was written to; %s", isa_, name, case_.text().c_str());
  }

 private:
  const char* isa_;
  const Case& case_;
  const bool rough_;
};

constexpr const char* weight_names[] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};

// One direction's weights, or their gradients.
template <class T>
struct WeightBuffers {
  std::unique_ptr<Buffer<T>> buffer[5];

  static const Values& member(const reference::Weights& w, int k) {
    const Values* members[] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr};
    return *members[k];
  }
  template <class Value>
  Weights<Value> view() const {
    const auto at = [&](int k) -> Value* { return buffer[k] ? buffer[k]->data() : nullptr; };
    return {at(0), at(1), at(2), at(3), at(4)};
  }
};

// Calls f, in a team of one if so wanted: inside a region of two threads there are no others to have.
template <class F>
void call(bool nested, F&& f) {
  if (!nested) return f();
  run_team(
      2,
      [](void* context, const Team& team) {
        if (team.rank == 0) (*static_cast<F*>(context))();
      },
      &f);
}

// The buffers of one case in one precision, and the calls.
template <class T>
class Run {
 public:
  Run(const Kernels& kernels, const Case& c, const Problem& p)
      : functions_(table(kernels)[static_cast<int>(c.shape.cell)]),
        case_(c),
        p_(p),
        s_(c.shape),
        check_(kernels.name, c, false),
        // The slope of a ReLU is either of two wherever what it is applied to is within rounding of zero, which in
        // bfloat16 cannot be avoided.
        check_gradients_(kernels.name, c, sizeof(T) == 2 && s_.cell == CellKind::rnn_relu),
        tokens_(c),
        input_(tokens_, s_.I, c.placing[0], c.shifted, p.inputs.x) {
    for (int k = 0; k < s_.states(); ++k) {
      if (c.hx >> k & 1) hx_[k] = std::make_unique<Buffer<T>>(p.inputs.hx[k], c.shifted);
      if (c.d_final >> k & 1) d_final_[k] = std::make_unique<Buffer<T>>(p.given.final[k], c.shifted);
    }
    if (c.d_output)
      d_output_ = std::make_unique<TokenBuffer<T>>(tokens_, width(), c.placing[2], c.shifted, p.given.output);
    for (int d = 0; d < s_.directions; ++d)
      for (int k = 0; k < 5; ++k)
        if (!weight(d, k).empty()) weights_[d].buffer[k] = std::make_unique<Buffer<T>>(weight(d, k), c.shifted);
  }

  void run() {
    const CellFacts& facts = cell_facts[static_cast<int>(s_.cell)];
    const Buffer<T> saved(s_.directions * saved_size(case_.recompute ? 0 : facts.kept, facts.states,
                                                     tokens_.seq.tokens(), s_.H, s_.R, s_.projected),
                          case_.shifted);
    forward(true, saved.data());
    const bool filled = std::none_of(saved.data(), saved.data() + saved.size(), [](T value) { return value != value; });
    CHECK(filled, "not all is saved; %s", case_.text().c_str());
    forward(case_.sequence, nullptr);
    const std::vector<T> before(saved.data(), saved.data() + saved.size());
    backward(~0u, saved.data());
    backward(case_.wanted, saved.data());
    CHECK(std::equal(before.begin(), before.end(), saved.data()), "saved was written to; %s", case_.text().c_str());
    check_.unchanged("input", input_, p_.inputs.x);
    if (d_output_) check_.unchanged("d_output", *d_output_, p_.given.output);
    for (int k = 0; k < s_.states(); ++k) {
      if (hx_[k]) check_.unchanged("hx", *hx_[k], p_.inputs.hx[k]);
      if (d_final_[k]) check_.unchanged("d_final", *d_final_[k], p_.given.final[k]);
    }
    for (int d = 0; d < s_.directions; ++d)
      for (int k = 0; k < 5; ++k)
        if (weights_[d].buffer[k]) check_.unchanged(weight_names[k], *weights_[d].buffer[k], weight(d, k));
  }

 private:
  static const Functions<T>* table(const Kernels& kernels) {
    if constexpr (sizeof(T) == 2) return kernels.bf16_;
    if constexpr (sizeof(T) == 4) return kernels.single_;
    if constexpr (sizeof(T) == 8) return kernels.double_;
  }

  int64_t width() const { return s_.directions * s_.R; }
  const Values& weight(int d, int k) const { return WeightBuffers<T>::member(p_.inputs.weights[d], k); }

  void fill(Layer<T>& layer) const {
    layer.seq = tokens_.seq;
    layer.I = s_.I, layer.H = s_.H, layer.R = s_.R;
    layer.directions = s_.directions;
    layer.projected = s_.projected;
    layer.recompute = case_.recompute;
    layer.input = input_.const_rows();
    for (int k = 0; k < s_.states(); ++k) layer.hx[k] = hx_[k] ? hx_[k]->data() : nullptr;
    for (int d = 0; d < s_.directions; ++d) layer.weights[d] = weights_[d].template view<const T>();
  }

  std::unique_ptr<Buffer<T>> state(int k) const {
    return std::make_unique<Buffer<T>>(s_.directions * s_.B * s_.state_width(k), case_.shifted);
  }

  void forward(bool sequence, T* saved) const {
    Forward<T> args{};
    fill(args);
    const TokenBuffer<T> output(tokens_, width(), case_.placing[1], case_.shifted);
    if (sequence) args.output = output.rows();
    args.saved = saved;
    std::unique_ptr<Buffer<T>> final[max_states];
    for (int k = 0; k < s_.states(); ++k) final[k] = state(k), args.final[k] = final[k]->data();
    call(case_.nested, [&] { functions_.forward(args, case_.threads); });
    if (sequence) check_.tokens("output", output, p_.outputs.output);
    for (int k = 0; k < s_.states(); ++k) check_.values(k ? "final c" : "final h", *final[k], p_.outputs.final[k]);
  }

  // Bits of `wanted`: d_input, d_hx, then the weights of each direction.
  void backward(unsigned wanted, const T* saved) const {
    Backward<T> args{};
    fill(args);
    args.saved = saved;
    if (d_output_) args.d_output = d_output_->const_rows();
    const TokenBuffer<T> d_input(tokens_, s_.I, case_.placing[3], case_.shifted);
    if (wanted & 1) args.d_input = d_input.rows();
    std::unique_ptr<Buffer<T>> d_hx[max_states];
    for (int k = 0; k < s_.states(); ++k) {
      args.d_final[k] = d_final_[k] ? d_final_[k]->data() : nullptr;
      if (wanted >> (1 + k) & 1) d_hx[k] = state(k), args.d_hx[k] = d_hx[k]->data();
    }
    WeightBuffers<T> d_weights[max_directions];
    for (int d = 0; d < s_.directions; ++d) {
      for (int k = 0; k < 5; ++k)
        if (wanted >> (3 + 5 * d + k) & 1 && !weight(d, k).empty())
          d_weights[d].buffer[k] =
              std::make_unique<Buffer<T>>(static_cast<int64_t>(weight(d, k).size()), case_.shifted);
      args.d_weights[d] = d_weights[d].template view<T>();
    }
    call(case_.nested, [&] { functions_.backward(args, case_.threads); });
    if (wanted & 1) check_gradients_.tokens("d_input", d_input, p_.gradients.x);
    for (int k = 0; k < s_.states(); ++k)
      if (d_hx[k]) check_gradients_.values(k ? "d_c" : "d_h", *d_hx[k], p_.gradients.hx[k]);
    for (int d = 0; d < s_.directions; ++d)
      for (int k = 0; k < 5; ++k)
        if (d_weights[d].buffer[k])
          check_gradients_.values(weight_names[k], *d_weights[d].buffer[k],
                                  WeightBuffers<T>::member(p_.gradients.weights[d], k));
  }

  const Functions<T>& functions_;
  const Case& case_;
  const Problem& p_;
  const Shape& s_;
  const Checker check_, check_gradients_;
  const Tokens tokens_;
  const TokenBuffer<T> input_;
  std::unique_ptr<Buffer<T>> hx_[max_states], d_final_[max_states];
  std::unique_ptr<TokenBuffer<T>> d_output_;
  WeightBuffers<T> weights_[max_directions];
};

// Draws cases of one cell.
class Cases {
 public:
  Cases(CellKind cell, bool projected)
      : cell_(cell), projected_(projected), random_(projected ? 100 : static_cast<uint64_t>(cell)) {}

  // Sizes on both sides of every multiple of vectors and blocks.
  void small() { test(draw(steps_.draw(random_), batches_.draw(random_), sizes_.draw(random_), sizes_.draw(random_))); }

  // Enough work for a team, divided by rows or by units.
  void large() {
    const int64_t B = large_batches_.draw(random_), I = large_inputs_.draw(random_), H = large_sizes_.draw(random_);
    Case c = draw(1, B, I, H);
    const double step = static_cast<double>(B * (I + c.shape.R) * c.shape.gates() * H * c.shape.directions);
    c.shape.T = std::clamp<int64_t>(static_cast<int64_t>(2e6 / step), 3, 40);
    set_lengths(c);
    c.threads = large_threads_.draw(random_);
    c.far = random_.coin();
    c.nested = nested_.draw(random_);
    assume_meeting_cost(c.far ? 1000 : 0);
    test(c);
    assume_meeting_cost(0);
  }

  // More tokens than a chunk of steps has room for, and a step with more than a slice of them.
  void large_batch() { test(draw(3, 600, 8, 9)); }
  void many_steps() { test(draw(45, 30, 17, 3)); }

  // So much to keep for backward that it is written past the caches, of any type of values.
  void much_kept() {
    constexpr int64_t B = 30, H = 64, past_caches = 1 << 21;
    Case c = draw(1, B, 8, H);
    if (projected_) c.shape.R = 32;
    c.shape.T = 1 + past_caches / (2 * B * H * (c.shape.gates() > 1 ? 5 : 1));
    c.shifted = c.recompute = false;
    set_lengths(c);
    test(c);
  }

  // A product of one row with more weights than are worth packing.
  void one_row() {
    Case c = draw(9, 1, 3, projected_ ? 9 : 1030);
    if (projected_) c.shape.R = 1030;
    c.shape.directions = 1;
    test(c);
  }

 private:
  Case draw(int64_t T, int64_t B, int64_t I, int64_t H) {
    Case c{};
    c.shape = {cell_, T, B, I, H, projected_ ? outputs_.draw(random_) : H, directions_.draw(random_), projected_, {}};
    c.packed = packed_.draw(random_) && B > 0;
    c.biases = biases_.draw(random_);
    c.hx = static_cast<unsigned>(random_.below(4)), c.d_final = static_cast<unsigned>(random_.below(4));
    c.wanted = static_cast<unsigned>(random_.below(1 << 13));
    c.d_output = random_.below(4) > 0, c.sequence = random_.coin();
    for (Placing& placing : c.placing) placing = placings_.draw(random_);
    c.shifted = random_.coin();
    c.threads = threads_.draw(random_);
    c.recompute = recompute_.draw(random_);
    set_lengths(c);
    return c;
  }

  void set_lengths(Case& c) {
    const int64_t T = c.shape.T, B = c.shape.B;
    c.shape.lengths = c.packed ? falling_lengths(random_, T, B) : std::vector<int64_t>(static_cast<size_t>(B), T);
  }

  void test(const Case& c) {
    const auto make = [&] { return make_problem(random_, c.shape, c.biases, c.hx, c.d_output, c.d_final); };
    const Problem p = make();
    random_.narrow = true;
    const Problem narrow = make();
    random_.narrow = false;
    const auto run = [&](const Kernels& kernels) {
      Run<float>(kernels, c, p).run();
      Run<double>(kernels, c, p).run();
      Run<bf16>(kernels, c, narrow).run();
    };
    for (const Kernels* const* k = available_kernels(); *k; ++k) run(**k);
#ifdef FUSEDRNN_TEST_WIDE
    if (wide_kernels.runs_here()) run(wide_kernels);
#endif
  }

  const CellKind cell_;
  const bool projected_;
  Random random_;
  Bag<int64_t> steps_{1, 2, 9}, batches_{0, 1, 2, 3, 5, 7, 13, 30}, sizes_{1, 3, 8, 17, 32, 33, 65, 70, 100};
  Bag<int64_t> outputs_{1, 3, 8, 17, 33, 65}, large_batches_{1, 3, 7, 8, 13, 30};
  Bag<int64_t> large_inputs_{17, 64, 70, 300}, large_sizes_{33, 64, 70, 130};
  Bag<int> directions_{1, 2}, threads_{1, 2, 3}, large_threads_{2, 3};
  Bag<bool> packed_{false, true}, recompute_{false, true}, nested_{false, false, false, true};
  Bag<Biases> biases_{Biases::none, Biases::both, Biases::both, Biases::input, Biases::recurrent};
  Bag<Placing> placings_{Placing::time_major, Placing::batch_first, Placing::with_gaps};
};

}  // namespace
}  // namespace fusedrnn

int main(int count, char** arguments) {
  using namespace fusedrnn;
  const std::string wanted = count > 1 ? arguments[1] : "";
  const auto* name = std::find(std::begin(cell_names), std::end(cell_names), wanted);
  if (name == std::end(cell_names)) return std::printf("usage: test_layer CELL\n"), 2;

  // Brings the OpenMP runtime into the process, where run_team finds it: else every case would run on one thread.
  omp_set_dynamic(0);
  int size = 0;
  run_team(
      3,
      [](void* seen, const Team& team) {
        if (team.rank == 0) *static_cast<int*>(seen) = team.size;
      },
      &size);
  CHECK(size == 3, "teams are of %d", size);

  const bool projected = wanted == "lstm_projected";
  Cases cases(projected ? CellKind::lstm : static_cast<CellKind>(name - cell_names), projected);
  for (int k = 0; k < 200; ++k) cases.small();
  for (int k = 0; k < 16; ++k) cases.large();
  for (int k = 0; k < 2; ++k) cases.large_batch(), cases.many_steps();
  cases.one_row();
  for (int k = 0; k < 2; ++k) cases.much_kept();
  const auto print = [](auto zero) {
    using T = decltype(zero);
    std::printf("largest error: %s %.1f eps in %s\n", type_name<T>, Worst<T>::error, Worst<T>::where.c_str());
  };
  print(0.f), print(0.), print(bf16(0.f));
  return check::result();
}

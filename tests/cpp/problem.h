// Random layers, with inputs that are exact in single precision, so that one reference serves both float and double, or
// in bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "bf16.h"
#include "reference.h"

// Reproducible on every platform, which the distributions of <random> are not.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool coin() { return below(2) == 1; }
  // In (-scale, scale), a single-precision value, or one of bfloat16.
  double value(double scale) {
    const double unit = static_cast<double>(engine_() >> 11) * 0x1p-53;
    const auto drawn = static_cast<float>(scale * (2 * unit - 1));
    return narrow ? static_cast<float>(fusedrnn::bf16(drawn)) : drawn;
  }
  reference::Values values(int64_t count, double scale) {
    reference::Values result(static_cast<size_t>(count));
    for (double& v : result) v = value(scale);
    return result;
  }

  bool narrow = false;  // whether values are of bfloat16

 private:
  std::mt19937_64 engine_;
};

// Draws each of its values equally often, in random order.
template <class Value>
class Bag {
 public:
  Bag(std::initializer_list<Value> values) : values_(values) {}
  Value draw(Random& random) {
    if (left_.empty()) left_ = values_;
    const auto at = left_.begin() + random.below(static_cast<int64_t>(left_.size()));
    const Value value = *at;
    left_.erase(at);
    return value;
  }

 private:
  std::vector<Value> values_, left_;
};

// Non-rising lengths from T down to at least 1.
inline std::vector<int64_t> falling_lengths(Random& random, int64_t T, int64_t B) {
  std::vector<int64_t> drop(static_cast<size_t>(T)), lengths;
  for (int64_t b = 1; b < B; ++b) ++drop[static_cast<size_t>(random.below(T))];
  if (B > 0) lengths.push_back(T);
  for (int64_t t = T; t > 0; --t)
    lengths.insert(lengths.end(), static_cast<size_t>(drop[static_cast<size_t>(t - 1)]), t);
  return lengths;
}

enum class Biases { none, both, input, recurrent };

struct Problem {
  reference::Shape shape;
  reference::Inputs inputs;
  reference::OutputGradients given;
  reference::Outputs outputs;
  reference::InputGradients gradients;
};

// The slope of a ReLU steps at zero: what comes nearer than this is on either side, depending on how sums are rounded.
constexpr double kink = 2e-5;

// Draws a token's input again wherever a sum that a ReLU is applied to is within rounding of its kink.
inline void avoid_kinks(Random& random, const reference::Shape& s, reference::Inputs& in) {
  for (bool again = true; again;) {
    again = false;
    const reference::Values sums = reference::run(s, in).sums;
    for (int64_t token = 0; token < s.T * s.B; ++token) {
      bool near = false;
      for (int64_t j = 0; j < s.directions * s.H; ++j) {
        const double sum = sums[static_cast<size_t>(token * s.directions * s.H + j)];
        near |= sum != 0 && std::fabs(sum) < kink;
      }
      if (!near) continue;
      again = true;
      for (int64_t k = 0; k < s.I; ++k) in.x[static_cast<size_t>(token * s.I + k)] = random.value(1);
    }
  }
}

// hx and d_final: which states have an initial value, which final ones a gradient, as bits.
inline Problem make_problem(Random& random, const reference::Shape& s, Biases biases, unsigned hx, bool d_output,
                            unsigned d_final) {
  const int64_t GH = s.gates() * s.H, D = s.directions;
  Problem p{s, {}, {}, {}, {}};
  // Gates neither all saturated nor all linear, and an Elman network that does not blow up.
  const double scale = 1.5 / std::sqrt(static_cast<double>(s.R));
  p.inputs.x = random.values(s.T * s.B * s.I, 1);
  for (int k = 0; k < s.states(); ++k) {
    if (hx >> k & 1) p.inputs.hx[k] = random.values(D * s.B * s.state_width(k), 1);
    if (d_final >> k & 1) p.given.final[k] = random.values(D * s.B * s.state_width(k), 1);
  }
  if (d_output) p.given.output = random.values(s.T * s.B * D * s.R, 1);
  for (int d = 0; d < D; ++d) {
    reference::Weights& w = p.inputs.weights[d];
    w.w_ih = random.values(GH * s.I, 1.5 / std::sqrt(static_cast<double>(s.I)));
    w.w_hh = random.values(GH * s.R, scale);
    if (biases == Biases::both || biases == Biases::input) w.b_ih = random.values(GH, scale);
    if (biases == Biases::both || biases == Biases::recurrent) w.b_hh = random.values(GH, scale);
    if (s.projected) w.w_hr = random.values(s.R * s.H, 1.5 / std::sqrt(static_cast<double>(s.H)));
  }
  if (s.cell == reference::CellKind::rnn_relu) avoid_kinks(random, s, p.inputs);
  p.outputs = reference::run(s, p.inputs, &p.given, &p.gradients);
  return p;
}

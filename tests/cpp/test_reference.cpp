// The reference's gradients against central differences of its outputs.
#include "check.h"
#include "problem.h"

namespace {

using namespace reference;

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t k = 0; k < a.size(); ++k) sum += a[k] * b[k];
  return sum;
}

double loss(const Problem& p) {
  const Outputs out = run(p.shape, p.inputs);
  double sum = dot(p.given.output, out.output);
  for (int s = 0; s < p.shape.states(); ++s) sum += dot(p.given.final[s], out.final[s]);
  return sum;
}

void compare(Problem& p, const char* name, Values& inputs, const Values& gradients) {
  CHECK(inputs.size() == gradients.size(), "%s", name);
  constexpr double step = 1e-5;
  for (size_t k = 0; k < inputs.size(); ++k) {
    const double old = inputs[k];
    inputs[k] = old + step;
    const double above = loss(p);
    inputs[k] = old - step;
    const double below = loss(p);
    inputs[k] = old;
    const double difference = (above - below) / (2 * step);
    CHECK(std::fabs(difference - gradients[k]) < 1e-8, "%s[%zu] of cell %d: %g, by differences %g", name, k,
          static_cast<int>(p.shape.cell), gradients[k], difference);
  }
}

}  // namespace

int main() {
  Random random(1);
  for (int cell = 0; cell < static_cast<int>(CellKind::count); ++cell)
    for (const bool projected : {false, true}) {
      if (projected && static_cast<CellKind>(cell) != CellKind::lstm) continue;
      const Shape shape{static_cast<CellKind>(cell), 4, 3, 2, 3, projected ? 2 : 3, 2, projected, {4, 3, 1}};
      Problem p = make_problem(random, shape, Biases::both, 3, true, 3);
      compare(p, "x", p.inputs.x, p.gradients.x);
      for (int s = 0; s < shape.states(); ++s) compare(p, "hx", p.inputs.hx[s], p.gradients.hx[s]);
      for (int d = 0; d < shape.directions; ++d) {
        Weights& w = p.inputs.weights[d];
        const Weights& dw = p.gradients.weights[d];
        compare(p, "w_ih", w.w_ih, dw.w_ih);
        compare(p, "w_hh", w.w_hh, dw.w_hh);
        compare(p, "b_ih", w.b_ih, dw.b_ih);
        compare(p, "b_hh", w.b_hh, dw.b_hh);
        compare(p, "w_hr", w.w_hr, dw.w_hr);
      }
    }
  return check::result();
}

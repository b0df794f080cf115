// A recurrent layer in plain double loops, forward and backward, one sequence at a time: what the kernels are compared
// with. It shares nothing with them but the names of the cells. Everything is padded: row b of (T, B, features) has
// lengths[b] steps, and what lies behind them is ignored or zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "layer.h"

namespace reference {

using fusedrnn::CellKind;
using Values = std::vector<double>;

struct Shape {
  CellKind cell;
  int64_t T, B, I, H, R;  // R is the width of the output h: H unless projected
  int directions;
  bool projected;
  std::vector<int64_t> lengths;

  int64_t gates() const { return cell == CellKind::lstm ? 4 : cell == CellKind::gru ? 3 : 1; }
  int states() const { return cell == CellKind::lstm ? 2 : 1; }
  int64_t state_width(int s) const { return s == 0 ? R : H; }
};

// Of one direction, as torch lays them out; empty where the layer has none.
struct Weights {
  Values w_ih, w_hh, b_ih, b_hh, w_hr;
};

struct Inputs {
  Values x;      // (T, B, I)
  Values hx[2];  // (D, B, width) per state; empty for zeros
  Weights weights[2];
};

struct Outputs {
  Values output;    // (T, B, D*R)
  Values final[2];  // (D, B, width) per state
  Values sums;      // (T, B, D*H), of an Elman network alone: what its activation is applied to
};

// Gradients of a scalar: those of the outputs are given (empty for zeros), those of the inputs are computed.
struct OutputGradients {
  Values output, final[2];
};
using InputGradients = Inputs;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// What one step of one sequence leaves for the way back.
struct Step {
  Values h_before, c_before;
  Values gate[4];    // activated, in torch's order; an Elman network's only one is its new h
  Values product_n;  // GRU: W_hh h + b_hh of gate n
  Values cell_h, c;  // new states before a projection
};

inline Values times(const Values& matrix, const double* vector, int64_t rows, int64_t columns, const Values& bias) {
  Values result(rows);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = bias.empty() ? 0 : bias[r];
    for (int64_t c = 0; c < columns; ++c) sum += matrix[r * columns + c] * vector[c];
    result[r] = sum;
  }
  return result;
}

inline Values transpose_times(const Values& matrix, const Values& vector, int64_t rows, int64_t columns) {
  Values result(columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) result[c] += matrix[r * columns + c] * vector[r];
  return result;
}

inline void add_outer(Values& matrix, const Values& column, const double* row, int64_t columns) {
  for (size_t r = 0; r < column.size(); ++r)
    for (int64_t c = 0; c < columns; ++c) matrix[r * columns + c] += column[r] * row[c];
}

inline void add(Values& to, const Values& from) {
  for (size_t k = 0; k < to.size(); ++k) to[k] += from[k];
}

// Direction d of row b through all its steps. `given` null: forward alone. Else adds the gradients to `gradients`.
inline void run_row(const Shape& s, const Inputs& in, int d, int64_t b, Outputs& out, const OutputGradients* given,
                    InputGradients* gradients) {
  const int64_t I = s.I, H = s.H, R = s.R, G = s.gates(), D = s.directions, length = s.lengths[b];
  const Weights& w = in.weights[d];
  const auto time = [&](int64_t i) { return d == 0 ? i : length - 1 - i; };
  const auto initial = [&](const Values& states, int64_t width) {
    if (states.empty()) return Values(width);
    return Values(&states[(d * s.B + b) * width], &states[(d * s.B + b) * width] + width);
  };
  Values h = initial(in.hx[0], R), c = initial(in.hx[1], s.states() > 1 ? H : 0);
  std::vector<Step> steps(length);
  for (int64_t i = 0; i < length; ++i) {
    Step& step = steps[i];
    step.h_before = h, step.c_before = c;
    const Values x = times(w.w_ih, &in.x[(time(i) * s.B + b) * I], G * H, I, w.b_ih);
    const Values r = times(w.w_hh, h.data(), G * H, R, w.b_hh);
    for (Values& gate : step.gate) gate.resize(H);
    step.product_n.resize(H), step.cell_h.resize(H), step.c.resize(c.size());
    for (int64_t j = 0; j < H; ++j) {
      const auto x_of = [&](int64_t g) { return x[g * H + j]; };
      const auto r_of = [&](int64_t g) { return r[g * H + j]; };
      if (s.cell == CellKind::rnn_tanh || s.cell == CellKind::rnn_relu) {
        const double sum = x_of(0) + r_of(0);
        out.sums[((time(i) * s.B + b) * D + d) * H + j] = sum;
        step.cell_h[j] = s.cell == CellKind::rnn_tanh ? std::tanh(sum) : sum > 0 ? sum : 0;
      } else if (s.cell == CellKind::lstm) {
        for (int64_t g = 0; g < 4; ++g)
          step.gate[g][j] = g == 2 ? std::tanh(x_of(g) + r_of(g)) : sigmoid(x_of(g) + r_of(g));
        step.c[j] = step.gate[1][j] * c[j] + step.gate[0][j] * step.gate[2][j];
        step.cell_h[j] = step.gate[3][j] * std::tanh(step.c[j]);
      } else {
        for (int64_t g = 0; g < 2; ++g) step.gate[g][j] = sigmoid(x_of(g) + r_of(g));
        step.product_n[j] = r_of(2);
        step.gate[2][j] = std::tanh(x_of(2) + step.gate[0][j] * r_of(2));
        step.cell_h[j] = (1 - step.gate[1][j]) * step.gate[2][j] + step.gate[1][j] * h[j];
      }
    }
    h = s.projected ? times(w.w_hr, step.cell_h.data(), R, H, {}) : step.cell_h;
    c = step.c;
    for (int64_t j = 0; j < R; ++j) out.output[((time(i) * s.B + b) * D + d) * R + j] = h[j];
  }
  for (int64_t j = 0; j < R; ++j) out.final[0][(d * s.B + b) * R + j] = h[j];
  for (size_t j = 0; j < c.size(); ++j) out.final[1][(d * s.B + b) * H + j] = c[j];
  if (!given) return;

  Weights& dw = gradients->weights[d];
  Values dh = initial(given->final[0], R), dc = initial(given->final[1], s.states() > 1 ? H : 0);
  for (int64_t i = length - 1; i >= 0; --i) {
    const Step& step = steps[i];
    const double* x = &in.x[(time(i) * s.B + b) * I];
    if (!given->output.empty())
      for (int64_t j = 0; j < R; ++j) dh[j] += given->output[((time(i) * s.B + b) * D + d) * R + j];
    Values d_cell_h = dh;
    if (s.projected) {
      add_outer(dw.w_hr, dh, step.cell_h.data(), H);
      d_cell_h = transpose_times(w.w_hr, dh, R, H);
    }
    Values da(G * H), db(G * H);  // gradients of the two products, W_ih x + b_ih and W_hh h + b_hh
    Values direct(R);             // gradient of the old h besides that through the products
    for (int64_t j = 0; j < H; ++j) {
      const double up = d_cell_h[j];
      if (s.cell == CellKind::rnn_tanh) {
        da[j] = db[j] = up * (1 - step.cell_h[j] * step.cell_h[j]);
      } else if (s.cell == CellKind::rnn_relu) {
        da[j] = db[j] = step.cell_h[j] > 0 ? up : 0;
      } else if (s.cell == CellKind::lstm) {
        const double gi = step.gate[0][j], gf = step.gate[1][j], gg = step.gate[2][j], go = step.gate[3][j];
        const double t = std::tanh(step.c[j]), total = dc[j] + up * go * (1 - t * t);
        const double activated[] = {total * gg, total * step.c_before[j], total * gi, up * t};
        const double slope[] = {gi * (1 - gi), gf * (1 - gf), 1 - gg * gg, go * (1 - go)};
        for (int64_t g = 0; g < 4; ++g) da[g * H + j] = db[g * H + j] = activated[g] * slope[g];
        dc[j] = total * gf;
      } else {
        const double gr = step.gate[0][j], gz = step.gate[1][j], gn = step.gate[2][j];
        const double dn = up * (1 - gz) * (1 - gn * gn);
        da[j] = db[j] = dn * step.product_n[j] * gr * (1 - gr);
        da[H + j] = db[H + j] = up * (step.h_before[j] - gn) * gz * (1 - gz);
        da[2 * H + j] = dn;
        db[2 * H + j] = dn * gr;
        direct[j] = up * gz;
      }
    }
    add_outer(dw.w_ih, da, x, I);
    add_outer(dw.w_hh, db, step.h_before.data(), R);
    add(dw.b_ih, da);
    add(dw.b_hh, db);
    const Values dx = transpose_times(w.w_ih, da, G * H, I);
    for (int64_t k = 0; k < I; ++k) gradients->x[(time(i) * s.B + b) * I + k] += dx[k];
    dh = transpose_times(w.w_hh, db, G * H, R);
    add(dh, direct);
  }
  for (int64_t j = 0; j < R; ++j) gradients->hx[0][(d * s.B + b) * R + j] = dh[j];
  for (size_t j = 0; j < dc.size(); ++j) gradients->hx[1][(d * s.B + b) * H + j] = dc[j];
}

inline Outputs run(const Shape& s, const Inputs& in, const OutputGradients* given = nullptr,
                   InputGradients* gradients = nullptr) {
  const bool elman = s.cell == CellKind::rnn_tanh || s.cell == CellKind::rnn_relu;
  Outputs out;
  out.output.resize(s.T * s.B * s.directions * s.R);
  if (elman) out.sums.resize(s.T * s.B * s.directions * s.H);
  for (int k = 0; k < s.states(); ++k) out.final[k].resize(s.directions * s.B * s.state_width(k));
  if (gradients) {
    gradients->x.resize(in.x.size());
    for (int k = 0; k < s.states(); ++k) gradients->hx[k].resize(s.directions * s.B * s.state_width(k));
    for (int d = 0; d < s.directions; ++d) {
      Weights& to = gradients->weights[d];
      const Weights& from = in.weights[d];
      to.w_ih.resize(from.w_ih.size()), to.w_hh.resize(from.w_hh.size()), to.w_hr.resize(from.w_hr.size());
      to.b_ih.resize(from.b_ih.size()), to.b_hh.resize(from.b_hh.size());
    }
  }
  for (int d = 0; d < s.directions; ++d)
    for (int64_t b = 0; b < s.B; ++b) run_row(s, in, d, b, out, given, gradients);
  return out;
}

}  // namespace reference

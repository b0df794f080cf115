// How products are made, for each Arithmetic: of 16 rows of weights with 8 columns of h, block of 64 bytes by block.
//
// Four threads share a row of weights and a column of h: lane l has the (l % 4)-th 16 bytes of each block, of rows
// r = l / 4 and r + 8. Which values of a sum meet in one multiplication does not matter as long as both operands agree,
// so 16 neighbouring bytes serve as operands of two tensor-core instructions, and nothing is ever transposed.
//
// All end with the sums of a 16 x 8 tile spread over the warp as a tensor core leaves them: a thread has rows r, r, r +
// 8, r + 8 and columns 2q, 2q + 1, 2q, 2q + 1, where q = l % 4.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fusedrnn::cuda {

constexpr int tile_sums = 4;

// A thread's share of one block of a tile's rows.
struct Rows {
  Words low, high;  // rows r and r + 8
};

template <class Instruction>
struct OnTensorCores {
  using Real = float;
  static constexpr int sums = tile_sums;
  static constexpr int ahead = 8;  // blocks of columns that a thread may have under way

  // A thread's share of one block of 8 columns: its own column r.
  static constexpr int column_words = 1;
  FUSEDRNN_DEVICE static int column(int lane, int) { return lane / 4; }

  FUSEDRNN_DEVICE static void multiply(float (&c)[sums], const Rows& a, const Words* h) {
    const Words &x = a.low, &y = a.high;
    Instruction::multiply(c, x.w[0], y.w[0], x.w[1], y.w[1], h->w[0], h->w[1]);
    Instruction::multiply(c, x.w[2], y.w[2], x.w[3], y.w[3], h->w[2], h->w[3]);
  }

  FUSEDRNN_DEVICE static void finish(float (&result)[tile_sums], const float (&c)[sums], int) {
    FUSEDRNN_UNROLL
    for (int i = 0; i < tile_sums; ++i) result[i] = c[i];
  }
};

// By multiply-adds: each thread adds up its quarter of rows r and r + 8 for all 8 columns; at the end the four threads
// of a row exchange what they have.
template <class Scalar>
struct OnScalarUnits {
  using Real = Scalar;
  static constexpr int sums = 2 * columns;
  static constexpr int ahead = 2;

  static constexpr int column_words = columns;
  FUSEDRNN_DEVICE static int column(int, int n) { return n; }

  FUSEDRNN_DEVICE static float dot(float sum, const Words& a, const Words& b) {
    FUSEDRNN_UNROLL
    for (int i = 0; i < 4; ++i) sum += float_of(a.w[i]) * float_of(b.w[i]);
    return sum;
  }
  FUSEDRNN_DEVICE static double dot(double sum, const Words& a, const Words& b) {
    FUSEDRNN_UNROLL
    for (int i = 0; i < 4; i += 2) sum += double_of(a.w[i], a.w[i + 1]) * double_of(b.w[i], b.w[i + 1]);
    return sum;
  }

  FUSEDRNN_DEVICE static void multiply(Real (&c)[sums], const Rows& a, const Words* h) {
    FUSEDRNN_UNROLL
    for (int n = 0; n < columns; ++n) {
      c[n] = dot(c[n], a.low, h[n]);
      c[columns + n] = dot(c[columns + n], a.high, h[n]);
    }
  }

  FUSEDRNN_DEVICE static void finish(Real (&result)[tile_sums], const Real (&c)[sums], int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    FUSEDRNN_UNROLL
    for (int row = 0; row < 2; ++row) {
      Real half[4];
      FUSEDRNN_UNROLL
      for (int n = 0; n < 4; ++n) {
        const Real low = c[row * columns + n], high = c[row * columns + n + 4];
        half[n] = (upper ? high : low) + shuffle_xor(upper ? low : high, 2);
      }
      FUSEDRNN_UNROLL
      for (int n = 0; n < 2; ++n)
        result[2 * row + n] = (odd ? half[n + 2] : half[n]) + shuffle_xor(odd ? half[n] : half[n + 2], 1);
    }
  }
};

struct Bf16Instruction {
  FUSEDRNN_DEVICE static void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
    multiply_bf16(c, a0, a1, a2, a3, b0, b1);
  }
};
struct F16Instruction {
  FUSEDRNN_DEVICE static void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
    multiply_f16(c, a0, a1, a2, a3, b0, b1);
  }
};
struct Tf32Instruction {
  FUSEDRNN_DEVICE static void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
    multiply_tf32(c, a0, a1, a2, a3, b0, b1);
  }
};

// Value is the type in memory; `operand` rounds a weight or an h to what is multiplied.
struct Bf16 : OnTensorCores<Bf16Instruction> {
  using Value = bf16;
  static constexpr Arithmetic kind = Arithmetic::bf16;
  FUSEDRNN_DEVICE static Value operand(float x) { return convert<bf16>(x); }
  FUSEDRNN_DEVICE static Rows weights(const Rows& rows) { return rows; }
};
struct F16 : OnTensorCores<F16Instruction> {
  using Value = f16;
  static constexpr Arithmetic kind = Arithmetic::f16;
  FUSEDRNN_DEVICE static Value operand(float x) { return convert<f16>(x); }
  FUSEDRNN_DEVICE static Rows weights(const Rows& rows) { return rows; }
};
struct Tf32 : OnTensorCores<Tf32Instruction> {
  using Value = float;
  static constexpr Arithmetic kind = Arithmetic::tf32;
  FUSEDRNN_DEVICE static Value operand(float x) { return to_tf32(x); }
  FUSEDRNN_DEVICE static Rows weights(const Rows& rows) {
    Rows result;
    FUSEDRNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      result.low.w[i] = bits_of(to_tf32(float_of(rows.low.w[i])));
      result.high.w[i] = bits_of(to_tf32(float_of(rows.high.w[i])));
    }
    return result;
  }
};
struct F32 : OnScalarUnits<float> {
  using Value = float;
  static constexpr Arithmetic kind = Arithmetic::f32;
  FUSEDRNN_DEVICE static Value operand(float x) { return x; }
  FUSEDRNN_DEVICE static Rows weights(const Rows& rows) { return rows; }
};
struct F64 : OnScalarUnits<double> {
  using Value = double;
  static constexpr Arithmetic kind = Arithmetic::f64;
  FUSEDRNN_DEVICE static Value operand(double x) { return x; }
  FUSEDRNN_DEVICE static Rows weights(const Rows& rows) { return rows; }
};

// What the cells compute with.
template <class Real>
struct Math {
  using V = Real;
  FUSEDRNN_DEVICE static V zero() { return V(0); }
  FUSEDRNN_DEVICE static V sigmoid(V x) { return V(1) / (V(1) + exponential(-x)); }
  FUSEDRNN_DEVICE static V multiply_add(V a, V b, V c) { return a * b + c; }
  FUSEDRNN_DEVICE static V tanh(V x) { return hyperbolic_tangent(x); }
  // A NaN stays one.
  FUSEDRNN_DEVICE static V relu(V x) { return x < V(0) ? V(0) : x; }
  FUSEDRNN_DEVICE static V where_positive(V condition, V x) { return condition <= V(0) ? V(0) : x; }
};

}  // namespace fusedrnn::cuda

// The functions of gates, and of values in bfloat16, compiled once per instruction set, over arrays.
#pragma once

#include <cstdint>

#include "bf16.h"

template <class T>
using MathFunction = void (*)(const T* in, T* out, int64_t count);  // count: a multiple of math_block

// A multiple of every N * width.
constexpr int64_t math_block = 192;

// By precision and N - 1.
struct MathFunctions {
  const char* name;
  MathFunction<float> float_sigmoid[3], float_tanh[3];
  MathFunction<double> double_sigmoid[3], double_tanh[3];
  // To bfloat16 and back, `lanes` values at a time, of a vector perhaps less.
  void (*narrow)(const float* in, fusedrnn::bf16* out, int64_t count, int lanes);
  void (*widen)(const fusedrnn::bf16* in, float* out, int64_t count, int lanes);
};

// The functions of gates, compiled once per instruction set, over arrays.
#pragma once

#include <cstdint>

template <class T>
using MathFunction = void (*)(const T* in, T* out, int64_t count);  // count: a multiple of math_block

// A multiple of every N * width.
constexpr int64_t math_block = 64;

// By precision and N - 1.
struct MathFunctions {
  const char* name;
  MathFunction<float> float_sigmoid[2], float_tanh[2];
  MathFunction<double> double_sigmoid[2], double_tanh[2];
};

// The type of values that are kept in half of a float, and the type that sums of values have.
#pragma once

#include <cstdint>

// Included by translation units compiled for different processors, which must not share an out-of-line copy.
#define FUSEDRNN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fusedrnn {

// A float's upper half. Tensors hold it and products multiply it; everything else is computed in float.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  // To the nearest, ties to even; a NaN stays one, whichever of its bits are cut off.
  FUSEDRNN_ALWAYS_INLINE bf16(float value) {
    uint32_t wide;
    __builtin_memcpy(&wide, &value, sizeof wide);
    bits = static_cast<uint16_t>((value == value ? wide + 0x7fff + (wide >> 16 & 1) : wide | 0x400000) >> 16);
  }
  FUSEDRNN_ALWAYS_INLINE operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// The type in which values of type T are added up and gates are computed.
template <class T>
struct Accumulator {
  using Type = T;
};
template <>
struct Accumulator<bf16> {
  using Type = float;
};
template <class T>
using SumOf = typename Accumulator<T>::Type;

}  // namespace fusedrnn

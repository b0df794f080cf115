// Every primitive of the hardware that the kernels use, and the only file with PTX. nvcc compiles what is here; the
// tests bring a second implementation of the same names, in which a CTA's threads are fibers of one CPU thread.
//
// Kernels never dereference memory themselves: `gptr` and `sptr` point to global and shared memory, and load and store
// go through them, so that the tests' implementation can check bounds, alignment, initialisation and races.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

// What a thread loads at once: 16 bytes.
struct alignas(16) Words {
  uint32_t w[4];
};

}  // namespace fusedrnn::cuda

#ifdef FUSEDRNN_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FUSEDRNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_UNROLL _Pragma("unroll")
#define FUSEDRNN_ARGUMENTS(type, name) const __grid_constant__ type name

namespace fusedrnn::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

FUSEDRNN_DEVICE int thread_index() { return threadIdx.x; }
FUSEDRNN_DEVICE int thread_count() { return blockDim.x; }
FUSEDRNN_DEVICE int cta_index() { return blockIdx.x; }

// Global memory: `count` elements from `data`.
template <class T>
class gptr {
 public:
  FUSEDRNN_DEVICE gptr(T* data, int64_t) : data_(data) {}
  FUSEDRNN_DEVICE explicit operator bool() const { return data_ != nullptr; }
  FUSEDRNN_DEVICE T* at(int64_t i) const { return data_ + i; }

 private:
  T* data_;
};

// Shared memory: `count` elements from byte `offset` of the CTA's dynamic shared memory.
template <class T>
class sptr {
 public:
  FUSEDRNN_DEVICE sptr(int offset, int) {
    extern __shared__ uint4 memory[];
    data_ = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + offset);
  }
  FUSEDRNN_DEVICE T* at(int i) const { return data_ + i; }

 private:
  T* data_;
};

template <class T>
FUSEDRNN_DEVICE T load(gptr<const T> p, int64_t i) {
  return *p.at(i);
}
template <class T>
FUSEDRNN_DEVICE T load(gptr<T> p, int64_t i) {
  return *p.at(i);
}
template <class T>
FUSEDRNN_DEVICE T load(sptr<T> p, int i) {
  return *p.at(i);
}
template <class T>
FUSEDRNN_DEVICE void store(gptr<T> p, int64_t i, T value) {
  *p.at(i) = value;
}
template <class T>
FUSEDRNN_DEVICE void store(sptr<T> p, int i, T value) {
  *p.at(i) = value;
}

// 16 bytes from element i on, aligned.
template <class T>
FUSEDRNN_DEVICE Words load_words(gptr<const T> p, int64_t i) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p.at(i)));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
FUSEDRNN_DEVICE Words load_words(sptr<T> p, int i) {
  const uint4 v = *reinterpret_cast<const uint4*>(p.at(i));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
FUSEDRNN_DEVICE void store_words(sptr<T> p, int i, const Words& v) {
  *reinterpret_cast<uint4*>(p.at(i)) = uint4{v.w[0], v.w[1], v.w[2], v.w[3]};
}
// Of memory that other CTAs write during this launch: from the L2 cache, which all share.
template <class T>
FUSEDRNN_DEVICE Words load_words_shared_by_ctas(gptr<T> p, int64_t i) {
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p.at(i)));
  return v;
}

// Memory that nobody writes during this launch.
template <class T>
FUSEDRNN_DEVICE const T& constant(const T* p) {
  return *p;
}

// All threads of the CTA meet, and see what the others wrote before.
FUSEDRNN_DEVICE void sync() { __syncthreads(); }

// Adds one. Whoever waits for it sees what this thread wrote or saw written before.
FUSEDRNN_DEVICE void arrive(gptr<unsigned> counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter.at(0)) : "memory");
}
FUSEDRNN_DEVICE void wait_for(gptr<unsigned> counter, unsigned count) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter.at(0)) : "memory");
  } while (seen < count);
}

// Everything that this thread wrote or saw written before comes before what it writes after; and what others' fences
// put before a `put` whose value it has read, before what it reads after.
FUSEDRNN_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Memory in which values say themselves that they are there: a place without one holds a bit pattern, a NaN of every
// format, that `put` leaves to no value.

template <class T>
FUSEDRNN_DEVICE void put_bits(gptr<T> p, int64_t i, uint32_t bits) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2)
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p.at(i)), "h"(static_cast<uint16_t>(bits)));
  else
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p.at(i)), "r"(bits));
}
template <class T>
FUSEDRNN_DEVICE void put(gptr<T> p, int64_t i, T value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  constexpr uint32_t nothing = sizeof(T) == 2 ? 0xffffu : 0xffffffffu;
  put_bits(p, i, bits == nothing ? nothing >> 1 : bits);  // the NaN without its sign
}
template <class T>
FUSEDRNN_DEVICE void empty(gptr<T> p, int64_t i) {
  put_bits(p, i, 0xffffffffu);
}
template <class T>
FUSEDRNN_DEVICE bool has_empty(const Words& words) {
  uint32_t found = 0;
  FUSEDRNN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = words.w[i];
    found |= sizeof(T) == 2 ? (~w - 0x00010001u) & w & 0x80008000u : w == 0xffffffffu;
  }
  return found;
}
// The first `count` times 16 bytes, from element at(k) on, as soon as all their places are full.
template <int n, class T, class At>
FUSEDRNN_DEVICE void load_words_when_full(Words (&words)[n], int count, gptr<T> p, At&& at) {
  bool missing;
  do {
    missing = false;
    FUSEDRNN_UNROLL
    for (int k = 0; k < n; ++k)
      if (k < count) words[k] = load_words_shared_by_ctas(p, at(k));
    FUSEDRNN_UNROLL
    for (int k = 0; k < n; ++k) missing |= k < count && has_empty<T>(words[k]);
  } while (missing);
}

// Copies 16 aligned bytes to shared memory while the thread goes on.
template <class T>
FUSEDRNN_DEVICE void copy_async(sptr<T> to, int i, gptr<const T> from, int64_t k) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to.at(i)))),
      "l"(from.at(k)));
}
FUSEDRNN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Until at most `pending` of this thread's commits are under way.
template <int pending>
FUSEDRNN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// The value of the lane whose number differs in the bits of `mask`. The whole warp takes part.
template <class T>
FUSEDRNN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// c += a b on a tensor core, by the whole warp. Lane l holds of the 16 x k matrix a, with r = l / 4 and q = l % 4:
// a[0] row r, a[1] row r + 8, both from the first half of k; a[2], a[3] the same from the second half; in each half the
// q-th 32-bit word. b (k x 8): b[0], b[1] the q-th words of column r in either half. c (16 x 8): c[0], c[1] row r,
// columns 2q and 2q + 1; c[2], c[3] row r + 8. k is 16 for 16-bit values and 8 for tf32.
FUSEDRNN_DEVICE void multiply_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FUSEDRNN_DEVICE void multiply_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FUSEDRNN_DEVICE void multiply_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The nearest number of tf32 (10 bits of mantissa), which tensor cores would otherwise reach by cutting off.
FUSEDRNN_DEVICE float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

FUSEDRNN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FUSEDRNN_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
FUSEDRNN_DEVICE double double_of(uint32_t low, uint32_t high) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

FUSEDRNN_DEVICE float exponential(float x) { return expf(x); }
FUSEDRNN_DEVICE double exponential(double x) { return exp(x); }
FUSEDRNN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FUSEDRNN_DEVICE double hyperbolic_tangent(double x) { return ::tanh(x); }

// Which of a power of two buffers belongs to a step.
template <int buffers>
FUSEDRNN_DEVICE int buffer_of(int64_t step) {
  return static_cast<int>(step & (buffers - 1));
}

template <class To>
struct Convert {
  template <class From>
  FUSEDRNN_DEVICE static To from(From x) {
    return static_cast<To>(x);
  }
};
template <>
struct Convert<bf16> {
  FUSEDRNN_DEVICE static bf16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Convert<f16> {
  FUSEDRNN_DEVICE static f16 from(float x) { return __float2half_rn(x); }
};
template <>
struct Convert<float> {
  FUSEDRNN_DEVICE static float from(float x) { return x; }
  FUSEDRNN_DEVICE static float from(bf16 x) { return __bfloat162float(x); }
  FUSEDRNN_DEVICE static float from(f16 x) { return __half2float(x); }
};
template <class To, class From>
FUSEDRNN_DEVICE To convert(From x) {
  return Convert<To>::from(x);
}

}  // namespace fusedrnn::cuda
#endif

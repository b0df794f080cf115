// The primitives of csrc/cuda/device.h without a GPU: each thread of a launch is a fiber, all CTAs are there at once,
// and what threads do together is a rendezvous. It checks what hardware would not tell:
//
//   bounds and alignment of every access; shared memory read before it was written, or before a copy was waited for;
//   races, by happens-before clocks: barriers, arrive/wait, and fences with put/load_words_when_full between them order
//   memory, shuffles and tensor cores do not;
//   divergence: threads that meet in different operations; deadlock, with who waits where.
//
// Not modelled: memory scopes, bank conflicts, registers, the rounding inside tensor cores, limits of co-residency,
// reordering by weak memory (races are found, not executed).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define FUSEDRNN_KERNEL(threads) void
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_UNROLL
#define FUSEDRNN_ARGUMENTS(type, name) const type name

// Where in the source a primitive was called.
#define FUSEDRNN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fusedrnn::emulator {

using cuda::Words;

struct Site {
  const char* operation;
  const char* file;
  int line;
};

// What the tests may break, to see that it is found: the n-th call of each thread, or every call.
enum class Fault {
  none,
  sync,
  arrive,
  wait,
  fragment,
  buffer,
  copy_wait,
  fence,
  put,
  empty,
  full,
  cooperative_launch,
  launch
};
// Which of the threads that can run goes next. ahead: those of one CTA, as long as one of them can.
enum class Schedule { in_order, reversed, random, ahead };

struct Settings {
  Schedule schedule = Schedule::in_order;
  uint64_t seed = 0;
  Fault fault = Fault::none;
  int64_t fault_at = -1;  // -1: every call
};
Settings& settings();

// Runs a kernel; throws std::runtime_error with what was found wrong.
void launch(int64_t ctas, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

int thread_index();
int thread_count();
int cta_index();

bool faulty(Fault kind);  // whether this call of this thread is the one to break
void access_global(const void* p, size_t bytes, bool write, const Site& site);
char* shared_memory(int64_t offset, size_t bytes, size_t alignment, const Site& site);
void access_shared(const void* p, size_t bytes, bool write, const Site& site);
void meet_cta(const Site& site);
// All lanes of a warp meet; the last one calls `all` with what each brought.
void meet_warp(const Site& site, void* mine, const std::function<void(void* const*)>& all);
void arrive(unsigned* counter, const Site& site);
void wait_for(const unsigned* counter, unsigned count, const Site& site);
void fence();
// The places of 16 bytes, of `size` bytes each, are full, and none can still show a value from before it was emptied.
void wait_until_full(const void* p, size_t size, const Site& site);
void put(void* p, const void* value, size_t size, const Site& site);
void empty(void* p, size_t size, const Site& site);
void copy_async(void* shared, const void* global, const Site& site);
void commit_copies();
void wait_copies(int pending);
[[noreturn]] void fail(const std::string& what, const Site& site);

template <class T>
class gptr {
 public:
  gptr(T* data, int64_t count) : data_(data), count_(count) {}
  explicit operator bool() const { return data_ != nullptr; }
  T* at(int64_t i, int64_t n, const Site& site) const {
    if (i < 0 || i + n > count_)
      fail("global memory out of bounds: element " + std::to_string(i) + " of " + std::to_string(count_), site);
    if (reinterpret_cast<uintptr_t>(data_ + i) % (static_cast<size_t>(n) * sizeof(T))) fail("misaligned", site);
    return data_ + i;
  }

 private:
  T* data_;
  int64_t count_;
};

template <class T>
class sptr {
 public:
  sptr(int64_t offset, int64_t count, FUSEDRNN_SITE) : count_(count) {
    data_ = reinterpret_cast<T*>(
        shared_memory(offset, static_cast<size_t>(count) * sizeof(T), alignof(T), {"shared memory", file, line}));
  }
  T* at(int64_t i, int64_t n, const Site& site) const {
    if (i < 0 || i + n > count_)
      fail("shared memory out of bounds: element " + std::to_string(i) + " of " + std::to_string(count_), site);
    if (reinterpret_cast<uintptr_t>(data_ + i) % (static_cast<size_t>(n) * sizeof(T))) fail("misaligned", site);
    return data_ + i;
  }

 private:
  T* data_;
  int64_t count_;
};

// 16-bit formats as bits; conversions round to nearest, ties to even.
struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

}  // namespace fusedrnn::emulator

namespace fusedrnn::cuda {

using emulator::bf16, emulator::f16, emulator::gptr, emulator::sptr;
using emulator::thread_index, emulator::thread_count, emulator::cta_index;

template <class T>
std::remove_const_t<T> load(gptr<T> p, int64_t i, FUSEDRNN_SITE) {
  const emulator::Site site{"load", file, line};
  const T* at = p.at(i, 1, site);
  emulator::access_global(at, sizeof(T), false, site);
  return *at;
}
template <class T>
T load(sptr<T> p, int64_t i, FUSEDRNN_SITE) {
  const emulator::Site site{"load", file, line};
  const T* at = p.at(i, 1, site);
  emulator::access_shared(at, sizeof(T), false, site);
  return *at;
}
template <class T>
void store(gptr<T> p, int64_t i, T value, FUSEDRNN_SITE) {
  const emulator::Site site{"store", file, line};
  T* at = p.at(i, 1, site);
  emulator::access_global(at, sizeof(T), true, site);
  *at = value;
}
template <class T>
void store(sptr<T> p, int64_t i, T value, FUSEDRNN_SITE) {
  const emulator::Site site{"store", file, line};
  T* at = p.at(i, 1, site);
  emulator::access_shared(at, sizeof(T), true, site);
  *at = value;
}

template <class T>
Words load_words(gptr<T> p, int64_t i, FUSEDRNN_SITE) {
  const emulator::Site site{"load_words", file, line};
  const T* at = p.at(i, sizeof(Words) / sizeof(T), site);
  emulator::access_global(at, sizeof(Words), false, site);
  Words result;
  std::memcpy(&result, at, sizeof(Words));
  return result;
}
template <class T>
Words load_words_shared_by_ctas(gptr<T> p, int64_t i, FUSEDRNN_SITE) {
  return load_words(p, i, file, line);
}
template <class T>
Words load_words(sptr<T> p, int64_t i, FUSEDRNN_SITE) {
  const emulator::Site site{"load_words", file, line};
  const T* at = p.at(i, sizeof(Words) / sizeof(T), site);
  emulator::access_shared(at, sizeof(Words), false, site);
  Words result;
  std::memcpy(&result, at, sizeof(Words));
  return result;
}
template <class T>
void store_words(sptr<T> p, int64_t i, const Words& v, FUSEDRNN_SITE) {
  const emulator::Site site{"store_words", file, line};
  T* at = p.at(i, sizeof(Words) / sizeof(T), site);
  emulator::access_shared(at, sizeof(Words), true, site);
  std::memcpy(static_cast<void*>(at), &v, sizeof(Words));
}

template <class T>
const T& constant(const T* p) {
  return *p;
}

inline void sync(FUSEDRNN_SITE) {
  if (!emulator::faulty(emulator::Fault::sync)) emulator::meet_cta({"sync", file, line});
}
inline void arrive(gptr<unsigned> counter, FUSEDRNN_SITE) {
  const emulator::Site site{"arrive", file, line};
  emulator::arrive(counter.at(0, 1, site), site);
}
inline void wait_for(gptr<unsigned> counter, unsigned count, FUSEDRNN_SITE) {
  const emulator::Site site{"wait_for", file, line};
  if (!emulator::faulty(emulator::Fault::wait)) emulator::wait_for(counter.at(0, 1, site), count, site);
}

inline void fence() {
  if (!emulator::faulty(emulator::Fault::fence)) emulator::fence();
}
template <class T>
void put(gptr<T> p, int64_t i, T value, FUSEDRNN_SITE) {
  const emulator::Site site{"put", file, line};
  emulator::put(p.at(i, 1, site), &value, sizeof(T), site);
}
template <class T>
void empty(gptr<T> p, int64_t i, FUSEDRNN_SITE) {
  const emulator::Site site{"empty", file, line};
  if (!emulator::faulty(emulator::Fault::empty)) emulator::empty(p.at(i, 1, site), sizeof(T), site);
}
template <int n, class T, class At>
void load_words_when_full(Words (&words)[n], int count, gptr<T> p, At&& at, FUSEDRNN_SITE) {
  const emulator::Site site{"load_words_when_full", file, line};
  for (int k = 0; k < n && k < count; ++k) {
    const T* from = p.at(at(k), sizeof(Words) / sizeof(T), site);
    if (!emulator::faulty(emulator::Fault::full)) emulator::wait_until_full(from, sizeof(T), site);
    std::memcpy(&words[k], from, sizeof(Words));
  }
}

template <class T>
void copy_async(sptr<T> to, int64_t i, gptr<const T> from, int64_t k, FUSEDRNN_SITE) {
  const emulator::Site site{"copy_async", file, line};
  const int64_t n = sizeof(Words) / sizeof(T);
  emulator::copy_async(to.at(i, n, site), from.at(k, n, site), site);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
void wait_copies() {
  if (!emulator::faulty(emulator::Fault::copy_wait)) emulator::wait_copies(pending);
}

template <class T>
T shuffle_xor(T value, int mask, FUSEDRNN_SITE) {
  struct Post {
    T value;
    int mask;
    T result;
  } post{value, mask, {}};
  emulator::meet_warp({"shuffle_xor", file, line}, &post, [](void* const* posts) {
    for (int l = 0; l < 32; ++l) {
      Post& mine = *static_cast<Post*>(posts[l]);
      mine.result = static_cast<Post*>(posts[l ^ mine.mask])->value;
    }
  });
  return post.result;
}

namespace emulated {

inline float float_of(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// What the bits of a 32-bit word are worth: two 16-bit values, or one tf32, of which hardware ignores the last 13 bits.
struct Bf16Word {
  static constexpr int values = 2;
  static float value(uint32_t w, int i) { return float_of(i ? w & 0xffff0000u : w << 16); }
};
struct F16Word {
  static constexpr int values = 2;
  static float value(uint32_t w, int i) {
    const uint16_t half = static_cast<uint16_t>(i ? w >> 16 : w);
    f16 result;
    std::memcpy(&result, &half, 2);
    return static_cast<float>(result);
  }
};
struct Tf32Word {
  static constexpr int values = 1;
  static float value(uint32_t w, int) { return float_of(w & 0xffffe000u); }
};

template <class Word>
void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
              const char* file, int line) {
  struct Post {
    uint32_t a[4], b[2];
    float* c;
  } post{{a0, a1, a2, a3}, {b0, b1}, c};
  if (emulator::faulty(emulator::Fault::fragment)) std::swap(post.a[1], post.a[2]);
  emulator::meet_warp({"multiply", file, line}, &post, [](void* const* posts) {
    constexpr int half = 4 * Word::values, K = 2 * half;
    float a[16][K], b[K][8];
    for (int l = 0; l < 32; ++l) {
      const Post& p = *static_cast<const Post*>(posts[l]);
      const int r = l / 4, q = l % 4;
      for (int i = 0; i < Word::values; ++i)
        for (int part = 0; part < 2; ++part) {
          const int k = part * half + q * Word::values + i;
          a[r][k] = Word::value(p.a[2 * part], i), a[r + 8][k] = Word::value(p.a[2 * part + 1], i);
          b[k][r] = Word::value(p.b[part], i);
        }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
        float& out = static_cast<const Post*>(posts[l])->c[i];
        out = static_cast<float>(static_cast<double>(out) + sum);
      }
  });
}

}  // namespace emulated

inline void multiply_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                          FUSEDRNN_SITE) {
  emulated::multiply<emulated::Bf16Word>(c, a0, a1, a2, a3, b0, b1, file, line);
}
inline void multiply_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                         FUSEDRNN_SITE) {
  emulated::multiply<emulated::F16Word>(c, a0, a1, a2, a3, b0, b1, file, line);
}
inline void multiply_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                          FUSEDRNN_SITE) {
  emulated::multiply<emulated::Tf32Word>(c, a0, a1, a2, a3, b0, b1, file, line);
}

inline float float_of(uint32_t bits) { return emulated::float_of(bits); }
inline uint32_t bits_of(float value) {
  uint32_t result;
  std::memcpy(&result, &value, 4);
  return result;
}
inline double double_of(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double result;
  std::memcpy(&result, &bits, 8);
  return result;
}
// Ties away from zero, as the instruction does.
inline float to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? x : float_of((bits + 0x1000u) & 0xffffe000u);
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

template <int buffers>
int buffer_of(int64_t step) {
  return static_cast<int>((step ^ (emulator::faulty(emulator::Fault::buffer) ? 1 : 0)) & (buffers - 1));
}

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<From, bf16>) {
    return static_cast<To>(emulator::widen(x));
  } else if constexpr (std::is_same_v<To, bf16>) {
    const uint32_t bits = bits_of(static_cast<float>(x));
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16)};
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace fusedrnn::cuda

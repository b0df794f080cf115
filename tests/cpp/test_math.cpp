// sigmoid and tanh of every instruction set that runs here, against long double, and the rounding to bfloat16.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "math_isa.h"

#define FUSEDRNN_DECLARE(name)          \
  namespace name {                      \
  extern const MathFunctions functions; \
  }
FUSEDRNN_DECLARE(baseline)
#if defined(__x86_64__)
FUSEDRNN_DECLARE(avx2)
FUSEDRNN_DECLARE(avx512)
FUSEDRNN_DECLARE(avx512bf16)
FUSEDRNN_DECLARE(wide)
#endif

namespace {

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
long double ulp(long double exact) {
  const int exponent = exact == 0 ? 0 : std::ilogb(exact);
  return std::ldexp(1.0L,
                    std::max(exponent, std::numeric_limits<T>::min_exponent - 1) - std::numeric_limits<T>::digits + 1);
}

// Spread evenly over all bit patterns of finite values from zero to `highest`, and evenly over [0, highest]; each with
// either sign.
template <class T>
std::vector<T> samples(T highest) {
  std::vector<T> result;
  const auto both = [&](T x) { result.insert(result.end(), {x, -x}); };
  uint64_t last = 0;
  std::memcpy(&last, &highest, sizeof highest);  // little-endian, as are all processors that the kernels know
  constexpr uint64_t count = 60000;
  for (uint64_t k = 0; k <= count; ++k) {
    // An odd step, so that low bits vary too.
    const uint64_t bits = k == count ? last : k * ((last / count) | 1);
    T x;
    std::memcpy(&x, &bits, sizeof x);
    both(x <= highest ? x : highest);
    both(static_cast<T>(static_cast<double>(highest) * static_cast<double>(k) / static_cast<double>(count)));
  }
  return result;
}

template <class T>
std::vector<T> apply(MathFunction<T> f, std::vector<T> in) {
  const size_t count = in.size();
  in.resize((count + math_block - 1) / math_block * math_block);
  std::vector<T> out(in.size());
  f(in.data(), out.data(), static_cast<int64_t>(in.size()));
  out.resize(count);
  return out;
}

template <class T, class F>
std::vector<long double> exact(const std::vector<T>& in, F f) {
  std::vector<long double> result;
  for (const T x : in) result.push_back(f(static_cast<long double>(x)));
  return result;
}

long double exact_sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

// Largest error in ulp where the exact value is at least `smallest`; below that the error may be as large as it.
template <class T>
void compare(const char* isa, const char* function, int vectors, const std::vector<T>& in, const std::vector<T>& got,
             const std::vector<long double>& want, long double smallest, double limit) {
  double worst = 0;
  T worst_at = 0;
  for (size_t k = 0; k < in.size(); ++k) {
    const long double error = std::fabs(got[k] - want[k]);
    if (std::fabs(want[k]) < smallest) {
      CHECK(error < smallest, "%s %s(%a) is %a, not %La", isa, function, static_cast<double>(in[k]),
            static_cast<double>(got[k]), want[k]);
      continue;
    }
    const double ulps = static_cast<double>(error / ulp<T>(want[k]));
    if (!(ulps <= worst)) worst = ulps, worst_at = in[k];
  }
  std::printf("%-8s %-6s %d x %-7s %.3f ulp at %a\n", isa, sizeof(T) == 4 ? "float" : "double", vectors, function,
              worst, static_cast<double>(worst_at));
  CHECK(worst <= limit, "%s %s: %.3f ulp at %a", isa, function, worst, static_cast<double>(worst_at));
}

template <class T>
void check_special_values(const char* isa, MathFunction<T> sigmoid, MathFunction<T> tanh) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN(), huge = std::numeric_limits<T>::max();
  // Among others, so that lanes that saturate do not disturb their neighbours.
  const std::vector<T> in = {-infinity<T>, T(0.5), infinity<T>, nan, -huge, T(-0.5), huge, -nan, T(0), -T(0)};
  const std::vector<T> s = apply(sigmoid, in), t = apply(tanh, in);
  CHECK(s[0] == 0 && !std::signbit(s[0]), "%s: sigmoid(-inf) is %a", isa, static_cast<double>(s[0]));
  CHECK(s[2] == 1, "%s: sigmoid(inf) is %a", isa, static_cast<double>(s[2]));
  CHECK(s[4] == 0 && s[6] == 1, "%s: sigmoid of the largest numbers", isa);
  CHECK(s[8] == T(0.5) && s[9] == T(0.5), "%s: sigmoid(0) is %a", isa, static_cast<double>(s[8]));
  CHECK(t[0] == -1 && t[2] == 1 && t[4] == -1 && t[6] == 1, "%s: tanh does not reach 1", isa);
  CHECK(t[8] == 0 && t[9] == 0, "%s: tanh(0) is %a", isa, static_cast<double>(t[8]));
  CHECK(std::isnan(s[3]) && std::isnan(s[7]) && std::isnan(t[3]) && std::isnan(t[7]), "%s: NaN is lost", isa);
  const T mirrored = apply(tanh, {T(0.5), T(-0.5)})[1];
  CHECK(t[1] == -t[5] && t[5] == mirrored, "%s: tanh is not odd", isa);
}

template <class T>
void check_precision(const std::vector<const MathFunctions*>& isas, double sigmoid_limit, double tanh_limit) {
  // Until sigmoid(-x) is denormal, then to where it is zero; tanh to where it is 1 and beyond.
  std::vector<T> in = samples<T>(sizeof(T) == 4 ? T(120) : T(800));
  const std::vector<T> usual = samples<T>(T(20)), near = samples<T>(T(1));
  in.insert(in.end(), usual.begin(), usual.end());
  in.insert(in.end(), near.begin(), near.end());
  const std::vector<long double> sigmoids = exact(in, exact_sigmoid);
  const std::vector<long double> tanhs = exact(in, [](long double x) { return std::tanh(x); });
  for (const MathFunctions* isa : isas)
    for (int n = 0; n < 3; ++n) {
      const auto [sigmoid, tanh] = [&] {
        if constexpr (sizeof(T) == 4) return std::pair(isa->float_sigmoid[n], isa->float_tanh[n]);
        if constexpr (sizeof(T) == 8) return std::pair(isa->double_sigmoid[n], isa->double_tanh[n]);
      }();
      compare(isa->name, "sigmoid", n + 1, in, apply(sigmoid, in), sigmoids, std::numeric_limits<T>::min(),
              sigmoid_limit);
      compare(isa->name, "tanh", n + 1, in, apply(tanh, in), tanhs, 0, tanh_limit);
      check_special_values<T>(isa->name, sigmoid, tanh);
    }
}

// All of bfloat16's values and what lies between them: just below, at and above the middle of each two.
void check_bf16(const MathFunctions& isa) {
  std::vector<float> in;
  std::vector<uint16_t> want;
  const auto add = [&](uint32_t bits, uint32_t rounded) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    if (std::fpclassify(value) == FP_SUBNORMAL) return;  // an instruction takes them for zero
    in.push_back(value);
    want.push_back(static_cast<uint16_t>(rounded));
  };
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    const bool finite = (upper & 0x7f80) != 0x7f80;
    const uint32_t bits = upper << 16;
    if (!finite && (upper & 0x7f)) {  // NaN: stays one, and quiet
      add(bits, upper | 0x40), add(bits | 1, upper | 0x40);
      continue;
    }
    add(bits, upper);
    if (!finite) {
      add(bits | 1, upper | 0x40);  // a NaN that only its lowest bits tell from infinity
      continue;
    }
    add(bits | 1, upper), add(bits | 0x7fff, upper);
    add(bits | 0x8000, upper + (upper & 1));  // a tie goes to the even one
    add(bits | 0x8001, upper + 1), add(bits | 0xffff, upper + 1);
  }
  const auto count = static_cast<int64_t>(in.size());
  for (const int lanes : {16, 5}) {
    std::vector<fusedrnn::bf16> narrow(in.size());
    std::vector<float> wide(in.size());
    isa.narrow(in.data(), narrow.data(), count, lanes);
    isa.widen(narrow.data(), wide.data(), count, lanes);
    for (size_t k = 0; k < in.size(); ++k) {
      CHECK(narrow[k].bits == want[k], "%s, %d lanes: %a is rounded to %04x, not %04x", isa.name, lanes,
            static_cast<double>(in[k]), narrow[k].bits, want[k]);
      CHECK(fusedrnn::bf16(in[k]).bits == want[k], "%a is rounded otherwise", static_cast<double>(in[k]));
      const float same = narrow[k];
      CHECK(std::memcmp(&same, &wide[k], sizeof same) == 0, "%s, %d lanes: %04x is widened to %a", isa.name, lanes,
            narrow[k].bits, static_cast<double>(wide[k]));
    }
  }
}

std::vector<const MathFunctions*> functions_that_run_here() {
  const MathFunctions* compiled[] = {&baseline::functions,
#if defined(__x86_64__)
                                     &avx2::functions, &avx512::functions, &avx512bf16::functions
#endif
  };
  std::vector<const MathFunctions*> result;
  for (const fusedrnn::Kernels* const* k = fusedrnn::available_kernels(); *k; ++k)
    for (const MathFunctions* functions : compiled)
      if (std::strcmp((*k)->name, functions->name) == 0) result.push_back(functions);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(&wide::functions);
#endif
  return result;
}

}  // namespace

int main() {
  const std::vector<const MathFunctions*> isas = functions_that_run_here();
  check_precision<float>(isas, 2.5, 3);
  check_precision<double>(isas, 2.5, 3);
  for (const MathFunctions* isa : isas) check_bf16(*isa);
  return check::result();
}

// What generated kernels call: number formats, and element functions with torch's meaning.
//
// Everything here is free of branches on data, so that loops over it become vector code. exp, log and cbrt stay within
// 2 units in the last place of the true value over the whole range, softplus within 3 (tests/test_cpp_math.py).

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace piste {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> static INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Number formats ------------------------------------------------------------------------------------------------------

template <class R> static INLINE R get(const float* p, int64_t i) { return (R)p[i]; }
template <class R> static INLINE R get(const double* p, int64_t i) { return (R)p[i]; }
template <class R> static INLINE R get(const bf16* p, int64_t i) { return (R)bits_as<float>((uint32_t)p[i].bits << 16); }

template <class R> static INLINE R get(const f16* p, int64_t i) {
  const uint32_t h = p[i].bits, magnitude = h & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000);
  // 1/2 has the spacing of subnormal halves in its last bit
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude | 0x3f000000) - 0.5f);
  return (R)bits_as<float>((magnitude < 0x0400 ? subnormal : normal) | (h & 0x8000) << 16);
}

static INLINE void put(float* p, int64_t i, float x) { p[i] = x; }
static INLINE void put(float* p, int64_t i, double x) { p[i] = (float)x; }
static INLINE void put(double* p, int64_t i, double x) { p[i] = x; }

// to the nearest, ties to even; a NaN stays one
static INLINE void put(bf16* p, int64_t i, float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  p[i].bits = (uint16_t)(x != x ? 0x7fc0 : rounded);
}

static INLINE void put(f16* p, int64_t i, float x) {
  const uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  const uint32_t normal = (a + 0xc8000000u + 0xfff + ((a >> 13) & 1)) >> 13;
  // adding 1/2 lets the hardware round to the spacing of subnormal halves
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000;
  const uint32_t huge = a > 0x7f800000 ? 0x7e00 : 0x7c00;
  p[i].bits = (uint16_t)(sign | (a >= 0x47800000 ? huge : a < 0x38800000 ? subnormal : normal));
}

static INLINE void put(bf16* p, int64_t i, double x) { put(p, i, (float)x); }
static INLINE void put(f16* p, int64_t i, double x) { put(p, i, (float)x); }

// Elementary functions ------------------------------------------------------------------------------------------------

static INLINE double exp(double x) { return __builtin_exp(x); }
static INLINE double log(double x) { return __builtin_log(x); }
static INLINE double cbrt(double x) { return __builtin_cbrt(x); }
static INLINE double softplus(double x) { return __builtin_log1p(__builtin_exp(-__builtin_fabs(x))) + (x > 0 ? x : 0); }

// exp(y) = fraction * 2^exponent, for -104 <= y <= 89.
struct Exponential { float fraction; int32_t exponent; };

// exp(y) = 2^n exp(r) with |r| <= ln(2)/2, where the best polynomial of degree 6 that begins with 1 + r leaves 4e-9. ln(2)
// stands in two parts, of which the first has so few bits that its product with n is exact. Terms are paired: a long
// chain of operations, each of which waits for the one before, would be what a loop waits for.
static INLINE Exponential exponential(float y) {
  // where floats are whole numbers, the addition rounds, and n stands in the last bits
  const float shifted = y * 0x1.715476p+0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const float r = (y - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f, square = r * r;
  const float large = 0.49999994f + r * 0.16666521f, small = 0.04166826f + r * 0.008368666f;
  const float q = large + square * (small + square * 0.0013821174f);
  return {1.0f + (r + square * q), bits_as<int32_t>(shifted) - 0x4b400000};
}

// 2^k, for -126 <= k <= 127
static INLINE float power_of_two(int32_t k) { return bits_as<float>((k + 127) << 23); }

static INLINE float exp(float x) {
  const float y = x < 89.0f ? x : 89.0f;
  const Exponential e = exponential(y > -104.0f ? y : -104.0f);
  // in two factors, because the power itself may lie outside of the normal numbers
  const int32_t half = e.exponent >> 1;
  const float scaled = e.fraction * power_of_two(half) * power_of_two(e.exponent - half);
  return x != x ? x : scaled;
}

// x = 2^k m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 artanh(s), s = f / (2 + f), f = m - 1, written so that the
// largest term, f, enters exactly; five terms of the series leave 2e-9.
static INLINE float log(float x) {
  const bool small = x < 0x1p-126f;
  const uint32_t u = bits_as<uint32_t>(small ? x * 0x1p23f : x) + (0x3f800000 - 0x3f3504f3);
  const float k = (float)((int32_t)(u >> 23) - 127 - (small ? 23 : 0));
  const float f = bits_as<float>((u & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, half_square = 0.5f * f * f;
  float q = 2.0f / 9;
  q = q * z + 2.0f / 7;
  q = q * z + 2.0f / 5;
  q = q * z + 2.0f / 3;
  const float value = k * 0x1.63p-1f - ((half_square - (s * (half_square + q * z) + k * -0x1.bd0106p-13f)) - f);
  const float outside = x == 0.0f ? -__builtin_inff() : x < 0.0f ? __builtin_nanf("") : x;
  return x > 0.0f && x < __builtin_inff() ? value : outside;
}

// A third of the bits is within 4 % of the root, a step of Newton's method within 0.1 %. Of that, t keeps 8 bits, so
// that t^3 and a - t^3 are exact; what is missing is t ((1 + e)^(1/3) - 1), whose first three terms leave 2e-9.
static INLINE float cbrt(float x) {
  const float whole = __builtin_fabsf(x);
  const bool small = whole < 0x1p-60f, large = whole > 0x1p60f;
  const float a = whole * (small ? 0x1p90f : large ? 0x1p-90f : 1.0f);
  const float third = (float)bits_as<int32_t>(a) * (1.0f / 3);
  const float guess = bits_as<float>((int32_t)third + 0x2a512000);
  const float better = (2.0f * guess + a / (guess * guess)) * (1.0f / 3);
  const float t = bits_as<float>((bits_as<uint32_t>(better) + 0x8000) & 0xffff0000), cube = t * t * t;
  const float e = (a - cube) / cube;
  const float root = (t + t * (e * (1.0f / 3 + e * (-1.0f / 9 + e * (5.0f / 81))))) *
                     (small ? 0x1p-30f : large ? 0x1p30f : 1.0f);
  return ((whole > 0.0f) & (whole < __builtin_inff())) ? __builtin_copysignf(root, x) : x;
}

// log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|) as above. t is at most 1, where t (1 + t q(t)) is a logarithm
// without a search for its range, and without a division; the best q of degree 7 leaves 3e-8. Below -87 the result stays
// near 1e-38. In q, t must not come near 1e-38, where products take several times as long: below 2^-30 it is nothing
// beside 1. Both limits are taken of the bits, whose order is that of the numbers: with a choice between floats gcc works
// the formula out for the limit, and then for the small number as well.
static INLINE float softplus(float x) {
  const uint32_t below = bits_as<uint32_t>(x) | 0x80000000, lowest = bits_as<uint32_t>(-87.0f);
  const Exponential e = exponential(bits_as<float>(below < lowest ? below : lowest));
  const float t = e.fraction * power_of_two(e.exponent);
  const int32_t bits = bits_as<int32_t>(t), least = bits_as<int32_t>(0x1p-30f);
  const float u = bits_as<float>(bits > least ? bits : least), square = u * u;
  const float q0 = -0.49999648f + u * 0.3332133f, q1 = -0.24857217f + u * 0.19153848f;
  const float q2 = -0.13754189f + u * 0.07920888f, q3 = -0.030068362f + u * 0.0053654467f;
  const float q = (q0 + square * q1) + square * square * (q2 + square * q3);
  return (x < 0.0f ? 0.0f : x) + t * (1.0f + u * q);
}

static INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
static INLINE double sqrt(double x) { return __builtin_sqrt(x); }
static INLINE float abs(float x) { return __builtin_fabsf(x); }
static INLINE double abs(double x) { return __builtin_fabs(x); }
static INLINE float power(float x, float y) { return __builtin_powf(x, y); }
static INLINE double power(double x, double y) { return __builtin_pow(x, y); }

// The powers that rules use are a choice between products, which the compiler makes once where y is one number. As in
// torch the roots of -0 and -inf are those of sqrt.
template <class R> static INLINE R pow(R x, R y) {
  return y == 2        ? x * x
         : y == R(0.5) ? sqrt(x)
         : y == 1      ? x
         : y == -1     ? 1 / x
         : y == R(-.5) ? 1 / sqrt(x)
         : y == 3      ? x * x * x
         : y == -2     ? 1 / (x * x)
         : y == 0      ? 1
                       : power(x, y);
}

// 0 for a NaN, and never -0
template <class R> static INLINE R sign(R x) { return R((x > 0) - (x < 0)); }

// a NaN on either side is the result, and of equals the first
template <class R> static INLINE R minimum(R x, R y) { return ((y < x) | (y != y)) ? y : x; }
template <class R> static INLINE R maximum(R x, R y) { return ((y > x) | (y != y)) ? y : x; }

// exact at both ends: from the nearer one, a + w (b - a) or b - (1 - w) (b - a)
template <class R> static INLINE R lerp(R a, R b, R w) {
  const bool near = abs(w) < R(0.5);
  return (near ? a : b) + (near ? w : -(1 - w)) * (b - a);
}

// Host numbers: Python's remainder has the sign of the divisor
static INLINE double modulo(double x, double y) {
  const double r = __builtin_fmod(x, y);
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}

}  // namespace piste

// Sixteen floats at a time: one register of AVX-512, two of AVX2, four of NEON.
#pragma once
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
constexpr int PARTS = 1;
using v16 = float __attribute__((vector_size(64), aligned(4)));
using part = v16;
using ints = int32_t __attribute__((vector_size(64), aligned(4)));
#else
// NOTE in parts as wide as a register: the compiler keeps vectors that are wider in memory, at a tenth of the speed
#if defined(__AVX__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif
using part = float __attribute__((vector_size(64 / PARTS), aligned(4)));
using ints = int32_t __attribute__((vector_size(64 / PARTS), aligned(4)));

struct v16 {
    part at[PARTS];
    float& operator[](int64_t i) { return reinterpret_cast<float*>(this)[i]; }
    float operator[](int64_t i) const { return reinterpret_cast<const float*>(this)[i]; }
};

template <class F>
static inline v16 by_part(const F& f) {
#if defined(__AVX__)
    return {f(0), f(1)};
#else
    return {f(0), f(1), f(2), f(3)};
#endif
}

static inline v16 operator+(const v16& x, const v16& y) { return by_part([&](int k) { return x.at[k] + y.at[k]; }); }
static inline v16 operator*(const v16& x, const v16& y) { return by_part([&](int k) { return x.at[k] * y.at[k]; }); }
static inline v16 operator*(const v16& x, float y) { return by_part([&](int k) { return x.at[k] * y; }); }
static inline v16 operator-(const v16& x, float y) { return by_part([&](int k) { return x.at[k] - y; }); }
static inline v16& operator+=(v16& x, const v16& y) { return x = x + y; }
static inline v16& operator*=(v16& x, const v16& y) { return x = x * y; }
#endif

// f(0) … f(N - 1), each a constant of its own: sums that are found by constants stay in registers.
template <class F, int... K>
static inline void times(const F& f, std::integer_sequence<int, K...>) { (f(std::integral_constant<int, K>{}), ...); }
template <int N, class F>
static inline void times(const F& f) { times(f, std::make_integer_sequence<int, N>{}); }

template <int K>
constexpr std::integral_constant<int, K> at{};

// N vectors, at first 0, found by constants: members instead of an array, for compilers keep arrays in memory, and write
// every sum there with every product.
template <int N>
struct Many {
    v16 first = {};
    Many<N - 1> rest;
    template <int K>
    v16& operator[](std::integral_constant<int, K>) {
        if constexpr (K == 0) return first;
        else return rest[at<K - 1>];
    }
};
template <>
struct Many<0> {};

#if defined(__AVX512F__)
// NOTE Clang forgets a vector's alignment in templates, and takes addresses for multiples of 64
static inline v16 load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, const v16& x) { _mm512_storeu_ps(p, x); }
#elif defined(__AVX__)
static inline v16 load(const float* p) { return by_part([=](int k) -> part { return _mm256_loadu_ps(p + 8 * k); }); }
static inline void store(float* p, const v16& x) { times<PARTS>([&](auto k) { _mm256_storeu_ps(p + 8 * k, x.at[k]); }); }
#else
static inline v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
static inline void store(float* p, const v16& x) { *reinterpret_cast<v16*>(p) = x; }
#endif

// What a function makes of each part.
template <class F>
static inline v16 each(const v16& x, const F& f) {
#if defined(__AVX512F__)
    return f(x);
#else
    return by_part([&](int k) { return f(x.at[k]); });
#endif
}

static inline v16 all(float x) {
    return each(v16{}, [=](part zero) { return x - zero; });
}

static inline v16 larger(const v16& x, const v16& y) {
#if defined(__AVX512F__)
    return x > y ? x : y;
#else
    return by_part([&](int k) { return x.at[k] > y.at[k] ? x.at[k] : y.at[k]; });
#endif
}

// Sixteen bytes as floats; NOTE the compiler's own conversion of such a vector goes through memory, byte by byte.
static inline v16 floats(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return by_part([=](int k) -> part {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * k))));
    });
#else
    v16 y;
    for (int i = 0; i < 16; i++) y[i] = p[i];
    return y;
#endif
}

// The low and the high half of each of sixteen bytes.
static inline void halves(const uint8_t* p, v16& low, v16& high) {
#if defined(__AVX512F__)
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)));
    high = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 4));
#elif defined(__AVX2__)
    for (int k = 0; k < PARTS; k++) {
        __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * k)));
        low.at[k] = _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)));
        high.at[k] = _mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4));
    }
#else
    for (int i = 0; i < 16; i++) low[i] = p[i] & 15, high[i] = p[i] >> 4;
#endif
}

static inline float sum(const v16& x) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// The sums of sixteen vectors, f(0) … f(15), each to the last bit what `sum` makes of it: they are folded two by two, so
// that a register holds partial sums of two, then four, … vectors, and sixteen cost little more than one.
template <class F>
static inline v16 sums(const F& f) {
#if defined(__AVX512F__)
    auto fold8 = [](__m512 x, __m512 y) { return _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee); };
    auto fold4 = [](__m512 x, __m512 y) { return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd); };
    auto fold2 = [](__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0x44) + _mm512_shuffle_ps(x, y, 0xee); };
    auto fold1 = [](__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0x88) + _mm512_shuffle_ps(x, y, 0xdd); };
    auto four = [&](int64_t k) { return fold4(fold8(f(k), f(k + 4)), fold8(f(k + 8), f(k + 12))); };
    return fold1(fold2(four(0), four(1)), fold2(four(2), four(3)));
#elif defined(__AVX2__)
    auto fold8 = [](const v16& x) -> __m256 { return x.at[0] + x.at[1]; };
    auto fold4 = [](__m256 x, __m256 y) { return _mm256_permute2f128_ps(x, y, 0x20) + _mm256_permute2f128_ps(x, y, 0x31); };
    auto fold2 = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x44) + _mm256_shuffle_ps(x, y, 0xee); };
    auto fold1 = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x88) + _mm256_shuffle_ps(x, y, 0xdd); };
    auto two = [&](int64_t k) { return fold4(fold8(f(k)), fold8(f(k + 4))); };
    return by_part([&](int k) -> part { return fold1(fold2(two(8 * k), two(8 * k + 1)), fold2(two(8 * k + 2), two(8 * k + 3))); });
#else
    v16 y;
    for (int k = 0; k < 16; k++) y[k] = sum(f(k));
    return y;
#endif
}

static inline float largest(const v16& x) {
    float y = x[0];
    for (int i = 1; i < 16; i++) y = x[i] > y ? x[i] : y;
    return y;
}

// e^x to about 1 in 10^7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below -87 it is as good as 0.
static inline part exp_of(part x) {
    const part zero = {};
    x = x < zero - 87.0f ? zero - 87.0f : x;
    x = x > zero + 88.0f ? zero + 88.0f : x;
    part t = x * 1.44269504f;
    ints n = __builtin_convertvector(t + (t < zero ? zero - 0.5f : zero + 0.5f), ints);
    part f = __builtin_convertvector(n, part);
    part r = x - f * 0.693359375f + f * 2.12194440e-4f;  // ln 2 in two parts
    part p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<part>((n + 127) << 23);
}

static inline v16 exp(const v16& x) { return each(x, exp_of); }

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

static inline v16 activated(const v16& x, int64_t activation) {
    if (activation == SILU) return each(x, [](part x) { return x / (1.0f + exp_of(-x)); });
    if (activation == GELU_TANH)
        return each(x, [](part x) { return x / (1.0f + exp_of(x * (-1.59576912f - 0.0713548163f * x * x))); });
    v16 y;
    for (int i = 0; i < 16; i++) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.707106781f));
    return y;
}

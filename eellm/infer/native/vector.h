// Sixteen floats at a time, in the compiler's own vector types: one AVX-512 register, two of AVX2, four of NEON.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>

using v16 = float __attribute__((vector_size(64), aligned(4)));
using i16 = int32_t __attribute__((vector_size(64), aligned(4)));

static inline v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
static inline void store(float* p, v16 x) { *reinterpret_cast<v16*>(p) = x; }
static inline v16 all(float x) { return x - v16{}; }

// Sixteen bytes as floats; NOTE the compiler's own conversion of such a vector goes through memory, byte by byte.
static inline v16 floats(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
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
#else
    for (int i = 0; i < 16; i++) low[i] = p[i] & 15, high[i] = p[i] >> 4;
#endif
}

static inline float sum(v16 x) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline float largest(v16 x) {
    float y = x[0];
    for (int i = 1; i < 16; i++) y = x[i] > y ? x[i] : y;
    return y;
}

// e^x to about 1 in 10^7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below -87 it is as good as 0.
static inline v16 exp(v16 x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    v16 t = x * 1.44269504f;
    i16 n = __builtin_convertvector(t + (t < 0.0f ? all(-0.5f) : all(0.5f)), i16);
    v16 f = __builtin_convertvector(n, v16);
    v16 r = x - f * 0.693359375f + f * 2.12194440e-4f;  // ln 2 in two parts
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<v16>((n + 127) << 23);
}

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

static inline v16 activated(v16 x, int64_t activation) {
    if (activation == SILU) return x / (1.0f + exp(-x));
    if (activation == GELU_TANH) return x / (1.0f + exp(x * (-1.59576912f - 0.0713548163f * x * x)));
    v16 y;
    for (int i = 0; i < 16; i++) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.707106781f));
    return y;
}

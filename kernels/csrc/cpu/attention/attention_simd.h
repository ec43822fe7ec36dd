// The vector operations of attention, and elements of every dtype in groups of 4 and 8.
//
// A "unit" is 32 bits of an operand: one float32, or two neighbouring bfloat16. Units are passed as
// float, bit for bit; only Mac interprets them.

#pragma once

#include "simd/vector.h"

#define DIT_ALWAYS static DIT_INLINE

namespace dit {
namespace {

struct Simd {
    static constexpr int lanes = dit::lanes;
    DIT_ALWAYS Vec load(const float* p) { return dit::load(p, Full{}); }
    DIT_ALWAYS void store(float* p, Vec v) { dit::store(p, v, Full{}); }
    DIT_ALWAYS Vec set(float v) { return dit::set(v); }
    DIT_ALWAYS Vec add(Vec a, Vec b) { return a + b; }
    DIT_ALWAYS Vec sub(Vec a, Vec b) { return a - b; }
    DIT_ALWAYS Vec mul(Vec a, Vec b) { return a * b; }
    DIT_ALWAYS Vec fma(Vec a, Vec b, Vec c) { return dit::fma(a, b, c); }
    DIT_ALWAYS float sum_of(Vec v) { return dit::sum_of(v); }
    // max(a, b) is b where one is NaN. power_of_two is 2^n for a whole n in −127 … 127, given as
    // n + 127 + 1.5 · 2^23; 0 for −127.
#ifdef __AVX512F__
    DIT_ALWAYS Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    DIT_ALWAYS float max_of(Vec v) { return _mm512_reduce_max_ps(v); }
    DIT_ALWAYS Vec power_of_two(Vec shifted) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
    }
#else
    DIT_ALWAYS Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    DIT_ALWAYS float max_of(Vec v) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    DIT_ALWAYS Vec power_of_two(Vec shifted) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    }
#endif
};

// 2^v for v ≤ 0, within a factor of 1 ± 2e-8 and two roundings (degree 6) or 1 ± 1.1e-4 (degree 3,
// a twentieth of a bfloat16's rounding). Exactly 1 at 0 and exactly 0 below −126.5; NaN stays NaN,
// because max returns its second operand then, and whatever number NaN's bits make of the power.
// The polynomials are minimax for the relative error on [−1/2, 1/2] with p(0) = 1.
template <int degree>
DIT_ALWAYS Vec exp2_of_negative(Vec v) {
    static_assert(degree == 3 || degree == 6, "the coefficients below");
    const Vec magic = Simd::set(12582912.0f + 127);
    v = Simd::max(Simd::set(-127.0f), v);
    const Vec shifted = Simd::add(v, magic);
    const Vec f = Simd::sub(v, Simd::sub(shifted, magic));
    Vec p;
    if (degree == 3) {
        p = Simd::fma(f, Simd::set(0.0550089292f), Simd::set(0.242210954f));
        p = Simd::fma(f, p, Simd::set(0.693282902f));
    } else {
        p = Simd::fma(f, Simd::set(1.5353362e-4f), Simd::set(1.33988739e-3f));
        p = Simd::fma(f, p, Simd::set(9.61843692e-3f));
        p = Simd::fma(f, p, Simd::set(5.55033237e-2f));
        p = Simd::fma(f, p, Simd::set(0.240226477f));
        p = Simd::fma(f, p, Simd::set(0.693147182f));
    }
    return Simd::mul(Simd::fma(f, p, Simd::set(1.0f)), Simd::power_of_two(shifted));
}

// What lies in memory, read as units: four at a time.
struct Float32 {
    static constexpr int bytes = 4, per_unit = 1;  // bytes of an element, elements in a unit
    DIT_ALWAYS __m128 load4(const char* p) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    }
    DIT_ALWAYS void store8(char* p, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
};

template <class T>
struct Half {
    static constexpr int bytes = 2;
    DIT_ALWAYS void store8(char* p, __m256 v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
    }
};

struct Bfloat16 : Half<Bf16> {
    static constexpr int per_unit = 1;
    DIT_ALWAYS __m128 load4(const char* p) {
        const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
    }
};

struct Float16 : Half<F16> {
    static constexpr int per_unit = 1;
    DIT_ALWAYS __m128 load4(const char* p) {
        return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
};

struct Bfloat16Pairs : Half<Bf16> {
    static constexpr int per_unit = 2;
    DIT_ALWAYS __m128 load4(const char* p) { return Float32::load4(p); }
};

}  // namespace
}  // namespace dit

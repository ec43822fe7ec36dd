// Eight float32 lanes on AVX2, FMA and F16C: half of vector.h. vector_avx512.h has the same names.

#pragma once

namespace dit {
namespace {

using Vec = __m256;
constexpr int lanes = 8;

struct Tail {
    int count;
};

DIT_INLINE Tail tail(int64_t count) { return {static_cast<int>(count)}; }

DIT_INLINE __m256i mask_of(Tail part) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.count),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

DIT_INLINE Vec set(float value) { return _mm256_set1_ps(value); }
DIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
DIT_INLINE Vec keep(Vec v, Tail part) { return _mm256_and_ps(v, _mm256_castsi256_ps(mask_of(part))); }

// The greater magnitude; NaN is greater than all, because the bits are compared.
DIT_INLINE Vec max_magnitude(Vec most, Vec v) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), bits));
}

DIT_INLINE float sum_of(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// The greatest lane of a result of max_magnitude.
DIT_INLINE float max_of(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

DIT_INLINE Vec widen(__m128i bits, Bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
DIT_INLINE Vec widen(__m128i bits, F16) { return _mm256_cvtph_ps(bits); }

DIT_INLINE Vec load(const float* p, Full) { return _mm256_loadu_ps(p); }
DIT_INLINE Vec load(const float* p, Tail part) { return _mm256_maskload_ps(p, mask_of(part)); }
template <class T>
DIT_INLINE Vec load(const T* p, Full) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
DIT_INLINE Vec load(const T* p, Tail part) {
    __m128i bits = _mm_setzero_si128();
    std::memcpy(&bits, p, part.count * sizeof(T));
    return widen(bits, T{});
}

DIT_INLINE void store(float* p, Vec v, Full) { _mm256_storeu_ps(p, v); }
DIT_INLINE void store(float* p, Vec v, Tail part) { _mm256_maskstore_ps(p, mask_of(part), v); }
template <class T>
DIT_INLINE void store(T* p, Vec v, Full) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}
template <class T>
DIT_INLINE void store(T* p, Vec v, Tail part) {
    const __m128i bits = narrow(v, T{});
    std::memcpy(p, &bits, part.count * sizeof(T));
}

// v within ±127, rounded to even, NaN to 0; flip is 0, or 0x80 for code + 128.
DIT_INLINE __m128i codes_of(Vec v, uint8_t flip) {
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                         _mm256_extracti128_si256(whole, 1));
    return _mm_xor_si128(_mm_packs_epi16(half, half), _mm_set1_epi8(static_cast<char>(flip)));
}
DIT_INLINE void store_codes(uint8_t* p, Vec v, uint8_t flip, Full) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), codes_of(v, flip));
}
DIT_INLINE void store_codes(uint8_t* p, Vec v, uint8_t flip, Tail part) {
    const __m128i bits = codes_of(v, flip);
    std::memcpy(p, &bits, part.count);
}

// v within ±limit; NaN stays NaN, because min and max return their second operand then.
DIT_INLINE Vec clamp(Vec v, float limit) {
    return _mm256_max_ps(set(-limit), _mm256_min_ps(set(limit), v));
}

// v rounded to a whole number, ties to even.
DIT_INLINE Vec round_even(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// y · 2^n for whole n, |n| ≤ 253: in two factors, because 2^n alone may be out of range.
DIT_INLINE Vec scale_by_power(Vec y, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
    const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    y = y * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    return y * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}

struct Exp2Parts {
    Vec fraction, power;  // v = power + fraction, fraction in [0, 1]
};
DIT_INLINE Exp2Parts exp2_parts(Vec v) {
    v = clamp(v, 160);
    const Vec whole = _mm256_floor_ps(v);
    return {v - whole, whole};
}

// The 12 bits of rcpps are too few even for bfloat16.
DIT_INLINE Vec rough_reciprocal(Vec v) { return set(1) / v; }

}  // namespace
}  // namespace dit

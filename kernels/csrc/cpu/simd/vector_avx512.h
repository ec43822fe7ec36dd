// Sixteen float32 lanes on AVX-512: half of vector.h. vector_avx2.h has the same names. With
// AVX512-BF16, conversion to bfloat16 is one instruction, which flushes subnormal numbers to zero.

#pragma once

namespace dit {
namespace {

using Vec = __m512;
constexpr int lanes = 16;

struct Tail {
    __mmask16 mask;
};

DIT_INLINE Tail tail(int64_t count) { return {static_cast<__mmask16>((1u << count) - 1)}; }

DIT_INLINE Vec set(float value) { return _mm512_set1_ps(value); }
DIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
DIT_INLINE Vec keep(Vec v, Tail part) { return _mm512_maskz_mov_ps(part.mask, v); }

// The greater magnitude; NaN is greater than all, because the bits are compared.
DIT_INLINE Vec max_magnitude(Vec most, Vec v) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), bits));
}

DIT_INLINE float sum_of(Vec v) { return _mm512_reduce_add_ps(v); }

// The greatest lane of a result of max_magnitude.
DIT_INLINE float max_of(Vec v) {
    const int bits = _mm512_reduce_max_epi32(_mm512_castps_si512(v));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}

DIT_INLINE Vec widen(__m256i bits, Bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
DIT_INLINE Vec widen(__m256i bits, F16) { return _mm512_cvtph_ps(bits); }

DIT_INLINE __m256i narrow(Vec v, Bf16) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i carried = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i high = _mm512_srli_epi32(carried, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
DIT_INLINE __m256i narrow(Vec v, F16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

DIT_INLINE Vec load(const float* p, Full) { return _mm512_loadu_ps(p); }
DIT_INLINE Vec load(const float* p, Tail part) { return _mm512_maskz_loadu_ps(part.mask, p); }
template <class T>
DIT_INLINE Vec load(const T* p, Full) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
DIT_INLINE Vec load(const T* p, Tail part) {
    return widen(_mm256_maskz_loadu_epi16(part.mask, p), T{});
}

DIT_INLINE void store(float* p, Vec v, Full) { _mm512_storeu_ps(p, v); }
DIT_INLINE void store(float* p, Vec v, Tail part) { _mm512_mask_storeu_ps(p, part.mask, v); }
template <class T>
DIT_INLINE void store(T* p, Vec v, Full) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}
template <class T>
DIT_INLINE void store(T* p, Vec v, Tail part) {
    _mm256_mask_storeu_epi16(p, part.mask, narrow(v, T{}));
}

// v within ±127, rounded to even, NaN to 0; flip is 0, or 0x80 for code + 128.
DIT_INLINE __m128i codes_of(Vec v, uint8_t flip) {
    const __mmask16 ordered = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __m512i whole = _mm512_maskz_cvtps_epi32(ordered, v);
    const __m128i codes = _mm512_cvtsepi32_epi8(whole);
    return _mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(flip)));
}
DIT_INLINE void store_codes(uint8_t* p, Vec v, uint8_t flip, Full) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes_of(v, flip));
}
DIT_INLINE void store_codes(uint8_t* p, Vec v, uint8_t flip, Tail part) {
    _mm_mask_storeu_epi8(p, part.mask, codes_of(v, flip));
}

// v within ±limit; NaN stays NaN, because min and max return their second operand then.
DIT_INLINE Vec clamp(Vec v, float limit) {
    return _mm512_max_ps(set(-limit), _mm512_min_ps(set(limit), v));
}

DIT_INLINE Vec round_even(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// y · 2^floor(n).
DIT_INLINE Vec scale_by_power(Vec y, Vec n) { return _mm512_scalef_ps(y, n); }

struct Exp2Parts {
    Vec fraction, power;  // v = floor(power) + fraction, fraction in [0, 1]
};
DIT_INLINE Exp2Parts exp2_parts(Vec v) {
    return {_mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), v};  // 0 for ±inf
}

// Within a factor of 1 ± 2^-14.
DIT_INLINE Vec rough_reciprocal(Vec v) { return _mm512_rcp14_ps(v); }

}  // namespace
}  // namespace dit

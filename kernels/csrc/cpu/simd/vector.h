// float32 vectors of AVX2 or AVX-512, as the file is compiled, and what both have in common.
//
// A part is Full{} or a Tail of 1 to lanes − 1 elements: what lies beyond a tail is read as 0 and
// never touched in memory, so the end of a row rounds as its middle does.

#pragma once

// The headers of g++ 12 make undefined vectors by `x = x`, which g++ 12 then warns of (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define DIT_INLINE inline __attribute__((always_inline))

namespace dit {

// Element types as they lie in memory.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

namespace {

struct Full {};

// To the nearest, ties to even; NaN stays NaN.
DIT_INLINE __m128i narrow(__m256 v, Bf16) {
#ifdef __AVX512BF16__
    return (__m128i)_mm256_cvtneps_pbh(v);
#else
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i carried = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(carried, 16),
                                            _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#endif
}
DIT_INLINE __m128i narrow(__m256 v, F16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace
}  // namespace dit

#ifdef __AVX512F__
#include "vector_avx512.h"
#else
#include "vector_avx2.h"
#endif

namespace dit {
namespace {

DIT_INLINE Vec add(Vec a, Vec b) { return a + b; }
DIT_INLINE Vec sub(Vec a, Vec b) { return a - b; }
DIT_INLINE Vec mul(Vec a, Vec b) { return a * b; }
DIT_INLINE Vec div(Vec a, Vec b) { return a / b; }
DIT_INLINE Vec keep(Vec v, Full) { return v; }

// v as it would come back from memory after a store.
DIT_INLINE Vec rounded(Vec v, float) { return v; }
template <class T>
DIT_INLINE Vec rounded(Vec v, T type) {
    return widen(narrow(v, type), type);
}

}  // namespace
}  // namespace dit

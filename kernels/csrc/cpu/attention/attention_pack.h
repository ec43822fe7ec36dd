// One head of the projection, copied into the order in which attention multiplies it.
//
// Sizes are in units of 32 bits: a row of a head has d / Source::per_unit of them, padded with
// zeros to `depth`. Rows from t on are read as zeros.

#pragma once

#include "attention_simd.h"

namespace dit {
namespace {

alignas(64) constexpr char attention_zeros[128 * 4] = {};

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// One of q, k, v of one head: rows `stride` bytes apart.
struct Rows {
    const char* first;
    int64_t stride, t;
    const char* at(int64_t row) const { return row < t ? first + row * stride : attention_zeros; }
};

DIT_ALWAYS void fill_zeros(float* units, int64_t count) {
    for (int64_t i = 0; i < count; ++i) units[i] = 0;
}

// rows [first, first + count) → packed [count][depth].
template <class Source>
static void pack_queries(const Rows& q, int64_t first, int64_t count, int64_t units, int64_t depth,
                         float* packed) {
    for (int64_t r = 0; r < count; ++r, packed += depth) {
        const char* row = q.at(first + r);
        for (int64_t i = 0; i < units; i += 4)
            _mm_storeu_ps(packed + i, Source::load4(row + i * Source::bytes * Source::per_unit));
        fill_zeros(packed + units, depth - units);
    }
}

// `count` rows, a multiple of 8 → strips [count / strip][depth][strip]: the transpose, in pieces.
template <class Source>
static void pack_keys(const Rows& k, int64_t count, int64_t units, int64_t depth, int64_t strip,
                      float* packed) {
    for (int64_t row = 0; row < count; row += 8) {
        float* to = packed + row / strip * strip * depth + row % strip;
        const char* from[8];
        for (int r = 0; r < 8; ++r) from[r] = k.at(row + r);
        for (int64_t i = 0; i < units; i += 4) {  // 8 rows of 4 → 4 rows of 8
            const int64_t at = i * Source::bytes * Source::per_unit;
            const auto both = [&](int r) {
                const __m256 low = _mm256_castps128_ps256(Source::load4(from[r] + at));
                return _mm256_insertf128_ps(low, Source::load4(from[r + 4] + at), 1);
            };
            const __m256 r0 = both(0), r1 = both(1), r2 = both(2), r3 = both(3);
            const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
            const __m256 c = _mm256_unpacklo_ps(r2, r3), e = _mm256_unpackhi_ps(r2, r3);
            _mm256_storeu_ps(to + (i + 0) * strip, _mm256_shuffle_ps(a, c, 0x44));
            _mm256_storeu_ps(to + (i + 1) * strip, _mm256_shuffle_ps(a, c, 0xee));
            _mm256_storeu_ps(to + (i + 2) * strip, _mm256_shuffle_ps(b, e, 0x44));
            _mm256_storeu_ps(to + (i + 3) * strip, _mm256_shuffle_ps(b, e, 0xee));
        }
        for (int64_t i = units; i < depth; ++i)
            _mm256_storeu_ps(to + i * strip, _mm256_setzero_ps());
    }
}

// `count` rows of d elements → [count / per_unit][width]: as they are, or the elements of each two
// rows side by side. width is d, padded with zeros.
template <class Source>
static void pack_values(const Rows& v, int64_t count, int64_t d, int64_t width, float* packed) {
    for (int64_t row = 0; row < count; row += Source::per_unit, packed += width) {
        if (Source::per_unit == 1) {
            const char* from = v.at(row);
            for (int64_t i = 0; i < d; i += 4)
                _mm_storeu_ps(packed + i, Source::load4(from + i * Source::bytes));
        } else {
            const char *even = v.at(row), *odd = v.at(row + 1);
            for (int64_t i = 0; i < d; i += 8) {
                const __m128i a = _mm_castps_si128(Source::load4(even + 2 * i));
                const __m128i b = _mm_castps_si128(Source::load4(odd + 2 * i));
                _mm_storeu_ps(packed + i, _mm_castsi128_ps(_mm_unpacklo_epi16(a, b)));
                _mm_storeu_ps(packed + i + 4, _mm_castsi128_ps(_mm_unpackhi_epi16(a, b)));
            }
        }
        fill_zeros(packed + d, width - d);
    }
}

}  // namespace
}  // namespace dit

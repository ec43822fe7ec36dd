// C = A·B, or C = diag(rescale)·C + A·B, on vector registers, for the two products of attention.
//
// A (rows, steps) units with `lda` between rows; B (steps, columns) units with `ldb`; C float32
// with `ldc`. Mac::mac(c, a, b) is c + a·b of one unit: one product, or the sum of two.
//
// A register block is 4 rows × up to most_vectors vectors: each step reads 4 units and that many
// vectors for 4 times as many operations, and the sums, the vectors of B and one of A fit the
// registers (16 of AVX2: 12 + 3 + 1, 32 of AVX-512: 24 + 6 + 1).

#pragma once

#include "attention_pack.h"

namespace dit {
namespace {

constexpr int most_vectors = Simd::lanes == 16 ? 6 : 3;
constexpr int row_block = 4;

struct Operands {
    const float* a;
    int64_t lda;
    const float* b;
    int64_t ldb;
    float* c;
    int64_t ldc;
    int64_t rows, steps;   // rows: a multiple of row_block
    const float* rescale;  // (rows); null: what C held is not read
};

template <class Mac, int vectors>
static void product_of(const Operands& o) {
    for (int64_t row = 0; row < o.rows; row += row_block) {
        float* c = o.c + row * o.ldc;
        Vec sum[row_block][vectors];
#pragma GCC unroll 4
        for (int r = 0; r < row_block; ++r)
#pragma GCC unroll 6
            for (int v = 0; v < vectors; ++v)
                sum[r][v] = Simd::set(0);
        const float *a0 = o.a + row * o.lda, *b = o.b;
        const float *a1 = a0 + o.lda, *a2 = a1 + o.lda, *a3 = a2 + o.lda;
        for (int64_t k = 0; k < o.steps; ++k, b += o.ldb) {
            Vec right[vectors];
#pragma GCC unroll 6
            for (int v = 0; v < vectors; ++v) right[v] = Simd::load(b + v * Simd::lanes);
            const float* left[row_block] = {a0 + k, a1 + k, a2 + k, a3 + k};
#pragma GCC unroll 4
            for (int r = 0; r < row_block; ++r) {
                const Vec one = Simd::set(*left[r]);
#pragma GCC unroll 6
                for (int v = 0; v < vectors; ++v)
                    sum[r][v] = Mac::mac(sum[r][v], one, right[v]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < row_block; ++r)
#pragma GCC unroll 6
            for (int v = 0; v < vectors; ++v) {
                float* at = c + r * o.ldc + v * Simd::lanes;
                // Added last: sums of short sums err less than one long sum.
                if (o.rescale)
                    sum[r][v] = Simd::fma(Simd::load(at), Simd::set(o.rescale[row + r]), sum[r][v]);
                Simd::store(at, sum[r][v]);
            }
    }
}

// `columns` is a multiple of Simd::lanes.
template <class Mac>
static void product(Operands o, int64_t columns) {
    int64_t left = columns / Simd::lanes;
    while (left > 0) {
        // Seven and eight vectors as 4 + 3 and 4 + 4, not 6 and a thin rest.
        const int64_t now = left <= most_vectors ? left : most_vectors == 6 ? 4 : 3;
        switch (now) {
            case 1: product_of<Mac, 1>(o); break;
            case 2: product_of<Mac, 2>(o); break;
            case 3: product_of<Mac, 3>(o); break;
#ifdef __AVX512F__
            case 4: product_of<Mac, 4>(o); break;
            case 5: product_of<Mac, 5>(o); break;
            case 6: product_of<Mac, 6>(o); break;
#endif
        }
        o.b += now * Simd::lanes;
        o.c += now * Simd::lanes;
        left -= now;
    }
}

constexpr int most_queries = 32;
alignas(64) constexpr float ones[most_queries] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Both products of attention, for any Mac. Scores are sums of sums of at most Mac::longest_sum
// units, as they are what the exponential magnifies.
template <class Mac>
struct VectorProducts {
    static constexpr int depth_multiple = 1, key_multiple = Simd::lanes * Mac::per_unit;
    static constexpr int row_multiple = row_block;
    static constexpr int strip = Simd::lanes * (Simd::lanes == 16 ? 4 : 3);
    DIT_ALWAYS void enter() {}
    DIT_ALWAYS void leave() {}
    static void scores(const Operands& o, int64_t keys) {
        Operands piece = o;
        for (int64_t k = 0; k < o.steps; k += Mac::longest_sum) {
            piece.a = o.a + k;
            piece.b = o.b + k * o.ldb;
            piece.steps = o.steps - k < Mac::longest_sum ? o.steps - k : Mac::longest_sum;
            piece.rescale = k ? ones : nullptr;
            product<Mac>(piece, round_up(keys, Simd::lanes));
        }
    }
    static void values(const Operands& o, int64_t width) { product<Mac>(o, width); }
};

}  // namespace
}  // namespace dit

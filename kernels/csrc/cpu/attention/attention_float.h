// Attention in float32 arithmetic, for every dtype: AVX2 and AVX-512 alike.

#pragma once

#include "attention_flash.h"

namespace dit {
namespace {

struct FloatMac {
    static constexpr int per_unit = 1, longest_sum = 24;
    DIT_ALWAYS Vec mac(Vec c, Vec a, Vec b) { return Simd::fma(a, b, c); }
};

// A block of values, 96 or 128 rows of at most 512 bytes, is read once for every 4 queries, so it has
// to stay in the nearest cache.
struct FloatBlocks {
    static constexpr int queries = 32, keys = Simd::lanes == 16 ? 128 : 96, degree = 6;
    template <class Weight>
    DIT_ALWAYS Vec put(const Weight& weight, int64_t j, float* to) {
        const Vec w = weight(j);
        Simd::store(to, w);
        return w;
    }
};

static int float_attention(const AttentionCall& call) {
    using Products = VectorProducts<FloatMac>;
    switch (call.dtype) {
        case f32: return flash_attention<Float32, Products, FloatBlocks>(call);
        case bf16: return flash_attention<Bfloat16, Products, FloatBlocks>(call);
        case f16: return flash_attention<Float16, Products, FloatBlocks>(call);
    }
    return bad_dtype;
}

}  // namespace
}  // namespace dit

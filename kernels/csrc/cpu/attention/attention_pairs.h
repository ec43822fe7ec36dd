// The softmax's weights as pairs of bfloat16, for AVX512-BF16 and AMX.

#pragma once

#include "attention_flash.h"

namespace dit {
namespace {

template <int queries_, int keys_>
struct PairBlocks {
    static constexpr int queries = queries_, keys = keys_, degree = 3;
    // The weights are summed before rounding, whose errors go to either side alike.
    template <class Weight>
    DIT_ALWAYS Vec put(const Weight& weight, int64_t j, float* to) {
        const Vec low = weight(j), high = weight(j + Simd::lanes);
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        return Simd::add(low, high);
    }
};

}  // namespace
}  // namespace dit

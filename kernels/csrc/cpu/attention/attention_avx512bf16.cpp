#include "attention_pairs.h"

namespace dit {
namespace {

struct PairMac {
    static constexpr int per_unit = 2, longest_sum = attention_most_d;
    DIT_ALWAYS Vec mac(Vec c, Vec a, Vec b) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
};

}  // namespace

int attention_bf16_avx512bf16(const AttentionCall& call) {
    return flash_attention<Bfloat16Pairs, VectorProducts<PairMac>, PairBlocks<32, 128>>(call);
}

}  // namespace dit

#include "attention_float.h"

namespace dit {

int attention_avx2(const AttentionCall& call) { return float_attention(call); }

}  // namespace dit

#include "attention_float.h"

namespace dit {

int attention_avx512(const AttentionCall& call) { return float_attention(call); }

}  // namespace dit

#include "attention_float.h"

int dit::attention_avx2(const AttentionCall& call) { return float_attention(call); }

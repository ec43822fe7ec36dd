#include "attention_float.h"

int dit::attention_avx512(const AttentionCall& call) { return float_attention(call); }

// Attention on the packed projection: what attention.cpp and its variants share.

#pragma once

#include <cstddef>
#include <cstdint>

namespace dit {

// qkv (n, t, 3, heads, d) → out (n, t, heads · d), both contiguous and of one dtype;
// out = softmax(q kᵀ / √d) v. d is a multiple of 8, at most attention_most_d.
struct AttentionCall {
    const void* qkv;
    void* out;
    int64_t n, t, heads, d;
    int dtype, threads;
};

constexpr int64_t attention_most_d = 128;

int attention_avx2(const AttentionCall& call);
int attention_avx512(const AttentionCall& call);
int attention_bf16_avx512bf16(const AttentionCall& call);
int attention_bf16_amx(const AttentionCall& call);

// At least `bytes` of the calling thread's own memory, aligned to 64; null if there is none. It
// stays until the thread ends: a fresh piece for every call would cost its page faults each time.
void* attention_scratch(size_t bytes);

}  // namespace dit

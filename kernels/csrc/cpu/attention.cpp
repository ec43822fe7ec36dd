#include "attention.h"

#include <cstdlib>

#include "isa.h"

namespace dit {
namespace {

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;

}  // namespace

void* attention_scratch(size_t bytes) {
    if (bytes > scratch.bytes) {
        std::free(scratch.memory);
        scratch.bytes = 0;
        if (posix_memalign(&scratch.memory, 64, bytes) != 0) scratch.memory = nullptr;
        if (scratch.memory) scratch.bytes = bytes;
    }
    return scratch.memory;
}

}  // namespace dit

// See AttentionCall. bfloat16 is multiplied as such from Isa::avx512_bf16 on, with float32 sums and
// the softmax's weights rounded to bfloat16; everything else in float32.
extern "C" DIT_API int dit_attention(const void* qkv, void* out, int64_t n, int64_t t,
                                     int64_t heads, int64_t d, int dtype, int threads) {
    using namespace dit;
    if (dtype != f32 && dtype != bf16 && dtype != f16) return bad_dtype;
    if (threads < 1) return bad_threads;
    if (n < 0 || t < 0 || heads < 1 || d < 8 || d > attention_most_d || d % 8) return bad_size;
    if (n == 0 || t == 0) return ok;
    if (!qkv || !out) return null_pointer;
    const uintptr_t alignment = dtype == f32 ? 4 : 2;
    if ((reinterpret_cast<uintptr_t>(qkv) | reinterpret_cast<uintptr_t>(out)) % alignment)
        return misaligned;
    const AttentionCall call{qkv, out, n, t, heads, d, dtype, threads};
    const Isa level = isa();
    if (dtype == bf16 && level >= Isa::amx) return attention_bf16_amx(call);
    if (dtype == bf16 && level >= Isa::avx512_bf16) return attention_bf16_avx512bf16(call);
    if (level >= Isa::avx512) return attention_avx512(call);
    if (level >= Isa::avx2) return attention_avx2(call);
    return no_isa;
}

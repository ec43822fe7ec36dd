#include "attention.h"

#include <cstdlib>

#include "checks.h"

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
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(heads >= 1 && d >= 8 && d <= attention_most_d && d % 8 == 0, bad_size);
    DIT_CHECK(sizes_fit(n, t, heads, d, 3), bad_size);
    if (n == 0 || t == 0) return ok;
    DIT_CHECK_POINTERS({qkv, size_of(dtype)}, {out, size_of(dtype)});
    const AttentionCall call{qkv, out, n, t, heads, d, dtype, threads};
    const Isa level = isa();
    if (dtype == bf16 && level >= Isa::amx) return attention_bf16_amx(call);
    if (dtype == bf16 && level >= Isa::avx512_bf16) return attention_bf16_avx512bf16(call);
    if (level >= Isa::avx512) return attention_avx512(call);
    if (level >= Isa::avx2) return attention_avx2(call);
    return no_isa;
}

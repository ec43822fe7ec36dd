// The AMX attention on emulated tiles, as a library for test_amx_emulation.py.
// Compiled with DIT_EMULATED_TILES; attention_tiles_emulated.h says what this proves.

#include <cstdlib>

#include "../../kernels/csrc/cpu/attention/attention_amx.cpp"
#include "../../kernels/csrc/cpu/pool/pool.cpp"

namespace dit {

// A fresh piece of exactly the size asked for, full of NaN: reading what was not written shows.
void* attention_scratch(size_t bytes) {
    struct Piece {
        void* memory = nullptr;
        ~Piece() { std::free(memory); }
    };
    thread_local Piece piece;
    std::free(piece.memory);
    if (posix_memalign(&piece.memory, 64, bytes) != 0) return piece.memory = nullptr;
    __builtin_memset(piece.memory, 0xff, bytes);
    return piece.memory;
}

}  // namespace dit

extern "C" int emulated_attention(const void* qkv, void* out, int64_t n, int64_t t, int64_t heads,
                                  int64_t d, int threads) {
    return dit::attention_bf16_amx({qkv, out, n, t, heads, d, dit::bf16, threads});
}

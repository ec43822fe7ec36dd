// The AMX attention on tile registers emulated in plain C++, as a library for test_amx_emulation.py.
//
// It proves the algorithm: shapes, strides, packing, padding, which tile holds what, the order of
// the sums, that tiles are configured before use and not used after release, and the numbers, to
// the rounding of TDPBF16PS (Intel's manual, volume 2: even and odd products are summed apart and
// fused, then added; subnormal inputs and results are zero). It does not prove the instructions'
// encoding, the operating system's permission, what the compiler does around the real ones, nor
// anything about time.

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace dit {
namespace {

thread_local bool configured = false;
thread_local uint32_t tiles[8][16][16];

float float_of(uint32_t bits) {
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
float flushed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return float_of(bits);
}

auto& tile(int number) {
    if (!configured) std::abort();  // the processor raises #UD
    return tiles[number];
}
void tile_configure() {
    configured = true;
    std::memset(tiles, 0, sizeof tiles);
}
void tile_release() { configured = false; }
template <int number>
void tile_zero() {
    std::memset(tile(number), 0, sizeof tiles[0]);
}
template <int number>
void tile_load(const float* from, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r)
        std::memcpy(tile(number)[r], reinterpret_cast<const char*>(from) + r * row_bytes, 64);
}
template <int number>
void tile_store(float* to, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r)
        std::memcpy(reinterpret_cast<char*>(to) + r * row_bytes, tile(number)[r], 64);
}
template <int sum, int a, int b>
void tile_dp() {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; ++k) {
                const uint32_t x = tile(a)[m][k], y = tile(b)[k][n];
                even = flushed(__builtin_fmaf(float_of(x << 16), float_of(y << 16), even));
                odd = flushed(__builtin_fmaf(float_of(x & 0xffff0000), float_of(y & 0xffff0000), odd));
            }
            const float all = flushed(float_of(tile(sum)[m][n]) + flushed(even + odd));
            std::memcpy(&tile(sum)[m][n], &all, 4);
        }
}

}  // namespace
}  // namespace dit

#define DIT_EMULATED_TILES
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
    std::memset(piece.memory, 0xff, bytes);
    return piece.memory;
}

}  // namespace dit

extern "C" int emulated_attention(const void* qkv, void* out, int64_t n, int64_t t, int64_t heads,
                                  int64_t d, int threads) {
    return dit::attention_bf16_amx({qkv, out, n, t, heads, d, dit::bf16, threads});
}

// attention_tiles.h in plain C++, for machines without AMX.
//
// It proves the algorithm: shapes, strides, packing, padding, which tile holds what, the order of
// the sums, that tiles are configured before use and not used after release, and the numbers, to
// the rounding of TDPBF16PS (Intel's manual, volume 2: even and odd products are summed apart and
// fused, then added; subnormal inputs and results are zero). It does not prove the instructions'
// encoding, the operating system's permission, what the compiler does around the real ones, nor
// anything about time.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace dit {
namespace {

struct EmulatedTiles {
    bool configured = false;
    uint32_t row[8][16][16];
};
thread_local EmulatedTiles emulated;

static float float_of(uint32_t bits) {
    float value;
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
static uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return (bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits;
}
static void need_configuration() {
    if (!emulated.configured) std::abort();  // the processor raises #UD
}

static inline void tile_configure() {
    emulated = EmulatedTiles();
    emulated.configured = true;
}
static inline void tile_release() { emulated.configured = false; }

template <int tile>
static inline void tile_zero() {
    need_configuration();
    __builtin_memset(emulated.row[tile], 0, sizeof emulated.row[tile]);
}
template <int tile>
static inline void tile_load(const float* from, int64_t row_bytes) {
    need_configuration();
    for (int r = 0; r < 16; ++r)
        __builtin_memcpy(emulated.row[tile][r],
                         reinterpret_cast<const char*>(from) + r * row_bytes, 64);
}
template <int tile>
static inline void tile_store(float* to, int64_t row_bytes) {
    need_configuration();
    for (int r = 0; r < 16; ++r)
        __builtin_memcpy(reinterpret_cast<char*>(to) + r * row_bytes, emulated.row[tile][r], 64);
}
template <int sum, int a, int b>
static inline void tile_dp() {
    need_configuration();
    const auto& left = emulated.row[a];
    const auto& right = emulated.row[b];
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; ++k) {
                const uint32_t x = left[m][k], y = right[k][n];
                even = float_of(bits_of(
                    __builtin_fmaf(float_of(x << 16), float_of(y << 16), even)));
                odd = float_of(bits_of(__builtin_fmaf(float_of(x & 0xffff0000),
                                                      float_of(y & 0xffff0000), odd)));
            }
            const float both = float_of(bits_of(even + odd));
            emulated.row[sum][m][n] = bits_of(float_of(emulated.row[sum][m][n]) + both);
        }
}

}  // namespace
}  // namespace dit

// The tile operations of AMX, each one instruction; every tile is 16 rows of 64 bytes.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dit {
namespace {

struct alignas(64) TileConfiguration {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Static, because the compiler does not know that _tile_loadconfig reads what its pointer points to,
// and would drop the stores to a local variable.
static const TileConfiguration tile_configuration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Each thread calls this before any other; isa() has got the permission of the kernel.
static inline void tile_configure() {
    __asm__ volatile("" : : "r"(&tile_configuration) : "memory");
    _tile_loadconfig(&tile_configuration);
}
static inline void tile_release() { _tile_release(); }

// g++ 12's own tile intrinsics take the tile's number as a literal token and tell the compiler
// nothing of the memory read or written; these do.
template <int tile>
static inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
static inline void tile_load(const float* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(row_bytes)
                     : "memory");
}
template <int tile>
static inline void tile_store(float* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(row_bytes)
                     : "memory");
}
// sum += a · b: (16, 32) bfloat16 by (16 pairs, 16, 2) bfloat16 into (16, 16) float32.
template <int sum, int a, int b>
static inline void tile_dp() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

}  // namespace
}  // namespace dit

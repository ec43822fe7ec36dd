// bfloat16 attention on AMX tiles. Each tile is 16 rows of 64 bytes.

#include "attention_pairs.h"

namespace dit {
namespace {

#ifndef DIT_EMULATED_TILES  // tests/kernels/amx_emulation.cpp has its own, for machines without AMX
struct alignas(64) TileConfiguration {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Not a local variable, because the compiler does not know that _tile_loadconfig reads what its
// pointer points to, and would drop the stores.
const TileConfiguration tile_configuration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Each thread calls this before any other; isa() has got the permission of the kernel.
inline void tile_configure() {
    __asm__ volatile("" : : "r"(&tile_configuration) : "memory");
    _tile_loadconfig(&tile_configuration);
}
inline void tile_release() { _tile_release(); }

// g++ 12's own tile intrinsics take the tile's number as a literal token and tell the compiler
// nothing of the memory read or written; these do.
template <int tile>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
inline void tile_load(const float* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(row_bytes)
                     : "memory");
}
template <int tile>
inline void tile_store(float* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(row_bytes)
                     : "memory");
}
// sum += a · b: (16, 32) bfloat16 by (16 pairs, 16, 2) bfloat16 into (16, 16) float32.
template <int sum, int a, int b>
inline void tile_dp() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}
#endif

constexpr int tile_rows = 16, tile_units = 16;

// Two tiles of A's rows by two of B's columns: four operations for four loads. The operation's time
// is that of A's rows, whatever share of the 16 units a step uses, so d = 72 costs three steps, 32 +
// 32 + 8 padded to 32. The last 8 by vdpbf16ps, 4 for each row of 16 scores, would be 64
// instructions a tile where the padded step takes 16 cycles.
//
// Tiles 0…3 sum, 4 and 5 hold A, 6 and 7 hold B.
template <bool two_columns>
void tile_block(const Operands& o, int64_t row, int64_t column, bool add) {
    const int64_t lda = 4 * o.lda, ldb = 4 * o.ldb, ldc = 4 * o.ldc;  // bytes
    float* c0 = o.c + row * o.ldc + column;
    float* c1 = c0 + tile_rows * o.ldc;
    if (add) {
        tile_load<0>(c0, ldc);
        tile_load<2>(c1, ldc);
        if (two_columns) tile_load<1>(c0 + 16, ldc);
        if (two_columns) tile_load<3>(c1 + 16, ldc);
    } else {
        tile_zero<0>();
        tile_zero<2>();
        if (two_columns) tile_zero<1>();
        if (two_columns) tile_zero<3>();
    }
    const float* a = o.a + row * o.lda;
    const float* b = o.b + column;
    for (int64_t k = 0; k < o.steps; k += tile_units, a += tile_units, b += tile_units * o.ldb) {
        tile_load<4>(a, lda);
        tile_load<6>(b, ldb);
        tile_dp<0, 4, 6>();
        tile_load<5>(a + tile_rows * o.lda, lda);
        tile_dp<2, 5, 6>();
        if (two_columns) {
            tile_load<7>(b + 16, ldb);
            tile_dp<1, 4, 7>();
            tile_dp<3, 5, 7>();
        }
    }
    tile_store<0>(c0, ldc);
    tile_store<2>(c1, ldc);
    if (two_columns) tile_store<1>(c0 + 16, ldc);
    if (two_columns) tile_store<3>(c1 + 16, ldc);
}

struct TileProducts {
    static constexpr int row_multiple = 2 * tile_rows, depth_multiple = tile_units;
    static constexpr int key_multiple = 32, strip = 64;
    DIT_ALWAYS void enter() { tile_configure(); }
    DIT_ALWAYS void leave() { tile_release(); }

    static void columns(const Operands& o, int64_t count, bool add) {
        for (int64_t column = 0; column < count; column += 32)
            for (int64_t row = 0; row < o.rows; row += 2 * tile_rows)
                if (count - column > 16)
                    tile_block<true>(o, row, column, add);
                else
                    tile_block<false>(o, row, column, add);
    }
    static void scores(const Operands& o, int64_t keys) { columns(o, keys, false); }

    static void values(const Operands& o, int64_t width) {
        if (o.rescale)
            for (int64_t r = 0; r < o.rows; ++r)
                for (int64_t i = 0; i < width; i += Simd::lanes) {
                    float* at = o.c + r * o.ldc + i;
                    Simd::store(at, Simd::mul(Simd::load(at), Simd::set(o.rescale[r])));
                }
        columns(o, width, o.rescale != nullptr);
    }
};

}  // namespace

int attention_bf16_amx(const AttentionCall& call) {
    return flash_attention<Bfloat16Pairs, TileProducts, PairBlocks<32, 256>>(call);
}

}  // namespace dit

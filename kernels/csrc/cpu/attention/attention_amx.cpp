// bfloat16 attention on AMX tiles.
//
// Compiled with DIT_EMULATED_TILES, the same algorithm runs on attention_tiles_emulated.h; see
// there what that proves.

#include "attention_pairs.h"

#ifdef DIT_EMULATED_TILES
#include "attention_tiles_emulated.h"
#else
#include "attention_tiles.h"
#endif

namespace dit {
namespace {

constexpr int tile_rows = 16, tile_units = 16;

// Two tiles of A's rows by two of B's columns: four operations for four loads. The operation's time
// is that of A's rows, whatever share of the 16 units a step uses, so d = 72 costs three steps, 32 +
// 32 + 8 padded to 32. The last 8 by vdpbf16ps, 4 for each row of 16 scores, would be 64
// instructions a tile where the padded step takes 16 cycles.
//
// Tiles 0…3 sum, 4 and 5 hold A, 6 and 7 hold B.
template <bool two_columns>
static void tile_block(const Operands& o, int64_t row, int64_t column, bool add) {
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

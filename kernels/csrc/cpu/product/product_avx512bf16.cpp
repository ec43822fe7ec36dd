// Products of rows with packed panels (product.h).
//
// A block is 8 rows × 3 vectors of sums in registers: a step reads 3 vectors of weights and 8 words
// of x for 24 multiplications. A panel stays in the second-level cache while all rows pass by; the
// processor's own prefetching brings the next one.

#include <cstring>

#include "pool/parallel.h"
#include "product.h"
#include "simd/vector_math.h"

namespace dit {
namespace {

constexpr int block_rows = 8;

// mac(sum, x, w): sum + the products of one step. depth: steps that are added up one by one before
// their sum joins that of the steps before; sums of short sums err less than one long sum.
struct F32Steps {
    using Sum = Vec;
    static constexpr int64_t elements = 1, depth = 192;
    static DIT_INLINE Sum zero() { return set(0); }
    static DIT_INLINE Sum mac(Sum sum, __m512i x, __m512i w) {
        return fma(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
    }
    static DIT_INLINE Sum join(Sum a, Sum b) { return add(a, b); }
};

struct Bf16Steps : F32Steps {
    static constexpr int64_t elements = 2, depth = 576;
    static DIT_INLINE Sum mac(Sum sum, __m512i x, __m512i w) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
};

struct CodeSteps {
    using Sum = __m512i;
    static constexpr int64_t elements = 4, depth = 1 << 20;
    static DIT_INLINE Sum zero() { return _mm512_setzero_si512(); }
    static DIT_INLINE Sum mac(Sum sum, __m512i x, __m512i w) {
        // g++ 12 keeps the intrinsic's sums on the stack.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
        return sum;
    }
    static DIT_INLINE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
};

struct Block {
    const char* x;  // its first row at the first step
    int64_t row_bytes;
    const char* weights;
    int64_t steps;      // whole ones
    int64_t odd_bytes;  // of x after them, if K ends within a step
    void* sums;         // rows · vectors of Sum
    bool joins;         // the sums of earlier steps are there
};

DIT_INLINE int whole_word(const char* p) {
    int word;
    std::memcpy(&word, p, 4);
    return word;
}

// Its first 1 to 3 bytes, then zeros.
DIT_INLINE int part_of_word(const char* p, int64_t bytes) {
    const auto* byte = reinterpret_cast<const unsigned char*>(p);
    return byte[0] | (bytes > 1 ? byte[1] << 8 : 0) | (bytes > 2 ? byte[2] << 16 : 0);
}

template <class Steps, int rows, int vectors>
__attribute__((noinline)) void multiply(const Block& block) {
    using Sum = typename Steps::Sum;
    Sum sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) sum[r][v] = Steps::zero();

    const char* weights = block.weights;
    const auto step = [&](const char* x, const auto& word) __attribute__((always_inline)) {
        // Every third row has a pointer of its own, and reaches the others by its addressing mode.
        const char* third[3] = {x, x + 3 * block.row_bytes, x + 6 * block.row_bytes};
        __m512i w[vectors];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) w[v] = _mm512_load_si512(weights + 64 * v);
        weights += 64 * vectors;
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            __m512i all = _mm512_set1_epi32(word(third[r / 3] + r % 3 * block.row_bytes));
            // One load for all vectors: without this, each multiplication repeats it.
            asm("" : "+v"(all));
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v) sum[r][v] = Steps::mac(sum[r][v], all, w[v]);
        }
    };
    const char* x = block.x;
    for (const char* end = x + 4 * block.steps; x < end; x += 4) step(x, whole_word);
    if (block.odd_bytes > 0) {
        step(x, [&](const char* p) { return part_of_word(p, block.odd_bytes); });
    }

    Sum* out = static_cast<Sum*>(block.sums);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v, ++out)
            *out = block.joins ? Steps::join(*out, sum[r][v]) : sum[r][v];
}

template <class Steps, int vectors>
void multiply_rows(Block block, int64_t rows) {
    const auto advance = [&](int done) {
        block.x += done * block.row_bytes;
        block.sums = static_cast<typename Steps::Sum*>(block.sums) + done * vectors;
    };
    if (rows == block_rows) return multiply<Steps, block_rows, vectors>(block);
    if (rows & 4) multiply<Steps, 4, vectors>(block), advance(4);
    if (rows & 2) multiply<Steps, 2, vectors>(block), advance(2);
    if (rows & 1) multiply<Steps, 1, vectors>(block);
}

template <class Part>
DIT_INLINE Vec value_of(const ProductCall&, const Vec* sum, int64_t, int64_t, Part) {
    return *sum;
}

DIT_INLINE __m512i load_whole(const int32_t* p, Full) { return _mm512_loadu_si512(p); }
DIT_INLINE __m512i load_whole(const int32_t* p, Tail part) {
    return _mm512_maskz_loadu_epi32(part.mask, p);
}

template <class Part>
DIT_INLINE Vec value_of(const ProductCall& call, const __m512i* sum, int64_t row, int64_t column,
                        Part part) {
    const __m512i less = _mm512_sub_epi32(*sum, load_whole(call.col_offset + column, part));
    const Vec scaled = mul(_mm512_cvtepi32_ps(less), set(call.row_scale[row]));
    return mul(scaled, load(call.col_scale + column, part));
}

template <bool has_gelu, class Out, class Sum>
void finish(const ProductCall& call, const Sum* sum, int64_t row, int64_t rows, int64_t column,
            int64_t vectors) {
    for (const int64_t end = row + rows; row < end; ++row) {
        Out* out = static_cast<Out*>(call.out) + row * call.m;
        const auto one = [&](int64_t at, auto part) __attribute__((always_inline)) {
            Vec v = value_of(call, sum++, row, at, part);
            if (call.bias != nullptr) v = add(v, load(call.bias + at, part));
            if constexpr (has_gelu) v = gelu<Out>(v);
            store(out + at, v, part);
        };
        for (int64_t at = column; at < column + vectors * lanes; at += lanes) {
            if (at + lanes <= call.m) {
                one(at, Full{});
            } else {
                one(at, tail(call.m - at));
            }
        }
    }
}

struct Shape {
    int64_t steps, odd_bytes;  // whole steps of K, and bytes of one that K ends in
    int64_t all_steps, blocks, vectors;
};

template <class Steps>
Shape shape_of(const ProductCall& call) {
    constexpr int64_t size = 4 / Steps::elements;
    return {call.k / Steps::elements, call.k % Steps::elements * size,
            divide_up(call.k, Steps::elements), divide_up(call.rows, block_rows),
            divide_up(call.m, vector_width)};
}

// Blocks [begin, end) of one panel.
template <class Steps, class Out, int vectors>
void panel_rows(const ProductCall& call, const Shape& shape, int64_t panel, int64_t begin,
                int64_t end) {
    using Sum = typename Steps::Sum;
    Sum sums[block_rows * vectors];
    const char* weights =
        static_cast<const char*>(call.packed) + panel * panel_vectors * 64 * shape.all_steps;
    const int64_t row_bytes = call.k * (4 / Steps::elements);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * block_rows;
        const int64_t rows = call.rows - row < block_rows ? call.rows - row : block_rows;
        const char* x = static_cast<const char*>(call.x) + row * row_bytes;
        for (int64_t step = 0; step < shape.all_steps; step += Steps::depth) {
            const int64_t left = shape.steps - step;
            multiply_rows<Steps, vectors>(
                {x + 4 * step, row_bytes, weights + 64 * vectors * step,
                 left < Steps::depth ? left : Steps::depth,
                 left < Steps::depth ? shape.odd_bytes : 0, sums, step > 0},
                rows);
        }
        const auto run = call.gelu ? finish<true, Out, Sum> : finish<false, Out, Sum>;
        run(call, sums, row, rows, panel * panel_width, vectors);
    }
}

// Units of work are blocks × vectors, numbered along the rows, panel after panel.
template <class Steps, class Out>
void units(const ProductCall& call, const Shape& shape, int64_t begin, int64_t end) {
    const int64_t panels = divide_up(shape.vectors, panel_vectors);
    for (int64_t panel = begin / (shape.blocks * panel_vectors); panel < panels; ++panel) {
        const int64_t before = panel * panel_vectors, left = shape.vectors - before;
        const int64_t vectors = left < panel_vectors ? left : panel_vectors;
        // The block whose first unit is the first at or after a bound.
        const auto block_at = [&](int64_t unit) {
            const int64_t block = divide_up(unit - before * shape.blocks, vectors);
            return block < 0 ? 0 : block < shape.blocks ? block : shape.blocks;
        };
        const int64_t first = block_at(begin), stop = block_at(end);
        if (first >= stop && before * shape.blocks >= end) return;
        switch (vectors) {
            case 1: panel_rows<Steps, Out, 1>(call, shape, panel, first, stop); break;
            case 2: panel_rows<Steps, Out, 2>(call, shape, panel, first, stop); break;
            default: panel_rows<Steps, Out, 3>(call, shape, panel, first, stop); break;
        }
    }
}

template <class Steps, class Out>
int product(const ProductCall& call) {
    const Shape shape = shape_of<Steps>(call);
    share(shape.blocks * shape.vectors, 16384 / (shape.all_steps + 1) + 1, call.threads,
          [&](int64_t begin, int64_t end, int) { units<Steps, Out>(call, shape, begin, end); });
    return ok;
}

}  // namespace

int product_avx512bf16(const ProductCall& call, int dtype) {
    if (dtype == f32) return product<F32Steps, float>(call);
    if (dtype == bf16) return product<Bf16Steps, Bf16>(call);
    return call.out_dtype == f32 ? product<CodeSteps, float>(call) : product<CodeSteps, Bf16>(call);
}

}  // namespace dit

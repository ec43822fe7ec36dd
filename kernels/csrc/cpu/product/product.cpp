// Linear layers with packed weights, in float32, bfloat16 and int8 codes, where Isa::avx512_bf16 is.

#include "product.h"

#include <cstring>

#include "checks.h"
#include "pool/parallel.h"

namespace dit {
namespace {

// Bytes of an element, or 0 for a dtype without products.
int64_t element_bytes(int dtype) {
    return dtype == f32 ? 4 : dtype == bf16 ? 2 : dtype == codes_dtype ? 1 : 0;
}

int64_t steps_of(int64_t k, int dtype) { return divide_up(k, 4 / element_bytes(dtype)); }

int64_t panel_bytes(int64_t m, int64_t k, int dtype) {
    return divide_up(m, vector_width) * 64 * steps_of(k, dtype);
}

// Whether every offset in bytes fits int64 and every sum of products of codes fits int32.
bool sizes_good(int64_t rows, int64_t k, int64_t m, int dtype) {
    constexpr int64_t most = int64_t{1} << 28;
    return k >= 1 && k <= (dtype == codes_dtype ? 65536 : most) && m <= most &&
           sizes_fit(rows, k, m);
}

// One vector of a panel: 16 outputs.
void pack_vector(const char* weight, char* packed, int64_t outputs, int64_t row_bytes,
                 int64_t steps, int64_t step_bytes) {
    for (int64_t n = 0; n < vector_width; ++n) {
        char* to = packed + 4 * n;
        for (int64_t step = 0; step < steps; ++step, to += step_bytes) {
            const int64_t left = n < outputs ? row_bytes - 4 * step : 0;
            int32_t word = 0;
            if (left > 0) {
                std::memcpy(&word, weight + n * row_bytes + 4 * step, left < 4 ? left : 4);
            }
            std::memcpy(to, &word, 4);
        }
    }
}

int run(const ProductCall& call, int dtype) {
    DIT_CHECK(call.threads >= 1, bad_threads);
    DIT_CHECK(sizes_good(call.rows, call.k, call.m, dtype), bad_size);
    if (call.rows * call.m == 0) return ok;
    const int64_t size = element_bytes(dtype);
    DIT_CHECK_POINTERS({call.x, size}, {call.packed, 64}, {call.bias, 4, false},
                       {call.out, size_of(call.out_dtype)},
                       {call.row_scale, 4, dtype == codes_dtype},
                       {call.col_scale, 4, dtype == codes_dtype});
    DIT_CHECK(isa() >= Isa::avx512_bf16, no_isa);
    return product_avx512bf16(call, dtype);
}

}  // namespace
}  // namespace dit

using namespace dit;

extern "C" {

// Bytes of a packed weight (m, k), or a negative Error. dtype is f32, bf16 or 4 for int8 codes.
DIT_API int64_t dit_packed_bytes(int64_t m, int64_t k, int dtype) {
    DIT_CHECK(element_bytes(dtype) > 0, bad_dtype);
    DIT_CHECK(sizes_good(1, k, m, dtype), bad_size);
    return panel_bytes(m, k, dtype) + (dtype == codes_dtype ? 4 * m : 0);
}

// w (m, k) → packed (dit_packed_bytes,), aligned to 64 bytes.
DIT_API int dit_pack_weight(const void* w, void* packed, int64_t m, int64_t k, int dtype,
                            int threads) {
    DIT_CHECK(element_bytes(dtype) > 0, bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_good(1, k, m, dtype), bad_size);
    if (m == 0) return ok;
    const int64_t size = element_bytes(dtype), steps = steps_of(k, dtype);
    DIT_CHECK_POINTERS({w, size}, {packed, 64});
    const int64_t vectors = divide_up(m, vector_width);
    char* const to = static_cast<char*>(packed);
    auto* const offsets = reinterpret_cast<int32_t*>(to + panel_bytes(m, k, dtype));
    share(vectors, rows_per_thread(k * vector_width), threads,
          [&](int64_t begin, int64_t end, int) {
              for (int64_t vector = begin; vector < end; ++vector) {
                  const int64_t before = vector / panel_vectors * panel_vectors;
                  const int64_t beside = vectors - before;
                  const int64_t first = vector * vector_width, left = m - first;
                  const int64_t outputs = left < vector_width ? left : vector_width;
                  const char* from = static_cast<const char*>(w) + first * k * size;
                  pack_vector(from, to + before * 64 * steps + (vector - before) * 64, outputs,
                              k * size, steps,
                              64 * (beside < panel_vectors ? beside : panel_vectors));
                  if (dtype != codes_dtype) continue;
                  for (int64_t n = 0; n < outputs; ++n) {
                      int32_t sum = 0;
                      for (int64_t i = 0; i < k; ++i) {
                          sum += reinterpret_cast<const int8_t*>(from)[n * k + i];
                      }
                      offsets[first + n] = 128 * sum;
                  }
              }
          });
    return ok;
}

// x (rows, k) · wᵀ + bias → out (rows, m), of x's dtype (f32 or bf16), through GELU if asked. Every
// row comes out the same whatever the rows beside it and the threads.
DIT_API int dit_linear(const void* x, const void* packed, const float* bias, void* out,
                       int64_t rows, int64_t k, int64_t m, int dtype, int has_gelu, int threads) {
    DIT_CHECK(dtype == f32 || dtype == bf16, bad_dtype);
    return run({x, packed, bias, out, nullptr, nullptr, nullptr, rows, k, m, dtype, has_gelu != 0,
                threads},
               dtype);
}

// codes (rows, k) as code + 128 in uint8, row_scale (rows,), col_scale (m,): the products times both
// scales, + bias → out of out_dtype (f32 or bf16), through GELU if asked. k is at most 65536.
DIT_API int dit_linear_int8(const void* codes, const float* row_scale, const void* packed,
                            const float* col_scale, const float* bias, void* out, int64_t rows,
                            int64_t k, int64_t m, int out_dtype, int has_gelu, int threads) {
    DIT_CHECK(out_dtype == f32 || out_dtype == bf16, bad_dtype);
    DIT_CHECK(sizes_good(rows, k, m, codes_dtype), bad_size);
    const auto* offsets = reinterpret_cast<const int32_t*>(static_cast<const char*>(packed) +
                                                           panel_bytes(m, k, codes_dtype));
    return run({codes, packed, bias, out, row_scale, col_scale, offsets, rows, k, m, out_dtype,
                has_gelu != 0, threads},
               codes_dtype);
}
}

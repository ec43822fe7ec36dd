// int8 codes for rows, and back from an integer product.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

namespace dit {
namespace {

int run(QuantizeArgs a, const void* bias, int bias_dtype, int64_t rows, int dtype, int threads) {
    DIT_CHECK(known(dtype) && known(bias_dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(a.d >= 1 && sizes_fit(rows, a.d), bad_size);
    if (rows == 0) return ok;
    const int wrong = check_pointers({{a.x, size_of(dtype)},
                                      {bias, size_of(bias_dtype), false},
                                      {a.codes, 1},
                                      {a.scales, 4}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const Scratch<float> scratch(a.d * (threads + int64_t{1}));
    DIT_CHECK(scratch.data() != nullptr, no_memory);
    if (bias != nullptr) {
        float* wide = scratch.data() + a.d * threads;
        table->to_float[bias_dtype](bias, wide, a.d);
        a.bias = wide;
    }
    share(rows, rows_per_thread(a.d), threads, [&](int64_t begin, int64_t end, int thread) {
        table->quantize[dtype](a, begin, end, scratch.data() + a.d * thread);
    });
    return ok;
}

}  // namespace
}  // namespace dit

using namespace dit;

extern "C" {

// x (rows, d) → codes (rows, d), int8 or code + 128 as uint8 if unsigned_codes; scales (rows,).
DIT_API int dit_quantize_rows(const void* x, void* codes, float* scales, int64_t rows, int64_t d,
                              int dtype, int unsigned_codes, int threads) {
    return run({x, nullptr, static_cast<uint8_t*>(codes), scales, d, false,
                flip_of(unsigned_codes)},
               nullptr, Dtype::f32, rows, dtype, threads);
}

// The codes of GELU(x + bias); bias (d,) may be null.
DIT_API int dit_gelu_quantize(const void* x, const void* bias, void* codes, float* scales,
                              int64_t rows, int64_t d, int dtype, int bias_dtype,
                              int unsigned_codes, int threads) {
    return run({x, nullptr, static_cast<uint8_t*>(codes), scales, d, true,
                flip_of(unsigned_codes)},
               bias, bias_dtype, rows, dtype, threads);
}

// acc (rows, cols) → out = (acc − col_offset) · row_scale · col_scale + bias, through GELU if asked.
// acc is int32 or float32, or of out's type, and may be out if it is. col_offset, col_scale and
// bias may be null; for codes + 128 on the left of the product, col_offset is 128 · the sums of the
// right side's columns.
DIT_API int dit_dequantize_rows(const void* acc, const float* row_scale, const float* col_scale,
                                const int32_t* col_offset, const void* bias, void* out,
                                int64_t rows, int64_t cols, int acc_dtype, int bias_dtype,
                                int out_dtype, int has_gelu, int threads) {
    DIT_CHECK(known(acc_dtype) || acc_dtype == Dtype::s32, bad_dtype);
    DIT_CHECK(known(out_dtype) && known(bias_dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(rows, cols), bad_size);
    if (rows * cols == 0) return ok;
    const int wrong = check_pointers({{acc, size_of(acc_dtype)},
                                      {row_scale, 4},
                                      {col_scale, 4, false},
                                      {col_offset, 4, false},
                                      {bias, size_of(bias_dtype), false},
                                      {out, size_of(out_dtype)}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const auto run = table->dequantize[acc_dtype][out_dtype];
    DIT_CHECK(run != nullptr, bad_dtype);
    const Scratch<float> wide(cols);
    DIT_CHECK(wide.data() != nullptr, no_memory);
    if (bias != nullptr) table->to_float[bias_dtype](bias, wide.data(), cols);
    const DequantizeArgs a{acc, row_scale, col_scale, col_offset, bias ? wide.data() : nullptr, out,
                           cols, has_gelu != 0};
    share(rows, rows_per_thread(cols), threads,
          [&](int64_t begin, int64_t end, int) { run(a, begin, end); });
    return ok;
}
}

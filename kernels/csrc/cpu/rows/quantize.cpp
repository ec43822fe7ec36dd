// int8 codes for rows, and the epilogue of a product of codes.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

using namespace dit;

extern "C" {

// x (rows, d) → codes (rows, d), int8 or code + 128 as uint8 if unsigned_codes; scales (rows,).
DIT_API int dit_quantize_rows(const void* x, void* codes, float* scales, int64_t rows, int64_t d,
                              int dtype, int unsigned_codes, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(d >= 1 && sizes_fit(rows, d), bad_size);
    if (rows == 0) return ok;
    const int wrong = check_pointers({{x, size_of(dtype)}, {codes, 1}, {scales, 4}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const QuantizeArgs a{x, static_cast<uint8_t*>(codes), scales, d, flip_of(unsigned_codes)};
    share(rows, rows_per_thread(d), threads,
          [&](int64_t begin, int64_t end, int) { table->quantize[dtype](a, begin, end); });
    return ok;
}

// x (rows, d) → out = x · scale of the row + bias (d,), through GELU if asked. out may be x.
DIT_API int dit_dequantize_rows(const void* x, const float* scales, const void* bias, void* out,
                                int64_t rows, int64_t d, int dtype, int bias_dtype, int has_gelu,
                                int threads) {
    DIT_CHECK(known(dtype) && known(bias_dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(rows, d), bad_size);
    if (rows * d == 0) return ok;
    const int wrong = check_pointers({{x, size_of(dtype)},
                                      {scales, 4},
                                      {bias, size_of(bias_dtype)},
                                      {out, size_of(dtype)}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const Scratch<float> wide(d);
    DIT_CHECK(wide.data() != nullptr, no_memory);
    table->to_float[bias_dtype](bias, wide.data(), d);
    const DequantizeArgs a{x, scales, wide.data(), out, d, has_gelu != 0};
    share(rows, rows_per_thread(d), threads,
          [&](int64_t begin, int64_t end, int) { table->dequantize[dtype](a, begin, end); });
    return ok;
}
}

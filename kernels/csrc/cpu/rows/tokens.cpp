// The operators on tokens: layer norm with modulation and the gated residual, apart and fused, to
// floats or int8 codes; GELU; codes for rows, and the epilogue of a product of codes.
//
// x, y, residual and out are (n, t, d) or (rows, d), contiguous; gate, shift and scale have a row of
// d for each image, `…_stride` elements apart. residual may be x, and out may be x or y. Codes are
// int8, or code + 128 as uint8 if unsigned_codes; there is one scale per row.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

namespace dit {
namespace {

constexpr Modulation none{nullptr, 0, Dtype::f32};

// Which results an operator has decides which of its pointers may not be null.
int run(const NormArgs& a, int64_t n, int dtype, int threads, bool residual, bool norm, bool codes) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(a.d >= 1 && sizes_fit(n, a.t, a.d), bad_size);
    for (const Modulation& m : {a.gate, a.shift, a.scale}) {
        DIT_CHECK(known(m.dtype), bad_dtype);
        DIT_CHECK(m.stride >= 0 && sizes_fit(n, m.stride), bad_stride);
    }
    const int64_t rows = n * a.t, size = size_of(dtype);
    if (rows == 0) return ok;
    DIT_CHECK_POINTERS({a.x, size}, {a.y, size, residual}, {a.residual, size, residual},
                       {a.gate.data, size_of(a.gate.dtype), residual},
                       {a.shift.data, size_of(a.shift.dtype), norm},
                       {a.scale.data, size_of(a.scale.dtype), norm},
                       {a.out, codes ? 1 : size, norm}, {a.scales, 4, codes});
    DIT_KERNELS(table);
    const Scratch<float> scratch(4 * a.d * threads);
    DIT_CHECK(scratch.data() != nullptr, no_memory);
    share(rows, rows_per_thread(a.d), threads, [&](int64_t begin, int64_t end, int thread) {
        table->norm[dtype](a, begin, end, scratch.data() + 4 * a.d * thread);
    });
    return ok;
}

}  // namespace
}  // namespace dit

using namespace dit;

extern "C" {

DIT_API int dit_layernorm_modulate(const void* x, const void* shift, const void* scale, void* out,
                                   int64_t n, int64_t t, int64_t d, int64_t shift_stride,
                                   int64_t scale_stride, float eps, int dtype, int shift_dtype,
                                   int scale_dtype, int threads) {
    return run({x, nullptr, none, {shift, shift_stride, shift_dtype},
                {scale, scale_stride, scale_dtype}, nullptr, out, nullptr, t, d, eps, 0},
               n, dtype, threads, false, true, false);
}

DIT_API int dit_layernorm_modulate_quantize(const void* x, const void* shift, const void* scale,
                                            void* codes, float* scales, int64_t n, int64_t t,
                                            int64_t d, int64_t shift_stride, int64_t scale_stride,
                                            float eps, int dtype, int shift_dtype, int scale_dtype,
                                            int unsigned_codes, int threads) {
    return run({x, nullptr, none, {shift, shift_stride, shift_dtype},
                {scale, scale_stride, scale_dtype}, nullptr, codes, scales, t, d, eps,
                flip_of(unsigned_codes)},
               n, dtype, threads, false, true, true);
}

// out = x + gate · y.
DIT_API int dit_gate_residual(const void* x, const void* y, const void* gate, void* out, int64_t n,
                              int64_t t, int64_t d, int64_t gate_stride, int dtype, int gate_dtype,
                              int threads) {
    return run({x, y, {gate, gate_stride, gate_dtype}, none, none, out, nullptr, nullptr, t, d, 0, 0},
               n, dtype, threads, true, false, false);
}

// residual = x + gate · y; out = its modulated norm.
DIT_API int dit_gate_residual_layernorm_modulate(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* out, int64_t n, int64_t t, int64_t d, int64_t gate_stride,
    int64_t shift_stride, int64_t scale_stride, float eps, int dtype, int gate_dtype,
    int shift_dtype, int scale_dtype, int threads) {
    return run({x, y, {gate, gate_stride, gate_dtype}, {shift, shift_stride, shift_dtype},
                {scale, scale_stride, scale_dtype}, residual, out, nullptr, t, d, eps, 0},
               n, dtype, threads, true, true, false);
}

DIT_API int dit_gate_residual_layernorm_modulate_quantize(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* codes, float* scales, int64_t n, int64_t t, int64_t d,
    int64_t gate_stride, int64_t shift_stride, int64_t scale_stride, float eps, int dtype,
    int gate_dtype, int shift_dtype, int scale_dtype, int unsigned_codes, int threads) {
    return run({x, y, {gate, gate_stride, gate_dtype}, {shift, shift_stride, shift_dtype},
                {scale, scale_stride, scale_dtype}, residual, codes, scales, t, d, eps,
                flip_of(unsigned_codes)},
               n, dtype, threads, true, true, true);
}

// out may be x.
DIT_API int dit_gelu(const void* x, void* out, int64_t count, int dtype, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(count), bad_size);
    if (count == 0) return ok;
    const int64_t size = size_of(dtype);
    DIT_CHECK_POINTERS({x, size}, {out, size});
    DIT_KERNELS(table);
    constexpr int64_t block = 1024;
    share((count + block - 1) / block, 8, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * block, stop = end * block < count ? end * block : count;
        table->gelu[dtype](static_cast<const char*>(x) + first * size,
                           static_cast<char*>(out) + first * size, stop - first);
    });
    return ok;
}

DIT_API int dit_quantize_rows(const void* x, void* codes, float* scales, int64_t rows, int64_t d,
                              int dtype, int unsigned_codes, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(d >= 1 && sizes_fit(rows, d), bad_size);
    if (rows == 0) return ok;
    DIT_CHECK_POINTERS({x, size_of(dtype)}, {codes, 1}, {scales, 4});
    DIT_KERNELS(table);
    const QuantizeArgs a{x, static_cast<uint8_t*>(codes), scales, d, flip_of(unsigned_codes)};
    share(rows, rows_per_thread(d), threads,
          [&](int64_t begin, int64_t end, int) { table->quantize[dtype](a, begin, end); });
    return ok;
}

// out = x · scale of the row + bias (d,), through GELU if asked. out may be x.
DIT_API int dit_dequantize_rows(const void* x, const float* scales, const void* bias, void* out,
                                int64_t rows, int64_t d, int dtype, int bias_dtype, int has_gelu,
                                int threads) {
    DIT_CHECK(known(dtype) && known(bias_dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(rows, d), bad_size);
    if (rows * d == 0) return ok;
    const int64_t size = size_of(dtype);
    DIT_CHECK_POINTERS({x, size}, {scales, 4}, {bias, size_of(bias_dtype)}, {out, size});
    DIT_KERNELS(table);
    const Scratch<float> wide(d);
    DIT_CHECK(wide.data() != nullptr, no_memory);
    table->to_float[bias_dtype](bias, wide.data(), d);
    const DequantizeArgs a{x, scales, wide.data(), out, d, has_gelu != 0};
    share(rows, rows_per_thread(d), threads,
          [&](int64_t begin, int64_t end, int) { table->dequantize[dtype](a, begin, end); });
    return ok;
}
}

// Layer norm with modulation and the gated residual, apart and fused, to floats or int8 codes.
//
// x, y, residual and out are (n, t, d), contiguous; gate, shift and scale have a row of d for each
// image, `…_stride` elements apart. residual may be x, and out may be x or y. Codes are int8, or
// code + 128 as uint8 if unsigned_codes; scales are (n, t).

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

namespace dit {
namespace {

constexpr Modulation none{nullptr, 0, Dtype::f32};

struct Request {
    NormArgs args;
    int64_t n;
    int dtype, threads;
    bool codes;
};

int run(const Request& r) {
    const NormArgs& a = r.args;
    DIT_CHECK(known(r.dtype), bad_dtype);
    DIT_CHECK(r.threads >= 1, bad_threads);
    DIT_CHECK(a.d >= 1 && sizes_fit(r.n, a.t, a.d), bad_size);
    for (const Modulation& m : {a.gate, a.shift, a.scale}) {
        DIT_CHECK(known(m.dtype), bad_dtype);
        DIT_CHECK(m.stride >= 0 && sizes_fit(r.n, m.stride), bad_stride);
    }
    const int64_t rows = r.n * a.t;
    if (rows == 0) return ok;
    const bool has_residual = a.residual != nullptr, has_norm = a.out != nullptr;
    const int64_t size = size_of(r.dtype);
    const int wrong = check_pointers({{a.x, size},
                                      {a.y, size, has_residual},
                                      {a.gate.data, size_of(a.gate.dtype), has_residual},
                                      {a.residual, size, has_residual},
                                      {a.shift.data, size_of(a.shift.dtype), has_norm},
                                      {a.scale.data, size_of(a.scale.dtype), has_norm},
                                      {a.out, r.codes ? 1 : size, has_norm},
                                      {a.scales, 4, r.codes}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const Scratch<float> scratch(4 * a.d * r.threads);
    DIT_CHECK(scratch.data() != nullptr, no_memory);
    share(rows, rows_per_thread(a.d), r.threads, [&](int64_t begin, int64_t end, int thread) {
        table->norm[r.dtype](a, begin, end, scratch.data() + 4 * a.d * thread);
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
    DIT_CHECK(out != nullptr || n == 0 || t == 0, null_pointer);
    return run({{x, nullptr, none, {shift, shift_stride, shift_dtype},
                 {scale, scale_stride, scale_dtype}, nullptr, out, nullptr, t, d, eps, 0},
                n, dtype, threads, false});
}

DIT_API int dit_layernorm_modulate_quantize(const void* x, const void* shift, const void* scale,
                                            void* codes, float* scales, int64_t n, int64_t t,
                                            int64_t d, int64_t shift_stride, int64_t scale_stride,
                                            float eps, int dtype, int shift_dtype, int scale_dtype,
                                            int unsigned_codes, int threads) {
    DIT_CHECK((codes != nullptr && scales != nullptr) || n == 0 || t == 0, null_pointer);
    return run({{x, nullptr, none, {shift, shift_stride, shift_dtype},
                 {scale, scale_stride, scale_dtype}, nullptr, codes, scales, t, d, eps,
                 flip_of(unsigned_codes)},
                n, dtype, threads, true});
}

// out = x + gate · y.
DIT_API int dit_gate_residual(const void* x, const void* y, const void* gate, void* out, int64_t n,
                              int64_t t, int64_t d, int64_t gate_stride, int dtype, int gate_dtype,
                              int threads) {
    DIT_CHECK((y != nullptr && out != nullptr) || n == 0 || t == 0, null_pointer);
    return run({{x, y, {gate, gate_stride, gate_dtype}, none, none, out, nullptr, nullptr, t, d, 0,
                 0},
                n, dtype, threads, false});
}

// residual = x + gate · y; out = its modulated norm.
DIT_API int dit_gate_residual_layernorm_modulate(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* out, int64_t n, int64_t t, int64_t d, int64_t gate_stride,
    int64_t shift_stride, int64_t scale_stride, float eps, int dtype, int gate_dtype,
    int shift_dtype, int scale_dtype, int threads) {
    DIT_CHECK((y != nullptr && residual != nullptr && out != nullptr) || n == 0 || t == 0,
              null_pointer);
    return run({{x, y, {gate, gate_stride, gate_dtype}, {shift, shift_stride, shift_dtype},
                 {scale, scale_stride, scale_dtype}, residual, out, nullptr, t, d, eps, 0},
                n, dtype, threads, false});
}

DIT_API int dit_gate_residual_layernorm_modulate_quantize(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* codes, float* scales, int64_t n, int64_t t, int64_t d,
    int64_t gate_stride, int64_t shift_stride, int64_t scale_stride, float eps, int dtype,
    int gate_dtype, int shift_dtype, int scale_dtype, int unsigned_codes, int threads) {
    DIT_CHECK((y && residual && codes && scales) || n == 0 || t == 0, null_pointer);
    return run({{x, y, {gate, gate_stride, gate_dtype}, {shift, shift_stride, shift_dtype},
                 {scale, scale_stride, scale_dtype}, residual, codes, scales, t, d, eps,
                 flip_of(unsigned_codes)},
                n, dtype, threads, true});
}
}

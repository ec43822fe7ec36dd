// The C interface of libdit_kernels_cpu. The compiler checks the definitions in kernels/csrc/cpu
// against it, and loader.py reads the types of the arguments from it.
//
// The library carries the SHA-256 of this file, and loader.py refuses a library with another one. So
// everything that both sides must know belongs here: argument names, dtypes, levels and errors. A
// prototype reads `DIT_API result name(type name, …);` with const void*, float*, int64_t, int or float.
//
// Functions that return int return 0 or a negative Error, unless said otherwise. Sizes and strides
// are int64_t, in elements; `threads`, the last argument, is how many may work, the calling one among
// them. Data pointers need the alignment of their elements. Each definition says what the shapes are.

#pragma once

#include <cstdint>

#define DIT_API __attribute__((visibility("default")))

namespace dit {

enum Error : int {
    ok = 0,
    null_pointer = -1,
    bad_size = -2,
    bad_dtype = -3,
    bad_threads = -4,
    misaligned = -5,
    no_isa = -6,
    bad_stride = -7,
    no_memory = -8,
};

enum Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int codes_dtype = 3;  // int8 weights of the packed products, beside Dtype

// Each level holds the ones before it; CMakeLists.txt lists their instruction sets.
enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

}  // namespace dit

extern "C" {

DIT_API const char* dit_interface(void);  // the SHA-256 of this file, in hexadecimal digits
DIT_API int dit_isa(void);                // the Isa in use
DIT_API int dit_set_isa(int level);       // at most this one from now on

DIT_API int dit_layernorm_modulate(const void* x, const void* shift, const void* scale, void* out,
                                   int64_t n, int64_t t, int64_t d, int64_t shift_stride,
                                   int64_t scale_stride, float eps, int dtype, int shift_dtype,
                                   int scale_dtype, int threads);
DIT_API int dit_layernorm_modulate_quantize(const void* x, const void* shift, const void* scale,
                                            void* codes, float* scales, int64_t n, int64_t t,
                                            int64_t d, int64_t shift_stride, int64_t scale_stride,
                                            float eps, int dtype, int shift_dtype, int scale_dtype,
                                            int unsigned_codes, int threads);
DIT_API int dit_gate_residual(const void* x, const void* y, const void* gate, void* out, int64_t n,
                              int64_t t, int64_t d, int64_t gate_stride, int dtype, int gate_dtype,
                              int threads);
DIT_API int dit_gate_residual_layernorm_modulate(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* out, int64_t n, int64_t t, int64_t d, int64_t gate_stride,
    int64_t shift_stride, int64_t scale_stride, float eps, int dtype, int gate_dtype,
    int shift_dtype, int scale_dtype, int threads);
DIT_API int dit_gate_residual_layernorm_modulate_quantize(
    const void* x, const void* y, const void* gate, const void* shift, const void* scale,
    void* residual, void* codes, float* scales, int64_t n, int64_t t, int64_t d,
    int64_t gate_stride, int64_t shift_stride, int64_t scale_stride, float eps, int dtype,
    int gate_dtype, int shift_dtype, int scale_dtype, int unsigned_codes, int threads);

DIT_API int dit_gelu(const void* x, void* out, int64_t count, int dtype, int threads);
DIT_API int dit_quantize_rows(const void* x, void* codes, float* scales, int64_t rows, int64_t d,
                              int dtype, int unsigned_codes, int threads);
DIT_API int dit_dequantize_rows(const void* x, const float* scales, const void* bias, void* out,
                                int64_t rows, int64_t d, int dtype, int bias_dtype, int has_gelu,
                                int threads);

DIT_API int dit_groupnorm_silu(const void* x, const void* weight, const void* bias, void* out,
                               int64_t n, int64_t pixels, int64_t c, int64_t groups, float eps,
                               int dtype, int weight_dtype, int threads);
DIT_API int dit_guided_step(const void* tokens, const float* z, const float* x0_before,
                            const float* noise, const float* guidance_scale,
                            const float* coefficients, float* z_next, float* x0, int64_t m,
                            int64_t n, int64_t c, int64_t c_out, int64_t s, int64_t p,
                            int64_t guided_channels, int dtype, int threads);
DIT_API int dit_embed(const float* z, const float* weight, const float* bias,
                      const float* positions, void* out, int64_t n, int64_t c, int64_t s,
                      int64_t p, int64_t d, int dtype, int threads);
DIT_API int dit_attention(const void* qkv, void* out, int64_t n, int64_t t, int64_t heads,
                          int64_t d, int dtype, int threads);

DIT_API int64_t dit_packed_bytes(int64_t m, int64_t k, int dtype);  // or a negative Error
DIT_API int dit_pack_weight(const void* w, void* packed, int64_t m, int64_t k, int dtype,
                            int threads);
DIT_API int dit_linear(const void* x, const void* packed, const float* bias, void* out,
                       int64_t rows, int64_t k, int64_t m, int dtype, int has_gelu, int threads);
DIT_API int dit_linear_int8(const void* codes, const float* row_scale, const void* packed,
                            const float* col_scale, const float* bias, void* out, int64_t rows,
                            int64_t k, int64_t m, int out_dtype, int has_gelu, int threads);

DIT_API int dit_replay(const void* words, int64_t calls, int threads);
}

// The inner loops, which are compiled once per instruction set, and the table to choose them from.

#pragma once

#include <cstdint>

#include "checks.h"

namespace dit {

// One row (D,) per image, `stride` elements apart; with a stride of 0 all images share one.
struct Modulation {
    const void* data;
    int64_t stride;
    int dtype;
};

// One pass over rows of x (N·T, D). If y is given, residual = x + gate·y. If out is given, it gets the
// modulated norm, or the norm's codes if scales is given too.
struct NormArgs {
    const void* x;
    const void* y;
    Modulation gate, shift, scale;
    void* residual;
    void* out;
    float* scales;
    int64_t t, d;
    float eps;
    uint8_t flip;  // 0x80 for codes + 128 in uint8, otherwise 0
};

// Rows of x (rows, d) → codes and scales.
struct QuantizeArgs {
    const void* x;
    uint8_t* codes;
    float* scales;
    int64_t d;
    uint8_t flip;
};

// out = x · scale + bias for rows of x (rows, d).
struct DequantizeArgs {
    const void* x;
    const float* scales;
    const float* bias;
    void* out;
    int64_t d;
    bool gelu;
};

struct GuidedStepArgs {
    const void* tokens;  // (M, T, p·p·C_out)
    const float* z;      // (N, C, S, S), like x0_before, noise, z_next and x0
    const float* x0_before;
    const float* noise;
    const float* guidance_scale;  // (N,)
    const float* coefficients;    // (9,)
    float* z_next;
    float* x0;
    int64_t n, c, c_out, s, p, guided_channels;
    bool guided, learned;
};

struct EmbedArgs {
    const float* z;          // (N, C, S, S)
    const float* weight;     // (C·p·p, D)
    const float* bias;       // (D,)
    const float* positions;  // (T, D)
    void* out;               // (N, T, D)
    int64_t c, s, p, d;
};

constexpr int dtypes = 3;

// Functions with begin and end work on those rows. Arrays are indexed by Dtype.
struct Kernels {
    // scratch: 4·d floats
    void (*norm[dtypes])(const NormArgs&, int64_t begin, int64_t end, float* scratch);
    void (*quantize[dtypes])(const QuantizeArgs&, int64_t begin, int64_t end);
    void (*gelu[dtypes])(const void* x, void* out, int64_t count);
    void (*dequantize[dtypes])(const DequantizeArgs&, int64_t begin, int64_t end);
    // For each channel of x (pixels, c): an origin near its mean, Σ(x − origin), Σ(x − origin)².
    void (*moments[dtypes])(const void* x, int64_t pixels, int64_t c, float* origin, float* sum,
                            float* squares);
    // out = SiLU((x − mean) · factor + bias)
    void (*normalize[dtypes])(const void* x, void* out, int64_t pixels, int64_t c,
                              const float* mean, const float* factor, const float* bias);
    // Rows of pixels of all images: [0, N·S).
    void (*guided_step[dtypes])(const GuidedStepArgs&, int64_t begin, int64_t end);
    // Tokens of all images: [0, N·T). patch: c·p·p floats
    void (*embed[dtypes])(const EmbedArgs&, int64_t begin, int64_t end, float* patch);
    void (*to_float[dtypes])(const void* x, float* out, int64_t count);
};

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

}  // namespace dit

// Defines `table`: the kernels for isa().
#define DIT_KERNELS(table) \
    const Isa level = isa(); \
    DIT_CHECK(level != Isa::none, no_isa); \
    const Kernels* const table = level == Isa::avx2     ? &kernels_avx2 \
                                 : level == Isa::avx512 ? &kernels_avx512 \
                                                        : &kernels_avx512bf16

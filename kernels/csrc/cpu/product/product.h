// y = x·Wᵀ + b with weights packed once: their layout, and the calls.
//
// A step is the 4 bytes of an input row that one instruction multiplies: 1 float32, 2 bfloat16 or 4
// codes. A panel is 48 outputs, 3 vectors (the last panel may have fewer). For each step it holds the
// 4 bytes of every output, one after another, with zeros where K or M ends. Panels follow each other.

#pragma once

#include <cstdint>

#include "interface.h"

namespace dit {

constexpr int64_t vector_width = 16, panel_vectors = 3, panel_width = vector_width * panel_vectors;

namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// Sizes: x (rows, k), bias (m,), out (rows, m). For codes, x is code + 128 as uint8, with one scale
// per row and one per output; col_offset (m,) is 128 · the sum of an output's weights.
struct ProductCall {
    const void* x;
    const void* packed;
    const float* bias;  // may be null
    void* out;
    const float* row_scale;
    const float* col_scale;
    const int32_t* col_offset;
    int64_t rows, k, m;
    int out_dtype;
    bool gelu;
    int threads;
};

// Products of the dtype f32, bf16 or codes_dtype; returns an Error. The order in which an output's
// products are added depends on k alone.
int product_avx512bf16(const ProductCall& call, int dtype);

}  // namespace dit

// The inner loops of the operators on tokens: conversion, GELU, int8 codes, the gated residual, layer
// norm and modulation.

#pragma once

#include "kernels.h"
#include "simd/vector_math.h"

namespace dit {
namespace {

template <class T>
void to_float(const void* x, float* out, int64_t count) {
    const T* from = static_cast<const T*>(x);
    sweep(count, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
        store(out + i, load(from + i, part), part);
    });
}

template <class T>
void gelu_all(const void* x, void* out, int64_t count) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    sweep(count, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
        store(to + i, gelu<T>(load(from + i, part)), part);
    });
}

template <bool has_gelu, class T>
void dequantize_rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.d;
        T* out = static_cast<T*>(a.out) + row * a.d;
        const Vec scale = set(a.scales[row]);
        sweep(a.d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            Vec v = add(mul(load(x + i, part), scale), load(a.bias + i, part));
            if constexpr (has_gelu) v = gelu<T>(v);
            store(out + i, v, part);
        });
    }
}

template <class T>
void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
    const auto run = a.gelu ? dequantize_rows<true, T> : dequantize_rows<false, T>;
    run(a, begin, end);
}

// The scale of a row whose greatest magnitude is given; NaN stays NaN.
DIT_INLINE float scale_of(float greatest) {
    return (greatest < 1e-12f ? 1e-12f : greatest) / 127.0f;
}

// value(i, part) gives the numbers of a part.
template <class F>
DIT_INLINE void write_codes(uint8_t* codes, float scale, int64_t d, uint8_t flip, const F& value) {
    const Vec inverse = set(1.0f / scale);
    sweep(d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
        store_codes(codes + i, mul(value(i, part), inverse), flip, part);
    });
}

template <class T>
void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.d;
        Maxima maxima;
        sweep(a.d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
            maxima[k] = max_magnitude(maxima[k], load(x + i, part));
        });
        const float scale = a.scales[row] = scale_of(maxima.greatest());
        write_codes(a.codes + row * a.d, scale, a.d, a.flip,
                    [&](int64_t i, auto part) __attribute__((always_inline)) {
                        return load(x + i, part);
                    });
    }
}

DIT_INLINE void widen_modulation(const Modulation& from, int64_t image, int64_t d, float plus,
                                 float* to) {
    const int64_t first = image * from.stride;
    const auto copy = [&](auto* p) __attribute__((always_inline)) {
        sweep(d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            store(to + i, add(load(p + first + i, part), set(plus)), part);
        });
    };
    if (from.dtype == Dtype::f32) copy(static_cast<const float*>(from.data));
    if (from.dtype == Dtype::bf16) copy(static_cast<const Bf16*>(from.data));
    if (from.dtype == Dtype::f16) copy(static_cast<const F16*>(from.data));
}

template <class T, bool has_residual, bool has_norm, bool has_codes>
void norm_rows(const NormArgs& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t d = a.d;
    float *gate = scratch, *scale = gate + d, *shift = scale + d, *normed = shift + d;
    int64_t image = -1;
    for (int64_t row = begin; row < end; ++row) {
        if (row / a.t != image) {
            image = row / a.t;
            if constexpr (has_residual) widen_modulation(a.gate, image, d, 0, gate);
            if constexpr (has_norm) {
                widen_modulation(a.scale, image, d, 1, scale);
                widen_modulation(a.shift, image, d, 0, shift);
            }
        }
        const T* x = static_cast<const T*>(a.x) + row * d;
        Sums sums;
        if constexpr (has_residual) {
            const T* y = static_cast<const T*>(a.y) + row * d;
            T* residual = static_cast<T*>(a.residual) + row * d;
            sweep(d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
                const Vec v = fma(load(gate + i, part), load(y + i, part), load(x + i, part));
                store(residual + i, v, part);
                // The norm reads the rounded sum, so that a later step that starts from it agrees.
                if constexpr (has_norm) sums[k] = add(sums[k], rounded(v, T{}));
            });
            x = residual;
        } else {
            sweep(d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
                sums[k] = add(sums[k], load(x + i, part));
            });
        }
        if constexpr (!has_norm) continue;

        const Vec mean = set(sums.total() / static_cast<float>(d));
        Sums squares;
        sweep(d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
            const Vec centred = keep(sub(load(x + i, part), mean), part);
            squares[k] = fma(centred, centred, squares[k]);
        });
        const float variance = squares.total() / static_cast<float>(d);
        const Vec inverse = set(1.0f / __builtin_sqrtf(variance + a.eps));
        const auto value = [&](int64_t i, auto part) __attribute__((always_inline)) {
            const Vec unit = mul(sub(load(x + i, part), mean), inverse);
            return fma(unit, load(scale + i, part), load(shift + i, part));
        };
        if constexpr (has_codes) {
            Maxima maxima;
            sweep(d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
                const Vec v = value(i, part);
                store(normed + i, v, part);
                maxima[k] = max_magnitude(maxima[k], keep(v, part));
            });
            const float row_scale = a.scales[row] = scale_of(maxima.greatest());
            write_codes(static_cast<uint8_t*>(a.out) + row * d, row_scale, d, a.flip,
                        [&](int64_t i, auto part) __attribute__((always_inline)) {
                            return load(normed + i, part);
                        });
        } else {
            T* out = static_cast<T*>(a.out) + row * d;
            sweep(d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
                store(out + i, value(i, part), part);
            });
        }
    }
}

template <class T>
void norm(const NormArgs& a, int64_t begin, int64_t end, float* scratch) {
    if (a.out == nullptr) return norm_rows<T, true, false, false>(a, begin, end, scratch);
    if (a.y == nullptr) {
        if (a.scales == nullptr) return norm_rows<T, false, true, false>(a, begin, end, scratch);
        return norm_rows<T, false, true, true>(a, begin, end, scratch);
    }
    if (a.scales == nullptr) return norm_rows<T, true, true, false>(a, begin, end, scratch);
    norm_rows<T, true, true, true>(a, begin, end, scratch);
}

}  // namespace
}  // namespace dit

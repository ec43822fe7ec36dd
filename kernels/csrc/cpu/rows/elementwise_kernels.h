// Conversion, GELU and the epilogue of a product of codes.

#pragma once

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
    if (a.gelu) {
        dequantize_rows<true, T>(a, begin, end);
    } else {
        dequantize_rows<false, T>(a, begin, end);
    }
}

}  // namespace
}  // namespace dit

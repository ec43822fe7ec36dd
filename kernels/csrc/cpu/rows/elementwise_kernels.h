// Conversion, GELU and the epilogue of an integer product.

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

template <class X, class Out>
void gelu_all(const void* x, const float* bias, void* out, int64_t count) {
    const X* from = static_cast<const X*>(x);
    Out* to = static_cast<Out*>(out);
    if (bias == nullptr) {
        sweep(count, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            store(to + i, gelu<Out>(load(from + i, part)), part);
        });
    } else {
        sweep(count, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            store(to + i, gelu<Out>(add(load(from + i, part), load(bias + i, part))), part);
        });
    }
}

template <bool has_gelu, class Acc, class Out>
void dequantize_rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const Acc* acc = static_cast<const Acc*>(a.acc) + row * a.cols;
        Out* out = static_cast<Out*>(a.out) + row * a.cols;
        const Vec row_scale = set(a.row_scale[row]);
        sweep(a.cols, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            Vec v;
            if (a.col_offset == nullptr) {
                v = load(acc + i, part);
            } else if constexpr (std::is_same_v<Acc, int32_t>) {
                v = load_less(acc + i, a.col_offset + i, part);
            } else {
                v = sub(load(acc + i, part), load(a.col_offset + i, part));
            }
            v = mul(v, row_scale);
            if (a.col_scale != nullptr) v = mul(v, load(a.col_scale + i, part));
            if (a.bias != nullptr) v = add(v, load(a.bias + i, part));
            if constexpr (has_gelu) v = gelu<Out>(v);
            store(out + i, v, part);
        });
    }
}

template <class Acc, class Out>
void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
    if (a.gelu) {
        dequantize_rows<true, Acc, Out>(a, begin, end);
    } else {
        dequantize_rows<false, Acc, Out>(a, begin, end);
    }
}

}  // namespace
}  // namespace dit

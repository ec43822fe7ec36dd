// The two passes of group norm over channels-last pixels.

#pragma once

namespace dit {
namespace {

// Sums about an origin, because Σx² would cancel where the mean is far from 0. The origin is the mean
// of a few pixels: a single one can lie several deviations from the mean, and then Σ(x − origin)² is
// so many times the variance, and so is its rounding error.
template <class T>
void moments(const void* x, int64_t pixels, int64_t c, float* origin, float* sum, float* squares) {
    const T* pixel = static_cast<const T*>(x);
    const int64_t few = pixels < 8 ? pixels : 8;
    sweep(c, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
        Vec total = load(pixel + i, part);
        for (int64_t k = 1; k < few; ++k) total = add(total, load(pixel + k * c + i, part));
        store(origin + i, mul(total, set(1.0f / static_cast<float>(few))), part);
        store(sum + i, set(0), part);
        store(squares + i, set(0), part);
    });
    // Few enough pixels at a time that all their channels stay in the first-level cache.
    constexpr int64_t cached = 16384;
    const int64_t fitting = cached / (c * static_cast<int64_t>(sizeof(T)));
    const int64_t step = fitting < 4 ? 4 : fitting;
    for (int64_t begin = 0; begin < pixels; begin += step) {
        const int64_t end = begin + step < pixels ? begin + step : pixels;
        sweep(c, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            const Vec about = load(origin + i, part);
            Vec total = load(sum + i, part), total_squares = load(squares + i, part);
            for (int64_t k = begin; k < end; ++k) {
                const Vec v = sub(load(pixel + k * c + i, part), about);
                total = add(total, v);
                total_squares = fma(v, v, total_squares);
            }
            store(sum + i, total, part);
            store(squares + i, total_squares, part);
        });
    }
}

template <class T>
void normalize(const void* x, void* out, int64_t pixels, int64_t c, const float* mean,
               const float* factor, const float* bias) {
    for (int64_t k = 0; k < pixels; ++k) {
        const T* from = static_cast<const T*>(x) + k * c;
        T* to = static_cast<T*>(out) + k * c;
        sweep(c, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            const Vec centred = sub(load(from + i, part), load(mean + i, part));
            const Vec v = fma(centred, load(factor + i, part), load(bias + i, part));
            store(to + i, silu<T>(v), part);
        });
    }
}

}  // namespace
}  // namespace dit

// The inner loops of the operators on images: the embedding of patches, group norm, the guided step.

#pragma once

#include "kernels.h"
#include "simd/vector_math.h"

namespace dit {
namespace {

// Patches of latents, their projection, and the position embedding.
template <class T>
void embed(const EmbedArgs& a, int64_t begin, int64_t end, float* patch) {
    const int64_t side = a.s / a.p, tokens = side * side, inputs = a.c * a.p * a.p;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t image = row / tokens, token = row % tokens;
        const float* corner =
            a.z + (image * a.c * a.s + token / side * a.p) * a.s + token % side * a.p;
        for (int64_t k = 0; k < inputs; ++k) {
            patch[k] = corner[(k / (a.p * a.p) * a.s + k / a.p % a.p) * a.s + k % a.p];
        }
        const float* position = a.positions + token * a.d;
        sweep(a.d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            Vec sum = set(0);
            for (int64_t k = 0; k < inputs; ++k) {
                sum = fma(set(patch[k]), load(a.weight + k * a.d + i, part), sum);
            }
            sum = add(add(sum, load(a.bias + i, part)), load(position + i, part));
            store(static_cast<T*>(a.out) + row * a.d + i, sum, part);
        });
    }
}

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

DIT_INLINE float scalar(const float* p) { return *p; }
DIT_INLINE float scalar(const F16* p) { return _cvtsh_ss(p->bits); }
DIT_INLINE float scalar(const Bf16* p) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(p->bits << 16)));
}

// Unpatchify, guidance, learned variance and the sampler's update, one pixel after another: the
// latents are small, and exp is libm's.
template <class T>
void guided_step(const GuidedStepArgs& a, int64_t begin, int64_t end) {
    const float x0_z = a.coefficients[0], x0_eps = a.coefficients[1], to_x0 = a.coefficients[2];
    const float to_z = a.coefficients[3], to_eps = a.coefficients[4], to_before = a.coefficients[5];
    const float low = a.coefficients[6], high = a.coefficients[7], std = a.coefficients[8];
    const int64_t side = a.s / a.p, patch = a.p * a.p * a.c_out, image_size = side * side * patch;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t image = row / a.s, i = row % a.s;
        const T* tokens = static_cast<const T*>(a.tokens) + image * image_size +
                          (i / a.p) * side * patch + (i % a.p) * a.p * a.c_out;
        const T* unconditional = a.guided ? tokens + a.n * image_size : tokens;
        const float scale = a.guidance_scale[image];
        for (int64_t channel = 0; channel < a.c; ++channel) {
            const bool guides = a.guided && channel < a.guided_channels && scale != 1.0f;
            const int64_t first = ((image * a.c + channel) * a.s + i) * a.s;
            for (int64_t j = 0; j < a.s; ++j) {
                const int64_t at = (j / a.p) * patch + (j % a.p) * a.c_out + channel;
                float eps = scalar(tokens + at);
                if (guides) {
                    const float without = scalar(unconditional + at);
                    eps = without + scale * (eps - without);
                }
                const float z = a.z[first + j];
                const float x0 = x0_z * z + x0_eps * eps;
                float deviation = std;
                if (a.learned) {
                    const float between = (scalar(tokens + at + a.c) + 1) / 2;
                    deviation *= __builtin_expf(0.5f * (low + between * (high - low)));
                }
                const float before = a.x0_before[first + j], noise = a.noise[first + j];
                const float mean = to_x0 * x0 + to_z * z + to_eps * eps + to_before * before;
                a.z_next[first + j] = deviation == 0 ? mean : mean + deviation * noise;
                a.x0[first + j] = x0;
            }
        }
    }
}

}  // namespace
}  // namespace dit

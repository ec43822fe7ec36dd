// Unpatchify, guidance, learned variance and the sampler's update, one pixel after another: the
// latents are small, and exp is libm's.

#pragma once

namespace dit {
namespace {

DIT_INLINE float scalar(const float* p) { return *p; }
DIT_INLINE float scalar(const F16* p) { return _cvtsh_ss(p->bits); }
DIT_INLINE float scalar(const Bf16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

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

// The operators on images: the embedding of patches, group norm with SiLU over channels-last images,
// and the guided step.

#include <cmath>

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

namespace dit {
namespace {

struct Moments {
    double mean, squares;  // squares: Σ (x − mean)²
};

// Of a group of channels, from the sums about each channel's origin.
Moments merge_channels(const float* origin, const float* sum, const float* squares, int64_t channels,
                       double pixels) {
    double mean = 0, within = 0, between = 0;
    for (int64_t i = 0; i < channels; ++i) mean += origin[i] + sum[i] / pixels;
    mean /= static_cast<double>(channels);
    for (int64_t i = 0; i < channels; ++i) {
        const double offset = sum[i] / pixels, centre = origin[i] + offset - mean;
        within += squares[i] - sum[i] * offset;
        between += centre * centre;
    }
    return {mean, within + pixels * between};
}

// The pixels of one piece of an image. It depends on the image alone: the sums, and so the result,
// are the same for any number of threads.
int64_t piece_of(int64_t pixels) {
    const int64_t sixteenth = pixels / 16;
    return sixteenth < 64 ? 64 : sixteenth > 512 ? 512 : sixteenth;
}

}  // namespace
}  // namespace dit

using namespace dit;

extern "C" {

// z (n, c, s, s), weight (c·p·p, d), bias (d,), positions (T, d) with T = (s/p)², all float32 → out
// (n, T, d).
DIT_API int dit_embed(const float* z, const float* weight, const float* bias,
                      const float* positions, void* out, int64_t n, int64_t c, int64_t s,
                      int64_t p, int64_t d, int dtype, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(c >= 1 && s >= 1 && p >= 1 && s % p == 0 && d >= 1, bad_size);
    DIT_CHECK(sizes_fit(n, c, s, s) && sizes_fit(n, s, s, d) && sizes_fit(c, p, p, d), bad_size);
    if (n == 0) return ok;
    DIT_CHECK_POINTERS({z, 4}, {weight, 4}, {bias, 4}, {positions, 4}, {out, size_of(dtype)});
    DIT_KERNELS(table);
    const int64_t inputs = c * p * p, rows = n * (s / p) * (s / p);
    const Scratch<float> scratch(inputs * threads);
    DIT_CHECK(scratch.data() != nullptr, no_memory);
    const EmbedArgs a{z, weight, bias, positions, out, c, s, p, d};
    share(rows, rows_per_thread(d), threads, [&](int64_t begin, int64_t end, int member) {
        table->embed[dtype](a, begin, end, scratch.data() + inputs * member);
    });
    return ok;
}

// x, out (n, pixels, c), contiguous; weight and bias (c,). out may be x.
DIT_API int dit_groupnorm_silu(const void* x, const void* weight, const void* bias, void* out,
                               int64_t n, int64_t pixels, int64_t c, int64_t groups, float eps,
                               int dtype, int weight_dtype, int threads) {
    DIT_CHECK(known(dtype) && known(weight_dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(c >= 1 && groups >= 1 && c % groups == 0 && sizes_fit(n, pixels, c), bad_size);
    if (n * pixels == 0) return ok;
    const int64_t size = size_of(dtype), weight_size = size_of(weight_dtype);
    DIT_CHECK_POINTERS({x, size}, {out, size}, {weight, weight_size}, {bias, weight_size});
    DIT_KERNELS(table);
    const int64_t piece = piece_of(pixels), pieces = (pixels + piece - 1) / piece;
    const int64_t channels = c / groups;
    const Scratch<float> scratch(3 * c * threads), factors((2 * n + 2) * c);
    const Scratch<Moments> moments(n * pieces * groups);
    DIT_CHECK(scratch.data() && factors.data() && moments.data(), no_memory);
    float *mean = factors.data(), *factor = mean + n * c;
    float *wide_weight = factor + n * c, *wide_bias = wide_weight + c;
    table->to_float[weight_dtype](weight, wide_weight, c);
    table->to_float[weight_dtype](bias, wide_bias, c);
    const auto each_piece = [&](const auto& f) {
        share(n * pieces, rows_per_thread(piece * c), threads,
              [&](int64_t begin, int64_t end, int thread) {
                  for (int64_t k = begin; k < end; ++k) {
                      const int64_t first = k % pieces * piece, left = pixels - first;
                      const int64_t offset = (k / pieces * pixels + first) * c * size;
                      f(k, offset, left < piece ? left : piece, thread);
                  }
              });
    };

    each_piece([&](int64_t k, int64_t offset, int64_t count, int thread) {
        float *origin = scratch.data() + 3 * c * thread, *sum = origin + c, *squares = sum + c;
        table->moments[dtype](static_cast<const char*>(x) + offset, count, c, origin, sum, squares);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = g * channels;
            moments.data()[k * groups + g] = merge_channels(
                origin + at, sum + at, squares + at, channels, static_cast<double>(count));
        }
    });

    for (int64_t image = 0; image < n; ++image) {
        for (int64_t g = 0; g < groups; ++g) {
            double count = 0;
            Moments all{0, 0};
            for (int64_t k = 0; k < pieces; ++k) {  // two sets of numbers into one (Chan et al.)
                const Moments& m = moments.data()[(image * pieces + k) * groups + g];
                const int64_t left = pixels - k * piece;
                const auto more = static_cast<double>((left < piece ? left : piece) * channels);
                const double apart = m.mean - all.mean, total = count + more;
                all.squares += m.squares + apart * apart * count * more / total;
                all.mean += apart * more / total;
                count = total;
            }
            const double inverse = 1 / std::sqrt(all.squares / count + eps);
            for (int64_t i = image * c + g * channels; i < image * c + (g + 1) * channels; ++i) {
                mean[i] = static_cast<float>(all.mean);
                factor[i] = static_cast<float>(inverse * wide_weight[i - image * c]);
            }
        }
    }

    each_piece([&](int64_t k, int64_t offset, int64_t count, int) {
        const int64_t at = k / pieces * c;
        table->normalize[dtype](static_cast<const char*>(x) + offset,
                                static_cast<char*>(out) + offset, count, c, mean + at, factor + at,
                                wide_bias);
    });
    return ok;
}

// tokens (m, T, p·p·c_out) with m = n or 2n (the conditional rows first), c_out = c or 2c; z,
// x0_before, noise, z_next and x0 are (n, c, s, s) in float32; guidance_scale (n,), coefficients
// (9,) in the order of reference.guided_step. z_next may be z, and x0 may be x0_before.
DIT_API int dit_guided_step(const void* tokens, const float* z, const float* x0_before,
                            const float* noise, const float* guidance_scale,
                            const float* coefficients, float* z_next, float* x0, int64_t m,
                            int64_t n, int64_t c, int64_t c_out, int64_t s, int64_t p,
                            int64_t guided_channels, int dtype, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(n >= 0 && c >= 1 && s >= 1 && p >= 1 && s % p == 0, bad_size);
    DIT_CHECK(sizes_fit(n, c, s, s, 4) && sizes_fit(m, c_out, s, s), bad_size);
    DIT_CHECK((m == n || m == 2 * n) && (c_out == c || c_out == 2 * c), bad_size);
    DIT_CHECK(guided_channels >= 0 && guided_channels <= c, bad_size);
    if (n == 0) return ok;
    DIT_CHECK_POINTERS({tokens, size_of(dtype)}, {z, 4}, {x0_before, 4}, {noise, 4},
                       {guidance_scale, 4}, {coefficients, 4}, {z_next, 4}, {x0, 4});
    DIT_KERNELS(table);
    const GuidedStepArgs a{tokens, z, x0_before, noise, guidance_scale, coefficients, z_next, x0,
                           n, c, c_out, s, p, guided_channels, m == 2 * n, c_out == 2 * c};
    share(n * s, rows_per_thread(16 * c * s), threads, [&](int64_t begin, int64_t end, int) {
        table->guided_step[dtype](a, begin, end);
    });
    return ok;
}
}

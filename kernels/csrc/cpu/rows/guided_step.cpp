// From the model's tokens to the next latents: unpatchify, guidance, variance, the sampler's update.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

using namespace dit;

extern "C" {

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
    const int wrong = check_pointers({{tokens, size_of(dtype)},
                                      {z, 4},
                                      {x0_before, 4},
                                      {noise, 4},
                                      {guidance_scale, 4},
                                      {coefficients, 4},
                                      {z_next, 4},
                                      {x0, 4}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const GuidedStepArgs a{tokens, z, x0_before, noise, guidance_scale, coefficients, z_next, x0,
                           n, c, c_out, s, p, guided_channels, m == 2 * n, c_out == 2 * c};
    share(n * s, rows_per_thread(16 * c * s), threads, [&](int64_t begin, int64_t end, int) {
        table->guided_step[dtype](a, begin, end);
    });
    return ok;
}
}

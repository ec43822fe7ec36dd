// From latents to the model's tokens.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

// z (n, c, s, s), weight (c·p·p, d), bias (d,), positions (T, d) with T = (s/p)², all float32 → out
// (n, T, d).
extern "C" DIT_API int dit_embed(const float* z, const float* weight, const float* bias,
                                 const float* positions, void* out, int64_t n, int64_t c, int64_t s,
                                 int64_t p, int64_t d, int dtype, int threads) {
    using namespace dit;
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(c >= 1 && s >= 1 && p >= 1 && s % p == 0 && d >= 1, bad_size);
    DIT_CHECK(sizes_fit(n, c, s, s) && sizes_fit(n, s, s, d) && sizes_fit(c, p, p, d), bad_size);
    if (n == 0) return ok;
    const int wrong = check_pointers(
        {{z, 4}, {weight, 4}, {bias, 4}, {positions, 4}, {out, size_of(dtype)}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const int64_t inputs = c * p * p, rows = n * (s / p) * (s / p);
    const Scratch<float> scratch(inputs * threads);
    DIT_CHECK(scratch.data() != nullptr, no_memory);
    const EmbedArgs a{z, weight, bias, positions, out, c, s, p, d};
    share(rows, rows_per_thread(d), threads, [&](int64_t begin, int64_t end, int member) {
        table->embed[dtype](a, begin, end, scratch.data() + inputs * member);
    });
    return ok;
}

// GELU with tanh, alone or after a bias.

#include "checks.h"
#include "kernels.h"
#include "pool/parallel.h"

using namespace dit;

extern "C" {

// out may be x.
DIT_API int dit_gelu(const void* x, void* out, int64_t count, int dtype, int threads) {
    DIT_CHECK(known(dtype), bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(count), bad_size);
    if (count == 0) return ok;
    const int64_t size = size_of(dtype);
    const int wrong = check_pointers({{x, size}, {out, size}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    constexpr int64_t block = 1024;
    share((count + block - 1) / block, 8, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * block, stop = end * block < count ? end * block : count;
        table->gelu[dtype][dtype](static_cast<const char*>(x) + first * size, nullptr,
                                  static_cast<char*>(out) + first * size, stop - first);
    });
    return ok;
}

// x, out (rows, cols), bias (cols,): GELU(x + bias). out has x's type, or any if x is float32; it
// may be x if the types are the same.
DIT_API int dit_bias_gelu(const void* x, const void* bias, void* out, int64_t rows, int64_t cols,
                          int dtype, int bias_dtype, int out_dtype, int threads) {
    DIT_CHECK(known(dtype) && known(bias_dtype) && known(out_dtype), bad_dtype);
    DIT_CHECK(dtype == out_dtype || dtype == Dtype::f32, bad_dtype);
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(sizes_fit(rows, cols), bad_size);
    if (rows * cols == 0) return ok;
    const int64_t size = size_of(dtype), out_size = size_of(out_dtype);
    const int wrong = check_pointers({{x, size}, {bias, size_of(bias_dtype)}, {out, out_size}});
    if (wrong != ok) return wrong;
    const Kernels* table = kernels();
    DIT_CHECK(table != nullptr, no_isa);
    const Scratch<float> wide(cols);
    DIT_CHECK(wide.data() != nullptr, no_memory);
    table->to_float[bias_dtype](bias, wide.data(), cols);
    share(rows, rows_per_thread(cols), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            table->gelu[dtype][out_dtype](static_cast<const char*>(x) + row * cols * size,
                                          wide.data(),
                                          static_cast<char*>(out) + row * cols * out_size, cols);
        }
    });
    return ok;
}
}

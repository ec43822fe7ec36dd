// GELU with tanh.

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
        table->gelu[dtype](static_cast<const char*>(x) + first * size,
                           static_cast<char*>(out) + first * size, stop - first);
    });
    return ok;
}
}

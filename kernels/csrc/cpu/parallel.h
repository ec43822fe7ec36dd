// The one way in which work is shared out, and memory for it.

#pragma once

#include <cstdint>
#include <cstdlib>

#include <omp.h>

namespace dit {
namespace {

// f(begin, end, thread) on parts of [0, count), on at most `threads` threads of at least `grain`.
template <class F>
void share(int64_t count, int64_t grain, int threads, const F& f) {
    const int64_t useful = (count + grain - 1) / grain;
    const int team = useful < threads ? static_cast<int>(useful) : threads;
    if (team <= 1) {
        if (count > 0) f(int64_t{0}, count, 0);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
        const int64_t begin = count * thread / members, end = count * (thread + 1) / members;
        if (begin < end) f(begin, end, thread);
    }
}

// Rows of `width` elements that are worth a thread.
inline int64_t rows_per_thread(int64_t width) { return 16384 / (width + 1) + 1; }

// Uninitialised memory, aligned to a cache line; null data if there is none.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(
              std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + (count == 0) * 64))) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* data() const { return data_; }

private:
    T* data_;
};

}  // namespace
}  // namespace dit

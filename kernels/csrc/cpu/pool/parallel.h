// How every operator shares its work among threads, and gets its scratch memory.

#pragma once

#include <cstdint>
#include <cstdlib>

#include "pool.h"

namespace dit {
namespace {

// f(participant) in this thread and in helpers; see run_in_pieces.
template <class F>
bool together(int64_t pieces, int threads, const F& f) {
    return run_in_pieces(
        pieces, threads,
        [](const void* context, Participant& self) { (*static_cast<const F*>(context))(self); }, &f);
}

// f(begin, end, member) on pieces of [0, count) of about `grain`, on at most `threads` threads;
// member is below `threads`. An element's result must not depend on how the work is cut.
template <class F>
void share(int64_t count, int64_t grain, int threads, const F& f) {
    const int64_t useful = (count + grain - 1) / grain;
    const int team = useful < threads ? static_cast<int>(useful) : threads;
    if (team > 1) {
        int64_t pieces = (useful + team - 1) / team * team;  // the same number for each thread
        if (pieces > count) pieces = count;
        if (pieces > most_pieces) pieces = most_pieces;
        const bool done = together(pieces, team, [&](Participant& self) {
            for (int64_t piece; self.next(&piece);)
                f(count * piece / pieces, count * (piece + 1) / pieces, self.member());
        });
        if (done) return;
    }
    if (count > 0) f(int64_t{0}, count, 0);
}

// So many rows of `width` elements are worth a thread.
inline int64_t rows_per_thread(int64_t width) { return 16384 / (width + 1) + 1; }

// Uninitialised memory, aligned to a cache line; data() is null if there is none.
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

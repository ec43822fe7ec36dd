// How every operator shares its work among threads, and gets its scratch memory. Helper threads take
// part in a call's work, which is claimed in pieces.
//
// At an OpenMP barrier a call waits for threads that the system is not running, because another
// program has their core. Here every thread that runs claims the next piece. The calling thread does
// everything alone if no helper comes, and waits at the end only for pieces that were begun.
//
// Every calling thread has helpers of its own. They start with the thread's first call that wants
// them and end when the thread ends. Between calls they spin for microseconds and then sleep. A
// forked child starts its own.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace dit {

struct Team;

// One thread at work on one job.
class Participant {
   public:
    // Claims a piece. Returns false when none is left.
    bool next(int64_t* piece);

    // 0 for the calling thread, and below the job's number of threads for its helpers.
    int member() const { return member_; }

   private:
    friend struct Team;
    Participant(Team& team, uint32_t job, int members, int member)
        : team_(team), job_(job), members_(members), member_(member) {}

    Team& team_;
    const uint32_t job_;
    const int members_, member_;
    int64_t held_ = -1;     // a piece that was claimed before the work was entered
    uint32_t claimed_ = 0;  // pieces claimed so far
};

using Work = void (*)(const void* context, Participant& self);

constexpr int64_t most_pieces = 65535;

// Calls work(context, participant) in this thread and in the helpers that come in time, `threads`
// of them in all at most, and returns true when all pieces, 1 to most_pieces, are done. The work
// claims until nothing is left. Returns false and does nothing where there is no memory.
bool run_in_pieces(int64_t pieces, int threads, Work work, const void* context);

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

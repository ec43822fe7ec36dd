// Helper threads that take part in a call's work, which is claimed in pieces.
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

}  // namespace dit

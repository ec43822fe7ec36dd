#include "parallel.h"

#include <atomic>
#include <csignal>
#include <initializer_list>
#include <memory>
#include <new>

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace dit {
namespace {

constexpr int most_members = 256;

// How long helpers stay awake for the next operator of a step, and the caller for the last pieces of
// a call. Where another program has a helper's core, a caller that sleeps gives the helper its own.
constexpr int64_t helper_spins_ns = 5'000, caller_spins_ns = 30'000;

// Threads sleep on 32-bit words (futexes). This bit of a word says that a thread sleeps on it.
using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free, "a futex");
constexpr uint32_t asleep = uint32_t{1} << 31;

void sleep_while(Word& word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
}

// Spins until done(word) is true. Returns false if that takes longer than limit_ns.
template <class Done>
bool spin(const Word& word, int64_t limit_ns, const Done& done) {
    for (const int64_t end = now_ns() + limit_ns;;) {
        for (int i = 0; i < 16; ++i) {
            if (done(word.load(std::memory_order_acquire))) return true;
            _mm_pause();
        }
        if (now_ns() > end) return false;
    }
}

struct alignas(64) Helper {
    Word called{0};  // the number of the job to join
    Team* team;
    int member;
    pthread_t thread;
    cpu_set_t allowed, given;  // processors that the system allows, and less the caller's
};

// The pieces of one member's part that nobody has claimed yet: job << 32 | first << 16 | end. The
// member claims from the front, so that its pieces follow each other; others claim from the end.
struct alignas(64) Part {
    std::atomic<uint64_t> pieces{0};
};

}  // namespace

struct Team {
    // These describe the job under way. A helper that comes late may read them while the next job's
    // values are written; it then claims nothing, because each part holds its job's number.
    std::atomic<Work> work;
    std::atomic<const void*> context;
    std::atomic<int> members;
    std::atomic<bool> ends{false};

    uint32_t job = 0;
    int avoided = -1;  // the processor that helpers stay away from
    int helpers = 0, possible = most_members - 1;
    std::unique_ptr<Helper> helper[most_members - 1];
    alignas(64) Word left{0};  // pieces that are not done
    Part parts[most_members];

    ~Team();
    void run(int64_t pieces, int threads, Work todo, const void* with);
    void take_part(int member, uint32_t number, int count);
    void call(Helper& one);
    void avoid(int processor);
    bool start();
    static void* help(void* self);
};

namespace {

struct Owner {
    Team* team = nullptr;
    ~Owner() { delete team; }
};
thread_local Owner owner;

// A forked child has no helpers, and what they were working on may be in any state.
void forked() { owner.team = nullptr; }

Team* own_team() {
    if (owner.team == nullptr) {
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        pthread_once(&once, [] { pthread_atfork(nullptr, nullptr, forked); });
        owner.team = new (std::nothrow) Team;
    }
    return owner.team;
}

}  // namespace

bool run_in_pieces(int64_t pieces, int threads, Work work, const void* context) {
    Team* const team = own_team();
    if (team != nullptr) team->run(pieces, threads, work, context);
    return team != nullptr;
}

void Team::run(int64_t pieces, int threads, Work todo, const void* with) {
    if (threads > most_members) threads = most_members;
    while (helpers < threads - 1 && helpers < possible) {
        if (!start()) possible = helpers;  // what the system allows: no more attempts
    }
    const int count = helpers + 1 < threads ? helpers + 1 : threads;
    if (const int here = sched_getcpu(); here != avoided) avoid(here);
    job = (job + 1) & ~asleep;
    work.store(todo, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    members.store(count, std::memory_order_relaxed);
    left.store(static_cast<uint32_t>(pieces), std::memory_order_relaxed);
    for (int i = 0; i < count; ++i) {
        const auto first = static_cast<uint64_t>(pieces * i / count);
        const auto end = static_cast<uint64_t>(pieces * (i + 1) / count);
        // Released, as a helper of an earlier job may see this before it is called.
        parts[i].pieces.store(uint64_t{job} << 32 | first << 16 | end, std::memory_order_release);
    }
    for (int i = 0; i + 1 < count; ++i) call(*helper[i]);
    take_part(0, job, count);
    if (spin(left, caller_spins_ns, [](uint32_t pieces_left) { return pieces_left == 0; })) return;
    uint32_t now = left.fetch_or(asleep, std::memory_order_acquire) | asleep;
    while (now != asleep) {
        sleep_while(left, now);
        now = left.load(std::memory_order_acquire);
    }
}

void Team::take_part(int member, uint32_t number, int count) {
    const Work todo = work.load(std::memory_order_relaxed);
    const void* const with = context.load(std::memory_order_relaxed);
    Participant self(*this, number, count, member);
    // The job is under way until this piece is done, so what was read above belongs to it.
    int64_t piece;
    if (!self.next(&piece)) return;
    self.held_ = piece;
    todo(with, self);
    if (left.fetch_sub(self.claimed_, std::memory_order_acq_rel) - self.claimed_ == asleep) {
        wake(left);
    }
}

bool Participant::next(int64_t* piece) {
    if (held_ >= 0) {
        *piece = held_;
        held_ = -1;
        return true;
    }
    for (int i = 0; i < members_; ++i) {
        auto& part = team_.parts[(member_ + i) % members_].pieces;
        uint64_t now = part.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t first = now >> 16 & 0xffff, end = now & 0xffff;
            if (now >> 32 != job_ || first == end) break;
            const uint64_t rest = i == 0 ? now + (1 << 16) : now - 1;
            if (!part.compare_exchange_weak(now, rest, std::memory_order_acquire,
                                            std::memory_order_relaxed)) {
                continue;
            }
            *piece = static_cast<int64_t>(i == 0 ? first : end - 1);
            ++claimed_;
            return true;
        }
    }
    return false;
}

void Team::call(Helper& one) {
    if (one.called.exchange(job, std::memory_order_acq_rel) & asleep) wake(one.called);
}

void* Team::help(void* argument) {
    Helper& self = *static_cast<Helper*>(argument);
    Team& team = *self.team;
    for (uint32_t before = 0;;) {
        if (!spin(self.called, helper_spins_ns, [&](uint32_t job) { return job != before; })) {
            uint32_t now = before;
            if (self.called.compare_exchange_strong(now, before | asleep)) now = before | asleep;
            while (now == (before | asleep)) {
                sleep_while(self.called, now);
                now = self.called.load(std::memory_order_acquire);
            }
        }
        before = self.called.load(std::memory_order_acquire);
        if (team.ends.load(std::memory_order_relaxed)) return nullptr;
        team.take_part(self.member, before, team.members.load(std::memory_order_relaxed));
    }
}

// Keeps helpers off the caller's processor. When all processors are busy, the system may put a helper
// that wakes up on the caller's, and let the caller wait for it.
void Team::avoid(int processor) {
    avoided = processor;
    for (int i = 0; i < helpers; ++i) {
        Helper& one = *helper[i];
        cpu_set_t now;
        if (pthread_getaffinity_np(one.thread, sizeof now, &now) != 0) continue;
        if (!CPU_EQUAL(&now, &one.given)) one.allowed = now;  // someone else has chosen
        one.given = one.allowed;
        if (processor >= 0 && processor < CPU_SETSIZE) CPU_CLR(processor, &one.given);
        if (CPU_COUNT(&one.given) == 0) one.given = one.allowed;
        if (!CPU_EQUAL(&now, &one.given)) {
            pthread_setaffinity_np(one.thread, sizeof one.given, &one.given);
        }
    }
}

// One more helper, if the system allows it.
bool Team::start() {
    std::unique_ptr<Helper> one(new (std::nothrow) Helper);
    if (one == nullptr) return false;
    one->team = this;
    one->member = helpers + 1;
    // A helper blocks the signals meant for the program, but not those of its own faults.
    sigset_t others, before;
    sigfillset(&others);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    const bool started = pthread_create(&one->thread, nullptr, help, one.get()) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return false;
    if (pthread_getaffinity_np(one->thread, sizeof one->given, &one->given)) CPU_ZERO(&one->given);
    one->allowed = one->given;
    helper[helpers++] = std::move(one);
    avoided = -1;
    return true;
}

// Runs when the owning thread ends; no job is under way then.
Team::~Team() {
    ends.store(true, std::memory_order_relaxed);
    job = (job + 1) & ~asleep;
    for (int i = 0; i < helpers; ++i) call(*helper[i]);
    for (int i = 0; i < helpers; ++i) pthread_join(helper[i]->thread, nullptr);
}

}  // namespace dit

// The pool of kernels/csrc/cpu/pool/ by itself, for test_native_pool.py: each argument names a case.

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>
#include <vector>

#include "../../kernels/csrc/cpu/pool/parallel.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition), std::_Exit(1); \
    } while (0)

namespace {

void spend_us(int us) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
    while (std::chrono::steady_clock::now() < end) {}
}

// Every piece is done once, by members below `threads` of which each is one thread. Returns how many
// members took part.
int one_job(int64_t pieces, int threads, int us = 0) {
    std::vector<int> done(pieces);  // not atomic: a piece that two threads do is a race, for TSan
    std::vector<std::thread::id> who(threads);
    dit::together(pieces, threads, [&](dit::Participant& self) {
        CHECK(self.member() >= 0 && self.member() < threads);
        CHECK(who[self.member()] == std::thread::id());
        who[self.member()] = std::this_thread::get_id();
        for (int64_t piece; self.next(&piece); ++done[piece]) spend_us(us);
    });
    for (const int times : done) CHECK(times == 1);
    CHECK(who[0] == std::thread::id() || who[0] == std::this_thread::get_id());
    int took_part = 0;
    for (const auto& id : who) took_part += id != std::thread::id();
    return took_part;
}

void many_jobs(int count) {
    for (int i = 0; i < count; ++i) {
        one_job(1 + i % 37, 1 + i % 5);
        std::vector<int64_t> values(1 + i % 1000);  // each job reads what the one before wrote
        for (int round = 0; round < 3; ++round) {
            dit::share(values.size(), 16, 1 + i % 4, [&](int64_t begin, int64_t end, int) {
                for (; begin < end; ++begin) values[begin] += begin + 1;
            });
        }
        for (size_t k = 0; k < values.size(); ++k)
            CHECK(values[k] == 3 * static_cast<int64_t>(k + 1));
    }
}

void in_a_child(void (*f)()) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);
        f();
        std::exit(0);  // with its destructors
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void helpers_help() {
    // Each piece is long enough for a helper to wake up, even on a busy machine, in one of the jobs.
    bool helped = false;
    for (int i = 0; i < 1000 && !helped; ++i) helped = one_job(64, 3, 50) > 1;
    CHECK(helped);
    one_job(dit::most_pieces, 2);
}

void several_callers() {
    std::vector<std::thread> callers;
    for (int i = 0; i < 6; ++i) callers.emplace_back(many_jobs, 300);
    for (auto& caller : callers) caller.join();
}

void forks() {
    many_jobs(20);
    in_a_child([] { many_jobs(200), helpers_help(); });
    std::atomic<bool> stop{false};
    std::thread other([&] { while (!stop) one_job(8, 4, 5); });  // inside a call at the fork
    for (int i = 0; i < 20; ++i) in_a_child([] { many_jobs(20); });
    stop = true;
    other.join();
    many_jobs(20);
}

void without_threads() {
    long pages = 0;
    std::FILE* const file = std::fopen("/proc/self/statm", "r");
    CHECK(file != nullptr && std::fscanf(file, "%ld", &pages) == 1);
    std::fclose(file);
    rlimit limit{};
    getrlimit(RLIMIT_AS, &limit);
    const rlim_t enough = pages * sysconf(_SC_PAGESIZE) + (2 << 20);  // but not for a stack
    const rlimit less{enough, limit.rlim_max};
    setrlimit(RLIMIT_AS, &less);
    CHECK(one_job(100, 3, 50) == 1);
    setrlimit(RLIMIT_AS, &limit);
}

void sleeps() {
    for (int i = 0; i < 20; ++i) one_job(64, 4, 50);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const std::clock_t before = std::clock();  // processor time of all threads
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    CHECK(std::clock() - before < CLOCKS_PER_SEC / 200);
}

}  // namespace

int main(int count, char** cases) {
    alarm(60);
    for (int i = 1; i < count; ++i) {
        const char* name = cases[i];
        if (!std::strcmp(name, "jobs")) many_jobs(2000);
        else if (!std::strcmp(name, "helpers")) helpers_help();
        else if (!std::strcmp(name, "callers")) several_callers();
        else if (!std::strcmp(name, "forks")) forks();
        else if (!std::strcmp(name, "without threads")) without_threads();
        else if (!std::strcmp(name, "sleeps")) sleeps();
        else return 2;
    }
}

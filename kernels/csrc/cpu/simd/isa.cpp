#include <atomic>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "checks.h"

namespace dit {
namespace {

constexpr bool has(unsigned bits, unsigned bit) { return (bits >> bit) & 1; }

unsigned extended_control_register() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// Linux gives a process the tile registers only on request; threads started later inherit them.
bool permit_tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

Isa of_machine() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::none;
    const bool fma = has(c, 12), osxsave = has(c, 27), f16c = has(c, 29);
    if (!fma || !osxsave || !f16c) return Isa::none;
    const unsigned state = extended_control_register();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::none;
    if (!has(b, 5) || (state & 0x6) != 0x6) return Isa::none;  // AVX2; XMM and YMM are saved
    const bool avx512 = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(c, 11);
    if (!avx512 || (state & 0xe6) != 0xe6) return Isa::avx2;  // F, DQ, BW, VL, VNNI; ZMM is saved
    const bool amx = has(d, 22) && has(d, 24) && has(d, 25) && (state & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, 5)) return Isa::avx512;
    return amx && permit_tiles() ? Isa::amx : Isa::avx512_bf16;
}

std::atomic<int> current{-1};  // −1: not known yet

}  // namespace

Isa isa() {
    int level = current.load(std::memory_order_relaxed);
    if (level < 0) current.store(level = static_cast<int>(of_machine()), std::memory_order_relaxed);
    return static_cast<Isa>(level);
}

}  // namespace dit

extern "C" {

DIT_API const char* dit_interface(void) { return DIT_INTERFACE; }  // CMakeLists.txt computes it

DIT_API int dit_isa(void) { return static_cast<int>(dit::isa()); }

// Tests run every level that the machine has.
DIT_API int dit_set_isa(int level) {
    if (level < 0 || level > static_cast<int>(dit::Isa::amx)) return dit::bad_size;
    const int most = static_cast<int>(dit::of_machine());
    dit::current.store(level < most ? level : most, std::memory_order_relaxed);
    return dit::ok;
}
}

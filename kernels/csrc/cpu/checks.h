// Argument checks of the C interface, and which instructions this process may use.

#pragma once

#include <cstdint>
#include <initializer_list>

#include "interface.h"

namespace dit {

// The level in use: the machine's (processor and operating system), or a lower one asked for.
// At Isa::amx the process has the kernel's permission to use tile data.
Isa isa();

namespace {

inline int64_t size_of(int dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline bool known(int dtype) { return dtype >= Dtype::f32 && dtype <= Dtype::f16; }

// XOR with this turns an int8 code into the kind asked for: int8, or code + 128 as uint8.
inline uint8_t flip_of(int unsigned_codes) { return unsigned_codes ? 0x80 : 0; }

// Whether all sizes are ≥ 0 and their product is small enough for offsets in bytes.
template <class... Sizes>
bool sizes_fit(Sizes... sizes) {
    int64_t total = 16;
    for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
        if (size < 0 || __builtin_mul_overflow(total, size == 0 ? 1 : size, &total)) return false;
    }
    return true;
}

struct Pointer {
    const void* data;
    int64_t alignment;
    bool required = true;
};

template <int count>
int check_pointers(const Pointer (&pointers)[count]) {
    for (const Pointer& p : pointers) {
        if (p.data == nullptr && p.required) return null_pointer;
        const auto address = reinterpret_cast<uintptr_t>(p.data);
        if (address % static_cast<uintptr_t>(p.alignment) != 0) return misaligned;
    }
    return ok;
}

}  // namespace
}  // namespace dit

#define DIT_CHECK(condition, error) \
    if (!(condition)) return error

#define DIT_CHECK_POINTERS(...) \
    if (const int error = check_pointers({__VA_ARGS__}); error != ok) return error

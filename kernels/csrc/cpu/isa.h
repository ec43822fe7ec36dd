// Which instructions this process may use.

#pragma once

namespace dit {

// Each level holds the ones before it; CMakeLists.txt lists their instruction sets.
enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The level in use: the machine's (processor and operating system), or a lower one asked for.
// At Isa::amx the process has the kernel's permission to use tile data.
Isa isa();

}  // namespace dit

// Element types as they lie in memory; vector_*.h converts them to and from float32.

#pragma once

#include <cstdint>

namespace dit {

struct Bf16 {
    uint16_t bits;
};

struct F16 {
    uint16_t bits;
};

}  // namespace dit

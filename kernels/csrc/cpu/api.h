// What the C interface has in common: export, dtypes and error codes.
//
// Every function returns 0 or a negative Error. Sizes and strides are int64_t, in elements; the last
// argument is the number of OpenMP threads. Data pointers need the alignment of their elements.

#pragma once

#include <cstdint>

#define DIT_API __attribute__((visibility("default")))

namespace dit {

enum Error : int {
    ok = 0,
    null_pointer = -1,
    bad_size = -2,
    bad_dtype = -3,
    bad_threads = -4,
    misaligned = -5,
    no_isa = -6,
    bad_stride = -7,
    no_memory = -8,
};

enum Dtype : int { f32 = 0, bf16 = 1, f16 = 2, s32 = 3 };  // s32: sums of products of codes

}  // namespace dit

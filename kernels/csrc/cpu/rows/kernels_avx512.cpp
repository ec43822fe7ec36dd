#include "simd/vector_avx512.h"

#include "kernels_table.h"

namespace dit {

extern const Kernels kernels_avx512 = make_kernels();

}  // namespace dit

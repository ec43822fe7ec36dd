#include "simd/vector_avx2.h"

#include "kernels_table.h"

namespace dit {

extern const Kernels kernels_avx2 = make_kernels();

}  // namespace dit

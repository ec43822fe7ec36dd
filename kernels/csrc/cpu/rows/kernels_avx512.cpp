#include "kernels_table.h"

const dit::Kernels dit::kernels_avx512 = make_kernels();

#include "kernels_table.h"

const dit::Kernels dit::kernels_avx512bf16 = make_kernels();

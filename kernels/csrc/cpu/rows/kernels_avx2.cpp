#include "kernels_table.h"

const dit::Kernels dit::kernels_avx2 = make_kernels();

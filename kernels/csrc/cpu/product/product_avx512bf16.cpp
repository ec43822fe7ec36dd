#include "simd/vector_avx512.h"

#include "simd/vector_math.h"

#include "product_kernels.h"

namespace dit {

int product_f32_avx512bf16(const ProductCall& call) { return product<F32Steps, float>(call); }

int product_bf16_avx512bf16(const ProductCall& call) { return product<Bf16Steps, Bf16>(call); }

int product_codes_avx512bf16(const ProductCall& call) {
    return call.out_dtype == f32 ? product<CodeSteps, float>(call) : product<CodeSteps, Bf16>(call);
}

}  // namespace dit

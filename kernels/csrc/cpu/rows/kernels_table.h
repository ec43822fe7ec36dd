// The table of kernels for the vectors that the including file is compiled for.

#pragma once

#include "image_kernels.h"
#include "token_kernels.h"

namespace dit {
namespace {

constexpr Kernels make_kernels() {
    return {
        {norm<float>, norm<Bf16>, norm<F16>},
        {quantize<float>, quantize<Bf16>, quantize<F16>},
        {gelu_all<float>, gelu_all<Bf16>, gelu_all<F16>},
        {dequantize<float>, dequantize<Bf16>, dequantize<F16>},
        {moments<float>, moments<Bf16>, moments<F16>},
        {normalize<float>, normalize<Bf16>, normalize<F16>},
        {guided_step<float>, guided_step<Bf16>, guided_step<F16>},
        {embed<float>, embed<Bf16>, embed<F16>},
        {to_float<float>, to_float<Bf16>, to_float<F16>},
    };
}

}  // namespace
}  // namespace dit

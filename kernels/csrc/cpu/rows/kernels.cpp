#include "kernels.h"

#include "simd/isa.h"

namespace dit {

const Kernels* kernels() {
    switch (isa()) {
        case Isa::none: return nullptr;
        case Isa::avx2: return &kernels_avx2;
        case Isa::avx512: return &kernels_avx512;
        default: return &kernels_avx512bf16;
    }
}

}  // namespace dit

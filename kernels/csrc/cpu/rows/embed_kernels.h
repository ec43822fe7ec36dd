// The first layer: patches of latents, their projection, and the position embedding.

#pragma once

namespace dit {
namespace {

template <class T>
void embed(const EmbedArgs& a, int64_t begin, int64_t end, float* patch) {
    const int64_t side = a.s / a.p, tokens = side * side, inputs = a.c * a.p * a.p;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t image = row / tokens, token = row % tokens;
        const float* corner =
            a.z + (image * a.c * a.s + token / side * a.p) * a.s + token % side * a.p;
        for (int64_t k = 0; k < inputs; ++k) {
            patch[k] = corner[(k / (a.p * a.p) * a.s + k / a.p % a.p) * a.s + k % a.p];
        }
        const float* position = a.positions + token * a.d;
        sweep(a.d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            Vec sum = set(0);
            for (int64_t k = 0; k < inputs; ++k) {
                sum = fma(set(patch[k]), load(a.weight + k * a.d + i, part), sum);
            }
            sum = add(add(sum, load(a.bias + i, part)), load(position + i, part));
            store(static_cast<T*>(a.out) + row * a.d + i, sum, part);
        });
    }
}

}  // namespace
}  // namespace dit

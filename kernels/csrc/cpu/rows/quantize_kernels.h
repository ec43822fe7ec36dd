// Symmetric int8 codes for rows.

#pragma once

namespace dit {
namespace {

// The scale of a row whose greatest magnitude is given; NaN stays NaN.
DIT_INLINE float scale_of(float greatest) {
    return (greatest < 1e-12f ? 1e-12f : greatest) / 127.0f;
}

// value(i, part) is called for every part.
template <class F>
DIT_INLINE void write_codes(uint8_t* codes, float scale, int64_t d, uint8_t flip, const F& value) {
    const Vec inverse = set(1.0f / scale);
    sweep(d, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
        store_codes(codes + i, mul(value(i, part), inverse), flip, part);
    });
}

template <class T>
void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.d;
        Maxima maxima;
        sweep(a.d, [&](int64_t i, auto part, int k) __attribute__((always_inline)) {
            maxima[k] = max_magnitude(maxima[k], load(x + i, part));
        });
        const float scale = a.scales[row] = scale_of(maxima.greatest());
        write_codes(a.codes + row * a.d, scale, a.d, a.flip,
                    [&](int64_t i, auto part) __attribute__((always_inline)) {
                        return load(x + i, part);
                    });
    }
}

}  // namespace
}  // namespace dit

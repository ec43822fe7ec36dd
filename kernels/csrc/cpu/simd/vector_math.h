// Loops over a row, the exponential function, SiLU and GELU.

#pragma once

#include <type_traits>

#include "vector.h"

namespace dit {
namespace {

// Calls f(i, part, k) for consecutive parts of [0, count). k is a constant 0…3: a loop can keep one
// accumulator per k, so that additions need not wait for each other.
template <class F>
DIT_INLINE void sweep(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes) {
        f(i, Full{}, 0);
        f(i + lanes, Full{}, 1);
        f(i + 2 * lanes, Full{}, 2);
        f(i + 3 * lanes, Full{}, 3);
    }
    for (; i + lanes <= count; i += lanes) f(i, Full{}, 0);
    if (i < count) f(i, tail(count - i), 0);
}

// Four accumulators, one for each k of sweep.
struct Sums {
    Vec part[4] = {set(0), set(0), set(0), set(0)};
    DIT_INLINE Vec& operator[](int k) { return part[k]; }
    DIT_INLINE float total() const {
        return sum_of(add(add(part[0], part[1]), add(part[2], part[3])));
    }
};

struct Maxima {
    Vec part[4] = {set(0), set(0), set(0), set(0)};
    DIT_INLINE Vec& operator[](int k) { return part[k]; }
    DIT_INLINE float greatest() const {
        return max_of(max_magnitude(max_magnitude(part[0], part[1]),
                                    max_magnitude(part[2], part[3])));
    }
};

// e^v within 2 units in the last place. v = n ln 2 + r, |r| ≤ ln 2 / 2; the polynomial is the best
// of its degree for the relative error of e^r.
DIT_INLINE Vec exponential(Vec v) {
    v = clamp(v, 104);  // beyond, e^v is inf or 0 in float32
    const Vec n = round_even(mul(v, set(1.44269504f)));
    Vec r = fma(n, set(-0.693115234375f), v);  // the product is exact: ln 2 cut to 12 bits
    r = fma(n, set(-3.19461849e-5f), r);
    Vec q = fma(r, set(1.38146128e-3f), set(8.36871006e-3f));
    q = fma(r, q, set(4.16683890e-2f));
    q = fma(r, q, set(1.66665211e-1f));
    q = fma(r, q, set(0.49999994f));
    return scale_by_power(add(fma(mul(r, r), q, r), set(1)), n);
}

// 2^v within a factor of 1 ± 2.6e-6, which is enough for bfloat16.
DIT_INLINE Vec rough_exp2(Vec v) {
    const Exp2Parts parts = exp2_parts(v);
    const Vec f = parts.fraction;
    Vec y = fma(f, set(1.35341678e-2f), set(5.20114601e-2f));
    y = fma(f, y, set(0.241442755f));
    y = fma(f, y, set(0.693003833f));
    y = fma(f, y, set(1.00000262f));
    return scale_by_power(y, parts.power);
}

// x · sigmoid(x); `Out` is the type that the result is rounded to.
template <class Out>
DIT_INLINE Vec silu(Vec x) {
    if constexpr (std::is_same_v<Out, Bf16>) {
        return mul(x, rough_reciprocal(add(rough_exp2(mul(x, set(-1.44269504f))), set(1))));
    } else {
        return div(x, add(exponential(sub(set(0), x)), set(1)));
    }
}

// ½ x (1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³).
template <class Out>
DIT_INLINE Vec gelu(Vec x) {
    const Vec square = mul(x, x);
    if constexpr (std::is_same_v<Out, Bf16>) {  // −2u in powers of two
        const Vec power = mul(x, fma(square, set(-0.10294324f), set(-2.3022082f)));
        return mul(x, rough_reciprocal(add(rough_exp2(power), set(1))));
    } else {
        const Vec power = mul(x, fma(square, set(-7.13548163e-2f), set(-1.59576912f)));
        return div(x, add(exponential(power), set(1)));
    }
}

}  // namespace
}  // namespace dit

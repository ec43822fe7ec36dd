// Flash attention forward on the packed projection, for every instruction set.
//
// Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithm 1, with the online softmax of
// Milakov & Gimelshein 2018 (arXiv 1805.02867). A thread takes whole blocks of queries: it packs
// its head's keys and values once, and then for each block of queries and block of keys
//
//   S = Q Kᵀ                            scores, float32
//   m' = max(m, max_j S_j)
//   W = 2^((S − m') c), r = 2^((m − m') c)    c = log2(e) / √d; weights ≤ 1, so none overflows
//   l = r l + Σ_j W_j,  O = r O + W V
//
// and writes O / l. A row's arithmetic does not depend on what else its thread computes, so the
// result is the same for every number of threads.
//
// NaN and infinity: a NaN score makes its weight NaN, a score of +inf makes m' = inf and its weight
// 2^(inf − inf) = NaN, and m starts at the lowest finite number, so that a row of −inf sums to 0
// and gives 0 / 0: all as in the plain softmax. But a weight that would be subnormal is 0, so that an
// infinite value which it meets makes NaN, not infinity.
//
// (S c − m' c would save an operation, and be wrong by the rounding of m' c, which for large scores
// is more than a float can be a power of.)
//
// Source: how an element is read. Products: the two matrix products, see VectorProducts and
// TileProducts. Blocks: how many queries and keys are worked on at a time, and the polynomial.

#pragma once

#include "attention.h"
#include "attention_pack.h"
#include "attention_product.h"
#include "interface.h"
#include "pool/parallel.h"

namespace dit {
namespace {

constexpr float lowest = -3.40282347e38f;

template <class Source, class Products, class Blocks>
class Head {
    static constexpr int per_unit = Source::per_unit;
    static constexpr int queries = Blocks::queries, keys = Blocks::keys;
    // Not a power of two: rows that lie 4096 bytes apart compete for the same lines of the cache.
    static constexpr int score_stride = keys + 16, weight_stride = keys / per_unit + 16;
    static_assert(queries % Simd::lanes == 0 && keys % Products::strip == 0, "whole vectors");
    static_assert(queries <= most_queries, "attention_product.h");

    const AttentionCall& call_;
    const int64_t units_, depth_, width_, strips_;
    const float factor_;  // c above
    float *keys_, *values_, *queries_, *scores_, *weights_, *output_, *sums_, *maxima_, *rescale_;

    static int64_t width_of(const AttentionCall& call) { return round_up(call.d, Simd::lanes); }
    static int64_t depth_of(const AttentionCall& call) {
        return round_up(call.d / per_unit, Products::depth_multiple);
    }
    static int64_t key_units(const AttentionCall& call) {
        return round_up(call.t, Products::strip) * depth_of(call);
    }
    static int64_t value_units(const AttentionCall& call) {
        return round_up(call.t, Products::key_multiple) / per_unit * width_of(call);
    }

   public:
    static size_t bytes(const AttentionCall& call) {
        const int64_t a_query = depth_of(call) + score_stride + weight_stride + width_of(call) +
                                Simd::lanes + 2;
        return 4 * (round_up(key_units(call), 16) + round_up(value_units(call), 16) +
                    queries * a_query);
    }

    Head(const AttentionCall& call, float* scratch)
        : call_(call),
          units_(call.d / per_unit),
          depth_(depth_of(call)),
          width_(width_of(call)),
          strips_(Products::strip),
          factor_(static_cast<float>(1.4426950408889634 / __builtin_sqrt(1.0 * call.d))) {
        const auto take = [&scratch](int64_t count) {
            float* piece = scratch;
            scratch += count;
            return piece;
        };
        keys_ = take(round_up(key_units(call), 16));
        values_ = take(round_up(value_units(call), 16));
        queries_ = take(queries * depth_);
        scores_ = take(queries * score_stride);
        weights_ = take(queries * weight_stride);
        output_ = take(queries * width_);
        sums_ = take(queries * Simd::lanes);
        maxima_ = take(queries);
        rescale_ = take(queries);
    }

    void pack(int64_t image, int64_t head) {
        pack_keys<Source>(rows(image, head, 1), round_up(call_.t, Products::key_multiple), units_,
                          depth_, strips_, keys_);
        pack_values<Source>(rows(image, head, 2), round_up(call_.t, Products::key_multiple),
                            call_.d, width_, values_);
    }

    void attend(int64_t image, int64_t head, int64_t first) {
        const int64_t count = call_.t - first < queries ? call_.t - first : queries;
        const int64_t padded = round_up(count, Products::row_multiple);
        pack_queries<Source>(rows(image, head, 0), first, padded, units_, depth_, queries_);
        for (int64_t r = 0; r < queries; ++r) maxima_[r] = lowest;
        for (int64_t i = 0; i < queries * Simd::lanes; ++i) sums_[i] = 0;
        for (int64_t key = 0; key < call_.t; key += keys) {
            const int64_t here = call_.t - key < keys ? call_.t - key : keys;
            for (int64_t s = 0; s < here; s += Products::strip) {
                const float* strip = keys_ + (key + s) * depth_;
                const int64_t columns = here - s < Products::strip ? here - s : Products::strip;
                Products::scores({queries_, depth_, strip, Products::strip, scores_ + s,
                                  score_stride, padded, depth_, nullptr},
                                 columns);
            }
            softmax(padded, here);
            const float* v = values_ + key / per_unit * width_;
            const int64_t steps = round_up(here, Products::key_multiple) / per_unit;
            Products::values({weights_, weight_stride, v, width_, output_, width_, padded, steps,
                              key ? rescale_ : nullptr},
                             width_);
        }
        finish(image, head, first, count);
    }

   private:
    Rows rows(int64_t image, int64_t head, int64_t which) const {
        const int64_t width = call_.heads * call_.d * Source::bytes;
        const char* base = static_cast<const char*>(call_.qkv) + image * call_.t * 3 * width;
        return {base + which * width + head * call_.d * Source::bytes, 3 * width, call_.t};
    }

    // scores_ (count, here) → weights_, with maxima_, rescale_ and sums_ brought up to date.
    void softmax(int64_t count, int64_t here) {
        const int64_t columns = round_up(here, Products::key_multiple);
        for (int64_t r = 0; r < count; ++r) {
            float* row = scores_ + r * score_stride;
            for (int64_t j = here; j < columns; ++j) row[j] = -__builtin_inff();  // weight 0
            Vec most = Simd::set(lowest);
            for (int64_t j = 0; j < columns; j += Simd::lanes)
                most = Simd::max(most, Simd::load(row + j));
            const float before = maxima_[r];
            const float now = Simd::max_of(most);
            const float maximum = now > before ? now : before;
            rescale_[r] = (before - maximum) * factor_;
            maxima_[r] = maximum;
        }
        for (int64_t r = 0; r < count; r += Simd::lanes)
            Simd::store(rescale_ + r, exp2_of_negative<6>(Simd::load(rescale_ + r)));
        const Vec factor = Simd::set(factor_);
        for (int64_t r = 0; r < count; ++r) {
            const float* row = scores_ + r * score_stride;
            const Vec maximum = Simd::set(maxima_[r]);
            const auto weight = [&](int64_t j) {
                const Vec s = Simd::load(row + j);
                return exp2_of_negative<Blocks::degree>(
                    Simd::mul(Simd::sub(s, maximum), factor));
            };
            float* to = weights_ + r * weight_stride;
            float* sums = sums_ + r * Simd::lanes;
            Vec sum = Simd::mul(Simd::load(sums), Simd::set(rescale_[r]));
            for (int64_t j = 0; j < columns; j += Simd::lanes * per_unit) {
                sum = Simd::add(sum, Blocks::put(weight, j, to + j / per_unit));
            }
            Simd::store(sums, sum);
        }
    }

    void finish(int64_t image, int64_t head, int64_t first, int64_t count) {
        char* out = static_cast<char*>(call_.out);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = (image * call_.t + first + r) * call_.heads + head;
            const float sum = Simd::sum_of(Simd::load(sums_ + r * Simd::lanes));
            const __m256 whole = _mm256_set1_ps(sum), share = _mm256_set1_ps(1 / sum);
            for (int64_t i = 0; i < call_.d; i += 8) {
                const __m256 o = _mm256_loadu_ps(output_ + r * width_ + i);
                // The division rounds once, the product twice, which bfloat16 does not see.
                Source::store8(out + (row * call_.d + i) * Source::bytes,
                               per_unit == 2 ? _mm256_mul_ps(o, share) : _mm256_div_ps(o, whole));
            }
        }
    }
};

template <class Source, class Products, class Blocks>
static int flash_attention(const AttentionCall& call) {
    using OneHead = Head<Source, Products, Blocks>;
    const int64_t blocks = (call.t + Blocks::queries - 1) / Blocks::queries;
    const int64_t work = call.n * call.heads * blocks;
    const int threads = work < call.threads ? static_cast<int>(work) : call.threads;
    const int64_t pieces = work < most_pieces ? work : most_pieces;
    int failed = 0;
    const bool done = together(pieces, threads, [&](Participant& self) {
        float* scratch = static_cast<float*>(attention_scratch(OneHead::bytes(call)));
        int64_t piece, packed = -1;
        if (scratch == nullptr) {
            while (self.next(&piece)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        OneHead one(call, scratch);
        Products::enter();
        while (self.next(&piece)) {
            const int64_t first = work * piece / pieces, last = work * (piece + 1) / pieces;
            for (int64_t i = first; i < last; ++i) {
                const int64_t image = i / blocks / call.heads, head = i / blocks % call.heads;
                // Neighbouring blocks share a head: a thread packs few heads more than its share.
                if (i / blocks != packed) one.pack(image, head);
                packed = i / blocks;
                one.attend(image, head, i % blocks * Blocks::queries);
            }
        }
        Products::leave();
    });
    return done && !failed ? ok : no_memory;
}

}  // namespace
}  // namespace dit

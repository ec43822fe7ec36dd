// Makes recorded calls of this interface again, with nothing between them.

#include <cstring>
#include <tuple>

#include "checks.h"

namespace dit {
namespace {

// The next of the words, or the threads behind the last.
template <class T>
T argument(const uint64_t*& words, const uint64_t* end, uint64_t threads) {
    const uint64_t word = words < end ? *words++ : threads;
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Calls the function with its arguments from words, which then points behind them.
template <class... Arguments>
int make(int (*function)(Arguments...), const uint64_t*& words, uint64_t threads) {
    const uint64_t* const end = words + sizeof...(Arguments) - 1;
    const std::tuple<Arguments...> all{argument<Arguments>(words, end, threads)...};
    return std::apply(function, all);
}

// Calls the one of `functions` whose address is *words.
template <auto... functions>
int make_call(const uint64_t*& words, int threads) {
    const uint64_t address = *words++;
    int result = null_pointer;  // if it is the address of none
    static_cast<void>(((address == reinterpret_cast<uint64_t>(functions) &&
                        (result = make(functions, words, threads), true)) || ...));
    return result;
}

}  // namespace
}  // namespace dit

// words: for each call, the address of its function and its arguments without the threads. Each takes
// 8 bytes, with the value in the first ones. Returns what the first failing call returns.
extern "C" DIT_API int dit_replay(const void* words, int64_t calls, int threads) {
    using namespace dit;
    DIT_CHECK(threads >= 1, bad_threads);
    DIT_CHECK(calls >= 0, bad_size);
    const auto* next = static_cast<const uint64_t*>(words);
    for (; calls > 0; --calls) {
        const int result = make_call<
            dit_layernorm_modulate, dit_layernorm_modulate_quantize, dit_gate_residual,
            dit_gate_residual_layernorm_modulate, dit_gate_residual_layernorm_modulate_quantize,
            dit_gelu, dit_quantize_rows, dit_dequantize_rows, dit_groupnorm_silu, dit_guided_step,
            dit_attention, dit_linear, dit_linear_int8, dit_embed>(next, threads);
        if (result != ok) return result;
    }
    return ok;
}

// Makes recorded calls of this interface again, with nothing between them.

#include <cstring>
#include <utility>

#include "checks.h"

namespace dit {
namespace {

template <class T>
T argument(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <auto function>
struct Call;

template <class... Arguments, int (*function)(Arguments...)>
struct Call<function> {
    static constexpr size_t count = sizeof...(Arguments) - 1;  // all but the threads

    template <size_t... i>
    static int make(const uint64_t* words, int threads, std::index_sequence<i...>) {
        return function(argument<Arguments>(i < count ? words[i] : threads)...);
    }
};

// Calls the one of `functions` whose address is *words, and moves words behind its arguments.
template <auto... functions>
int make_call(const uint64_t*& words, int threads) {
    const uint64_t address = *words++;
    int result = null_pointer;  // if it is the address of none
    const auto made = [&](auto call, uint64_t own) {
        if (address != own) return false;
        constexpr size_t count = decltype(call)::count;
        result = call.make(words, threads, std::make_index_sequence<count + 1>());
        words += count;
        return true;
    };
    static_cast<void>((made(Call<functions>(), reinterpret_cast<uint64_t>(functions)) || ...));
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

// Rows of the caller's tensors, on their way from memory while a product computes. A schedule names loops; prefetch.cpp puts
// the prefetches there.
#pragma once
#include <string>
#include <vector>

namespace holdfast::x86 {

// Over rows of a tensor that one iteration of the loop around (over chunks) reads or writes; the next iteration goes on where
// they end.
inline constexpr const char *rows_ahead = "rows_ahead";
// In that loop: each iteration asks for an equal part of the rows of its next iteration.
inline constexpr const char *ask_ahead = "ask_ahead";

// The name of a loop, in one over chunks of `chunk` rows, whose iterations ask for an equal part of each chunk's rows of `tensors`:
// those that a later stage of the same call reads or writes. Or, `behind`, for the rows of the next head, which the next call reads:
// one stride of the axis of heads further on.
inline constexpr const char *ask_this = "ask_this-", *ask_behind = "ask_behind-";
inline std::string ask_for(const std::vector<std::string> &tensors, int chunk, bool behind = false) {
    std::string name = (behind ? ask_behind : ask_this) + std::to_string(chunk);
    for (const std::string &tensor : tensors) name += "-" + tensor;
    return name;
}

// The name of a loop over vectors of rows [.., tokens, heads, elements], of sizes known at run time only: each that it reads or writes
// of the caller's tensors asks for the one of so many tokens further on. What Halide leaves over beside the loop's iterations does not.
inline constexpr const char *ask_tokens = "ask_tokens-";
inline std::string ask_tokens_ahead(int tokens) { return ask_tokens + std::to_string(tokens); }

}  // namespace holdfast::x86

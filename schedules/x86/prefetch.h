// Rows of the caller's tensors, on their way from memory while a product computes. A schedule names loops; prefetch.cpp puts
// the prefetches there.
#pragma once

namespace holdfast::x86 {

// Over rows of a tensor that one iteration of the loop around (over chunks) reads or writes; the next iteration goes on where
// they end.
inline constexpr const char *rows_ahead = "rows_ahead";
// In that loop: each iteration asks for an equal part of the rows of its next iteration.
inline constexpr const char *ask_ahead = "ask_ahead";

}  // namespace holdfast::x86

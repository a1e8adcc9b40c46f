// Counts what a test's process allocates, the library with it, which takes its operator new from here. For one source of a test.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

static std::atomic<int64_t> allocations{0};
[[gnu::noinline]] void *operator new(size_t bytes) {
    allocations++;
    if (void *memory = std::malloc(bytes)) return memory;
    throw std::bad_alloc();
}
// The form without exceptions is said outright, since sanitizers bring one of their own.
[[gnu::noinline]] void *operator new(size_t bytes, const std::nothrow_t &) noexcept {
    allocations++;
    return std::malloc(bytes);
}
[[gnu::noinline]] void operator delete(void *memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void *memory, const std::nothrow_t &) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void *memory, size_t) noexcept { std::free(memory); }

// A Metal thread group on one CPU thread: its threads are fibers, which change places at barriers.
#pragma once
#include <array>
#include <random>

namespace fakemetal {

using Size = std::array<unsigned, 3>;

/// Runs a kernel as thread `thread` of group `group`. With `buffers` null it only says how many buffers it has.
using Launch = void (*)(int *buffer_count, void **buffers, void *shared, const unsigned *group, const unsigned *thread);

/// The order in which threads of a group take turns, and groups follow each other: a right kernel does not notice.
enum class Order { forward, reverse, shuffle };

/// The threads of one group, from barrier to barrier. Ends the process when some of them wait at a barrier that others
/// never reach.
void run_group(Launch, void **buffers, void *shared, const Size &group, const Size &threads, Order, std::mt19937 &);

/// What threadgroup_barrier() calls.
void wait_at_barrier();

[[noreturn]] void die(const char *format, ...);

}  // namespace fakemetal

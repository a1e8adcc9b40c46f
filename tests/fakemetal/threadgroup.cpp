#include "threadgroup.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fakemetal {
namespace {

constexpr size_t stack_bytes = 512 * 1024;

struct Fiber {
    ucontext_t context;                                    // where it starts
    void *jump[5];                                         // and goes on
    std::unique_ptr<char[]> stack{new char[stack_bytes]};  // used again by group after group
    void *sanitizer = nullptr;                             // the address sanitizer's own record of the stack
    unsigned thread[3];
    bool started = false, finished;
};

struct Running {
    Launch launch;
    void **buffers;
    void *shared;
    const unsigned *group;
    Fiber *fiber;
    void *scheduler[5];  // where it goes on
    void *scheduler_sanitizer;
    const void *scheduler_stack;
    size_t scheduler_stack_bytes;
};
thread_local Running running;

// The address sanitizer has to be told of each change of stacks.
void leave(void **own, const void *stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(own, stack, bytes);
#else
    (void)own, (void)stack, (void)bytes;
#endif
}
void arrive(void *own, const void **from, size_t *bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, from, bytes);
#else
    (void)own, (void)from, (void)bytes;
#endif
}

// Jumps need no system call, as swapcontext does. The compiler wants either side in a function of its own.
#define FAKEMETAL_JUMPS __attribute__((noinline, no_sanitize("address")))
FAKEMETAL_JUMPS void jump(void **to) { __builtin_longjmp(to, 1); }
FAKEMETAL_JUMPS void jump_to_scheduler(Fiber &fiber) {
    if (!__builtin_setjmp(fiber.jump)) jump(running.scheduler);
}
FAKEMETAL_JUMPS void jump_to_fiber(Fiber &fiber) {
    if (__builtin_setjmp(running.scheduler)) return;
    if (fiber.started) jump(fiber.jump);
    fiber.started = true;
    setcontext(&fiber.context);
}

void enter_scheduler(Fiber &fiber) {
    leave(&fiber.sanitizer, running.scheduler_stack, running.scheduler_stack_bytes);
    jump_to_scheduler(fiber);
    arrive(fiber.sanitizer, &running.scheduler_stack, &running.scheduler_stack_bytes);
}

void enter(Fiber &fiber) {
    running.fiber = &fiber;
    leave(&running.scheduler_sanitizer, fiber.stack.get(), stack_bytes);
    jump_to_fiber(fiber);
    arrive(running.scheduler_sanitizer, nullptr, nullptr);
}

void fiber_main() {
    arrive(nullptr, &running.scheduler_stack, &running.scheduler_stack_bytes);
    for (;;) {
        Fiber &self = *running.fiber;
        running.launch(nullptr, running.buffers, running.shared, running.group, self.thread);
        self.finished = true;
        enter_scheduler(self);
    }
}

}  // namespace

void run_group(Launch launch, void **buffers, void *shared, const Size &group, const Size &threads, Order order,
               std::mt19937 &random) {
    thread_local std::deque<Fiber> fibers;
    const size_t count = (size_t)threads[0] * threads[1] * threads[2];
    for (size_t n = fibers.size(); n < count; n++) {
        ucontext_t &context = fibers.emplace_back().context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibers.back().stack.get(), context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
    }
    running.launch = launch, running.buffers = buffers, running.shared = shared, running.group = group.data();

    std::vector<size_t> turns(count);
    for (size_t n = 0; n < count; n++) {
        Fiber &fiber = fibers[n];
        turns[n] = order == Order::reverse ? count - 1 - n : n;
        fiber.finished = false;
        fiber.thread[0] = n % threads[0], fiber.thread[1] = n / threads[0] % threads[1],
        fiber.thread[2] = n / threads[0] / threads[1];
    }
    for (size_t finished = 0; finished == 0;) {
        if (order == Order::shuffle) std::shuffle(turns.begin(), turns.end(), random);
        for (size_t n : turns) {
            enter(fibers[n]);
            finished += fibers[n].finished;
        }
        if (finished != 0 && finished != count)
            die("%zu of %zu threads of a group ended, the others wait at a barrier", finished, count);
    }
}

void wait_at_barrier() { enter_scheduler(*running.fiber); }

}  // namespace fakemetal

// What contexts promise: threads, thread pools, workspace, the choice of the target.
#include "../power.h"

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>

namespace {
using namespace test;

constexpr Size size = {64, 64};

Problem problem(int64_t T = 300) { return {2, T, 4, size.K, size.V}; }

void expect_same(const Problem &a, const Problem &b) {
    EXPECT_TRUE(same_bits(a.out, b.out));
    EXPECT_TRUE(same_bits(a.final_state, b.final_state));
}

// ---- Threads -------------------------------------------------------------------------------------------------------

TEST(Threads, ContextsOfTheirOwn) {
    Problem expected = problem();
    ASSERT_EQ(expected.forward().run(nullptr), HOLDFAST_OK);
    std::vector<std::thread> threads;
    for (int n = 0; n < 4; n++)
        threads.emplace_back([&, n] {
            Context context("", n);
            for (int round = 0; round < 5; round++) {
                Problem p = problem();
                ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
                expect_same(p, expected);
                ASSERT_EQ(holdfast_context_set_threads(context, round), HOLDFAST_OK);
            }
        });
    for (std::thread &thread : threads) thread.join();
}

TEST(Threads, DefaultContextFromManyAtOnce) {
    Problem expected = problem();
    ASSERT_EQ(expected.forward().run(nullptr), HOLDFAST_OK);
    std::vector<std::thread> threads;
    for (int n = 0; n < 8; n++)
        threads.emplace_back([&, n] {
            EXPECT_STREQ(holdfast_last_error(nullptr), "");
            for (int round = 0; round < 5; round++) {
                Problem p = problem();
                ASSERT_EQ(p.forward().run(nullptr), HOLDFAST_OK) << holdfast_last_error(nullptr);
                expect_same(p, expected);
            }
            // Each thread sees the text of its own failure.
            Problem bad = problem();
            Forward f = bad.forward();
            f.chunk_size = -1 - n;
            EXPECT_EQ(f.run(nullptr), HOLDFAST_INVALID_ARGUMENT);
            EXPECT_NE(std::string(holdfast_last_error(nullptr)).find("chunk_size is " + std::to_string(-1 - n)),
                      std::string::npos);
        });
    for (std::thread &thread : threads) thread.join();
}

TEST(Threads, FirstUseFromManyAtOnce) {
    // In a process of its own under CTest: whatever is set up at first use is set up by all of these at once.
    std::vector<std::thread> threads;
    std::atomic<int> waiting{8};
    for (int n = 0; n < 8; n++)
        threads.emplace_back([&] {
            waiting--;
            while (waiting > 0) std::this_thread::yield();
            EXPECT_NE(holdfast_cpu_features(), nullptr);
            Problem p = problem(65);
            ASSERT_EQ(p.forward().run(nullptr), HOLDFAST_OK) << holdfast_last_error(nullptr);
        });
    for (std::thread &thread : threads) thread.join();
}

// ---- Thread pools --------------------------------------------------------------------------------------------------

using Task = void (*)(void *closure, int index);

/// Runs the tasks of each call by a function of the test's; counts calls and tasks.
struct Pool {
    int (*run)(int tasks, Task task, void *closure);
    int calls = 0, tasks = 0;

    static int parallel_for(void *user, int tasks, Task task, void *closure) {
        Pool &pool = *(Pool *)user;
        pool.calls++, pool.tasks += tasks;
        return pool.run(tasks, task, closure);
    }
};

int in_threads(int tasks, Task task, void *closure) {
    std::vector<std::thread> threads;
    for (int n = 0; n < tasks; n++) threads.emplace_back(task, closure, n);
    for (std::thread &thread : threads) thread.join();
    return 0;
}
int backwards(int tasks, Task task, void *closure) {
    for (int n = tasks - 1; n >= 0; n--) task(closure, n);
    return 0;
}
int fails_after_all(int tasks, Task task, void *closure) {
    backwards(tasks, task, closure);
    return 7;
}
int fails_at_once(int, Task, void *) { return -3; }
int forgets_all(int, Task, void *) { return 0; }

TEST(ThreadPool, RunsTheWork) {
    Problem expected = problem();
    ASSERT_EQ(expected.forward().run(nullptr), HOLDFAST_OK);
    for (auto run : {in_threads, backwards}) {
        Context context("", 3);
        Pool pool{run};
        ASSERT_EQ(holdfast_context_set_thread_pool(context, Pool::parallel_for, &pool), HOLDFAST_OK);
        Problem p = problem();
        ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
        expect_same(p, expected);
        EXPECT_EQ(pool.calls, 1);
        EXPECT_EQ(pool.tasks, 3);

        ASSERT_EQ(holdfast_context_set_thread_pool(context, nullptr, nullptr), HOLDFAST_OK);
        ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(pool.calls, 1) << "the pool was used after it was taken away";
    }
}

TEST(ThreadPool, FailureFailsTheCall) {
    const std::pair<int (*)(int, Task, void *), const char *> pools[] = {
        {fails_after_all, "thread pool: parallel_for returned 7"},
        {fails_at_once, "thread pool: parallel_for returned -3"},
        {forgets_all, "thread pool"}};
    for (auto [run, text] : pools) {
        Context context("", 2);
        Pool pool{run};
        ASSERT_EQ(holdfast_context_set_thread_pool(context, Pool::parallel_for, &pool), HOLDFAST_OK);
        Problem p = problem();
        EXPECT_EQ(p.forward().run(context), HOLDFAST_INTERNAL_ERROR);
        EXPECT_NE(context.error().find(text), std::string::npos) << context.error();

        pool.run = backwards;
        EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << "the context does not work after a failure: " << context.error();
    }
}

// ---- Workspace -----------------------------------------------------------------------------------------------------

/// An allocator that knows what it gave, watches the bytes behind it, and fails when told to.
class Memory {
public:
    int64_t allocations = 0, fail_at = -1;  // fail_at: number of the allocation that returns NULL
    size_t held = 0, most = 0;

    ~Memory() { EXPECT_EQ(held, 0u) << "bytes were not given back"; }

    void use_in(holdfast_context *context) {
        ASSERT_EQ(holdfast_context_set_allocator(context, allocate, deallocate, this), HOLDFAST_OK);
    }

private:
    static constexpr size_t guard = 64;
    std::mutex mutex;
    std::map<void *, size_t> blocks;

    static void *allocate(void *user, size_t bytes, size_t alignment) {
        Memory &m = *(Memory *)user;
        std::lock_guard<std::mutex> lock(m.mutex);
        EXPECT_TRUE(alignment > 0 && (alignment & (alignment - 1)) == 0) << alignment << " is no power of two";
        if (m.allocations++ == m.fail_at) return nullptr;
        // Aligned to just that, to show what relies on more.
        const size_t twice = 2 * alignment, needed = alignment + bytes + guard;
        char *memory = (char *)std::aligned_alloc(twice, (needed + twice - 1) / twice * twice) + alignment;
        std::memset(memory + bytes, 0xa5, guard);
        m.blocks[memory] = bytes;
        m.most = std::max(m.most, m.held += bytes);
        return memory;
    }
    static void deallocate(void *user, void *memory, size_t bytes) {
        Memory &m = *(Memory *)user;
        std::lock_guard<std::mutex> lock(m.mutex);
        const auto block = m.blocks.find(memory);
        ASSERT_NE(block, m.blocks.end()) << "memory that was not allocated here, or is free already";
        EXPECT_EQ(block->second, bytes);
        for (size_t n = 0; n < guard; n++) EXPECT_EQ(((unsigned char *)memory)[bytes + n], 0xa5) << "written past its end";
        m.blocks.erase(block);
        m.held -= bytes;
        std::free((char *)memory - alignment_of(memory));
    }
    /// Blocks start at an odd multiple of their alignment, so that the lowest bit of the address is it.
    static size_t alignment_of(void *memory) { return (uintptr_t)memory & -(uintptr_t)memory; }
};

class Workspace : public testing::TestWithParam<Instance> {
protected:
    void SetUp() override {
        if (!GetParam().missing.empty()) GTEST_SKIP() << "this CPU lacks " << GetParam().missing;
    }
    Problem problem(int64_t T) const { return {2, T, 2, GetParam().size.K, GetParam().size.V}; }
};

TEST_P(Workspace, ComesFromTheAllocatorAndGoesBack) {
    Memory memory;
    Context context(GetParam().target, 2);
    memory.use_in(context);
    Problem first = problem(300), second = problem(300);
    ASSERT_EQ(first.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_GT(memory.allocations, 0);
    EXPECT_GT(memory.held, 0u) << "workspace is not kept for reuse";
    ASSERT_EQ(second.forward().run(context), HOLDFAST_OK) << context.error();
    expect_same(first, second);
    context.destroy();
    EXPECT_EQ(memory.held, 0u);
}

TEST_P(Workspace, IsReused) {
    Memory memory;
    Context context(GetParam().target, 1);
    memory.use_in(context);
    Problem p = problem(300);
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    const int64_t after_first = memory.allocations;
    for (int n = 0; n < 3; n++) ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(memory.allocations, after_first);
}

TEST_P(Workspace, DoesNotGrowWithTime) {
    auto most_of = [](const auto &call) {
        Memory memory;
        Context context(GetParam().target, 1);
        memory.use_in(context);
        EXPECT_EQ(call(context), HOLDFAST_OK) << context.error();
        context.destroy();
        return (int64_t)memory.most;
    };
    const auto [K, V] = GetParam().size;
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT}) {
        SCOPED_TRACE(form);
        auto most = [&](int64_t T) {
            return most_of([&](holdfast_context *context) {
                Problem p = problem(T);
                Forward f = p.forward();
                f.form = form;
                return f.run(context);
            });
        };
        auto most_of_power = [&, K = K, V = V](int64_t T) {
            return most_of([&](holdfast_context *context) {
                PowerProblem p{1, T, 1, 1, K, V};
                p.form = form;
                return p.run(context);
            });
        };
        EXPECT_EQ(most(1000), most(form == HOLDFAST_FORM_CHUNKWISE ? 10000 : 2000));
        EXPECT_EQ(most_of_power(200), most_of_power(400));
    }
}

TEST_P(Workspace, IsWhatTheHeaderSays) {
    // One thread's, by the formulas at holdfast_forward. They are not far above what is taken, but for single tokens, and in the parallel
    // form of generic, which copies nothing.
    auto rounded = [](int64_t size, int64_t to) { return (size + to - 1) / to * to; };
    const auto [K, V] = GetParam().size;
    const bool tuned = GetParam().target != "generic";
    for (int degree : {1, 2, 3})
        for (int64_t G : {1, 4})
            for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL})
                for (const auto &[initial, final] : {std::pair(false, false), {false, true}, {true, true}})
                    for (int64_t T : form == HOLDFAST_FORM_PARALLEL ? Index{1, 256, 2048} : Index{1, 70}) {
                        if (degree == 3 && (K > 40 || T > 256)) continue;  // large
                        if (!tuned && T > 256) continue;                   // slow, and nothing grows with T
                        SCOPED_TRACE(testing::Message() << "degree " << degree << ", G " << G << ", form " << form
                                                        << ", initial " << initial << ", final " << final << ", T " << T);
                        Memory memory;
                        Context context(GetParam().target, 1);
                        memory.use_in(context);
                        PowerProblem p{1, T, 2, G, K, V, degree, true};
                        p.form = form, p.initial = initial, p.final = final;
                        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                        context.destroy();
                        const int64_t D = p.D, chunks = D * (V + 1) + 5 * D + 64 * (1 + G) * (3 * K + 2 * V + 8);
                        double floats = (double)chunks;
                        if (form == HOLDFAST_FORM_RECURRENT) {
                            const int64_t heads = std::clamp<int64_t>(512 * 1024 / 4 / (D * V), 1, 2);
                            floats = (double)heads * ((double)G * V * (D / 64.0 + 1) + (3.0 + G) * D + G * (K + V)) + 6 * D;
                            if (!final) floats += D * (V + 1);
                        } else if (form == HOLDFAST_FORM_PARALLEL) {
                            const int64_t k = rounded(K, 32), v = rounded(V, 32), t = rounded(T, 64);
                            floats = (double)(t * (k + v) + t * t / 32 + k * v + 64 * (2 * k + 3 * v + 128));
                            if (initial) floats += D * (v + 71);
                            if (final) floats += degree > 1 ? chunks : K * (V + 1);
                        }
                        const double taken = (double)memory.most / sizeof(float);
                        EXPECT_LE(taken, floats);
                        if (tuned && T > 1) {
                            EXPECT_GE(taken, floats / 5);
                        }
                    }
}

TEST_P(Workspace, HasACopyOfInitialStatesThatThreadsAdvanceInPlace) {
    bool share_tokens = false;  // or columns of values, of which each has its own states
    auto most = [&](bool in_place, int threads) {
        const auto [K, V] = GetParam().size;
        Pool one_after_the_other{backwards};  // all of it is one thread's
        Memory memory;
        Context context(GetParam().target, threads);
        memory.use_in(context);
        EXPECT_EQ(holdfast_context_set_thread_pool(context, Pool::parallel_for, &one_after_the_other), HOLDFAST_OK);
        Problem p{1, 9000, 1, K, V};
        Forward f = p.forward();
        p.final_state.fill(0);
        if (in_place) f.initial_state = f.final_state;
        f.form = HOLDFAST_FORM_CHUNKWISE;
        EXPECT_EQ(f.run(context), HOLDFAST_OK) << context.error();
        share_tokens = context.messages.at(0).find(" spans") != std::string::npos;
        EXPECT_TRUE(threads > 1 || !share_tokens) << context.messages[0];
        context.destroy();
        return (int64_t)memory.most;
    };
    const int64_t state = GetParam().size.K * GetParam().size.V * (int64_t)sizeof(float);
    EXPECT_EQ(most(true, 1), most(false, 1));
    const int64_t apart = most(false, 2);
    EXPECT_EQ(most(true, 2), apart + (share_tokens ? state : 0));
}

TEST_P(Workspace, IsGivenBackWhenTheAllocatorChanges) {
    Memory first, second;
    Context context(GetParam().target, 1);
    Problem p = problem(100);
    for (Memory *memory : {&first, &second}) {
        memory->use_in(context);
        ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    }
    EXPECT_EQ(first.held, 0u);
    EXPECT_GT(second.held, 0u);
    ASSERT_EQ(holdfast_context_set_allocator(context, nullptr, nullptr, nullptr), HOLDFAST_OK);
    EXPECT_EQ(second.held, 0u);
    const int64_t before = second.allocations;
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(second.allocations, before);
}

TEST_P(Workspace, EachAllocationMayFail) {
    Problem expected = problem(300);
    ASSERT_EQ(expected.forward().run(Context(GetParam().target)), HOLDFAST_OK);
    for (int threads : {1, 2}) {
        Pool one_after_the_other{backwards};  // so that allocations come in the same order each time
        int64_t total = 1;
        for (int64_t n = -1; n < total; n++) {  // -1: none fails, to see how many there are
            SCOPED_TRACE("allocation " + std::to_string(n) + " fails, threads " + std::to_string(threads));
            Memory memory;
            Context context(GetParam().target, threads);
            memory.use_in(context);
            ASSERT_EQ(holdfast_context_set_thread_pool(context, Pool::parallel_for, &one_after_the_other), HOLDFAST_OK);
            memory.fail_at = n;
            Problem p = problem(300);
            if (n >= 0) {
                EXPECT_EQ(p.forward().run(context), HOLDFAST_OUT_OF_MEMORY);
                EXPECT_NE(context.error().find("out of memory"), std::string::npos) << context.error();
            }
            ASSERT_EQ(p.forward().run(context), HOLDFAST_OK)
                << "the context does not work after a failure: " << context.error();
            expect_same(p, expected);
            context.destroy();
            if (n < 0) total = memory.allocations;
        }
        EXPECT_GT(total, 1);
    }
}

// On the CPU: a GPU has its own.
INSTANTIATE_TEST_SUITE_P(, Workspace, testing::ValuesIn(on_cpu(instances({{64, 64}, {33, 17}}))),
                         [](const auto &info) { return name(info.param); });

// ---- Targets -------------------------------------------------------------------------------------------------------

TEST(Target, WithoutForcingTheBestRuns) {
    Context context;
    Problem p = problem();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    ASSERT_EQ(context.messages.size(), 1u);
    std::string best;
    for (const std::string &target : targets())
        if (auto v = variant_for(target, size); best.empty() && v && v->runs_here && backend_of(target) == "cpu") best = target;
    EXPECT_NE(context.messages[0].find(variant_for(best, size)->name), std::string::npos) << context.messages[0];
    EXPECT_NE(context.messages[0].find("best target"), std::string::npos) << context.messages[0];
}

TEST(Target, NullGoesBackToTheDefault) {
    Context context(targets().back()), untouched;
    ASSERT_EQ(holdfast_context_set_target(context, nullptr), HOLDFAST_OK);
    Problem p = problem();
    for (Context *c : {&context, &untouched}) ASSERT_EQ(p.forward().run(*c), HOLDFAST_OK);
    EXPECT_EQ(context.messages, untouched.messages);
}

TEST(Target, UnknownNameIsAnErrorAndChangesNothing) {
    Context context(targets().back());
    for (const char *name : {"avx1024", "", "AVX2", "generic "}) {
        EXPECT_EQ(holdfast_context_set_target(context, name), HOLDFAST_TARGET_UNAVAILABLE);
        EXPECT_NE(context.error().find("'" + std::string(name) + "'; expected one of "), std::string::npos) << context.error();
        for (const std::string &target : targets())
            EXPECT_NE(context.error().find(target), std::string::npos) << context.error();
    }
    Problem p = problem();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK);
    EXPECT_NE(context.messages.at(0).find(targets().back()), std::string::npos) << context.messages[0];
}

TEST(Target, WhatDoesNotRunHereIsAnError) {
    int tried = 0;
    for (const holdfast_variant &v : variants()) {
        EXPECT_EQ(v.runs_here != 0, std::string(v.missing).empty()) << v.name;
        if (v.runs_here) continue;
        Context context;
        EXPECT_EQ(holdfast_context_set_target(context, v.target), HOLDFAST_TARGET_UNAVAILABLE);
        EXPECT_NE(context.error().find(v.missing), std::string::npos) << context.error();
        tried++;
    }
    if (!tried) GTEST_SKIP() << "this machine runs every target";
}

TEST(Target, OneVariantIsSelectedForEachKernelTypeAndSize) {
    // Of "recurrent" one for single tokens and one for blocks of them.
    std::map<std::tuple<std::string, std::string, std::string, int, int, int, bool>, int> selected;
    for (const holdfast_variant &v : variants()) {
        const bool blocks = v.kernel == std::string("recurrent") && v.chunk > 0;
        if (v.runs_here)
            selected[{backend_of(v.target), v.kernel, v.dtype, v.key_size, v.value_size, v.degree, blocks}] += v.selected;
    }
    for (const auto &[of, count] : selected)
        EXPECT_EQ(count, 1) << std::get<0>(of) << ", " << std::get<1>(of) << " of " << std::get<2>(of) << ", "
                            << std::get<3>(of) << " x " << std::get<4>(of);
}

// What calls with default arguments run, of any length, is listed as selected.
TEST(Target, WhatRunsByDefaultIsSelected) {
    Context context("", 1);
    std::set<std::string> kernels;
    for (const int64_t T : {1, 7, 16, 100, 300}) {
        Problem plain = problem(T);
        ASSERT_EQ(plain.forward().run(context), HOLDFAST_OK) << context.error();
        for (bool states : {false, true}) {
            PowerProblem power{1, T, 1, 1, size.K, size.V};
            power.initial = states;
            ASSERT_EQ(power.run(context), HOLDFAST_OK) << context.error();
        }
    }
    for (const std::string &message : context.messages) {
        bool listed = false;
        for (const holdfast_variant &v : variants()) {
            if (message.find(" " + std::string(v.name) + " ") == std::string::npos) continue;
            listed = true, kernels.insert(v.kernel);
            EXPECT_EQ(v.selected, 1) << v.name;
        }
        EXPECT_TRUE(listed) << message;
    }
    for (const char *kernel : {"chunkwise", "recurrent", "power", "power_step"}) EXPECT_TRUE(kernels.count(kernel)) << kernel;
}

}  // namespace

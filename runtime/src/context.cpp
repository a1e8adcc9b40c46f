#include "context.h"

#include "cpu_features.h"
#include "failure.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace holdfast {
namespace {

constexpr size_t alignment = 128;  // two cache lines: vectors of 64 bytes, and no false sharing between threads
constexpr int max_threads = 256;   // of Halide's thread pool

void *default_allocate(void *, size_t bytes, size_t alignment) {
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
void default_deallocate(void *, void *memory, size_t) { std::free(memory); }

constexpr Allocator default_allocator = {default_allocate, default_deallocate, nullptr};

thread_local std::string default_context_error;

// A fork has the calling thread alone: those of Halide's pool stay behind, and work given to it may wait for them.
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const bool watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
#endif

int cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

/// The work of one call, shared by its threads: each takes the next item until none is left or one has failed.
struct Job {
    holdfast_context &context;
    std::vector<std::unique_ptr<Workspace>> &idle;
    const std::function<void(Workspace &, int64_t)> &work;
    const int64_t items;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    Failure failure{HOLDFAST_OK, ""};

    void run() {
        try {
            std::unique_ptr<Workspace> workspace = take();
            for (int64_t item; !failed && (item = next++) < items; done++) work(*workspace, item);
            std::lock_guard<std::mutex> lock(context.idle_mutex);
            idle.push_back(std::move(workspace));
        } catch (const Failure &f) {
            record(f);
        } catch (const std::bad_alloc &) {
            record({HOLDFAST_OUT_OF_MEMORY, "workspace: out of memory"});
        } catch (const std::exception &e) {
            record({HOLDFAST_INTERNAL_ERROR, e.what()});
        }
    }

private:
    std::unique_ptr<Workspace> take() {
        {
            std::lock_guard<std::mutex> lock(context.idle_mutex);
            if (!idle.empty()) {
                auto workspace = std::move(idle.back());
                idle.pop_back();
                workspace->error.clear();
                return workspace;
            }
        }
        return std::make_unique<Workspace>(context.allocator);
    }
    void record(const Failure &f) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failed) failure = f;
        failed = true;
    }
};

void run_job(void *job, int) { ((Job *)job)->run(); }

int run_job_for_halide(void *, int, uint8_t *job) {
    ((Job *)job)->run();
    return 0;
}

}  // namespace

Workspace::~Workspace() {
    for (Block &block : blocks) allocator.deallocate(allocator.user, block.memory, block.bytes);
}

void *Workspace::allocate(size_t bytes) {
    const auto least = std::lower_bound(blocks.begin(), blocks.end(), bytes,
                                        [](const Block &block, size_t bytes) { return block.bytes < bytes; });
    auto best = std::find_if(least, blocks.end(), [](const Block &block) { return !block.used; });
    if (best == blocks.end()) {
        const ptrdiff_t at = least - blocks.begin();
        blocks.reserve(blocks.size() + 1);  // so that nothing throws once there is memory to lose
        void *memory = allocator.allocate(allocator.user, bytes, alignment);
        if (!memory) return nullptr;
        best = blocks.insert(blocks.begin() + at, {memory, bytes, false});
    }
    best->used = true;
    return best->memory;
}

void Workspace::free(void *memory) {
    for (Block &block : blocks)
        if (block.memory == memory) block.used = false;
}

holdfast_context &resolve(holdfast_context *context) {
    // Never destroyed: calls on it may outlive static destruction.
    static holdfast_context *const shared = new holdfast_context;
    return context ? *context : *shared;
}

Choice choose_backend(const holdfast_context &c, Backend home) {
    const Target *forced = c.target ? c.target : environment_target();
    Choice choice{home, forced, home == Backend::cpu ? "best target that this CPU runs" : "where the tensors are"};
    if (c.backend) choice.backend = *c.backend, choice.why = "backend forced by the context";
    if (forced) {
        if (c.backend && *c.backend != forced->backend)
            fail(HOLDFAST_TARGET_UNAVAILABLE, "target is '", forced->name, "', of backend ", name_of(forced->backend),
                 ", and the context's backend is ", name_of(*c.backend), "; expected a target of that backend");
        choice.backend = forced->backend,
        choice.why = c.target ? "target forced by the context" : "target forced by HOLDFAST_TARGET";
    }
    if (home != Backend::cpu && choice.backend != home)
        fail(HOLDFAST_UNSUPPORTED, "the tensors are in memory of backend ", name_of(home), ", and ", choice.why, " is ",
             name_of(choice.backend), "; expected the tensors' own backend, or tensors on the CPU");
    if (const std::string &missing = availability(choice.backend).missing; !missing.empty())
        fail(HOLDFAST_TARGET_UNAVAILABLE, "backend ", name_of(choice.backend), " cannot run here: ", missing);
    return choice;
}

holdfast_status guarded(holdfast_context *context, const std::function<void(holdfast_context &)> &body) {
    std::string &error = context ? context->error : default_context_error;
    holdfast_status status;
    try {
        try {
            body(resolve(context));
            return HOLDFAST_OK;
        } catch (const Failure &f) {
            status = f.status;
            error = f.text;
        } catch (const std::bad_alloc &) {
            status = HOLDFAST_OUT_OF_MEMORY;
            error = "out of memory";
        } catch (const std::exception &e) {
            status = HOLDFAST_INTERNAL_ERROR;
            error = e.what();
        } catch (...) {
            status = HOLDFAST_INTERNAL_ERROR;
            error = "a callback threw";
        }
    } catch (const std::bad_alloc &) {  // no memory for the text
        error.clear();
        status = HOLDFAST_OUT_OF_MEMORY;
    }
    return status;
}

}  // namespace holdfast

using namespace holdfast;

holdfast_context::holdfast_context() : allocator(default_allocator) {}

int holdfast_context::threads_for(int64_t items) const {
    static const int all = std::min(cores(), max_threads);
    if (forked && !parallel_for) return 1;
    return (int)std::min<int64_t>(threads ? threads : all, std::max<int64_t>(items, 1));
}

void holdfast_context::for_each(int64_t items, const std::function<void(Workspace &, int64_t)> &work) {
    Job job{*this, idle, work, items, {}, {}, {}, {}, {HOLDFAST_OK, ""}};
    const int tasks = threads_for(items);
    int rc = 0;
    if (tasks == 1)
        job.run();
    else if (parallel_for)
        rc = parallel_for(parallel_for_user, tasks, run_job, &job);
    else
        rc = halide_default_do_par_for(nullptr, run_job_for_halide, 0, tasks, (uint8_t *)&job);
    if (job.failed) throw job.failure;
    if (rc) fail(HOLDFAST_INTERNAL_ERROR, "thread pool: parallel_for returned ", rc, "; expected 0");
    if (job.done != items)
        fail(HOLDFAST_INTERNAL_ERROR, "thread pool: parallel_for returned with ", job.done.load(), " of ", items,
             " pieces of work done");
}

void holdfast_context::on_gpu(const std::function<void(Workspace &)> &work) {
    const std::function<void(Workspace &, int64_t)> once = [&](Workspace &workspace, int64_t) { work(workspace); };
    Job job{*this, idle_of_gpu, once, 1, {}, {}, {}, {}, {HOLDFAST_OK, ""}};
    job.run();
    if (job.failed) throw job.failure;
}

// Kernels call these by name; they stand in for the weak ones of Halide's runtime. user_context is the Workspace.
extern "C" {

// A GPU's runtime keeps some of what it asks for beyond the call, and gives it back at the end of the process with no context.
void *halide_malloc(void *user_context, size_t bytes) {
    const Workspace *workspace = (Workspace *)user_context;
    try {
        if (!workspace || workspace->device) return default_allocate(nullptr, bytes, alignment);
        return ((Workspace *)user_context)->allocate(bytes);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void halide_free(void *user_context, void *memory) {
    Workspace *workspace = (Workspace *)user_context;
    if (!workspace || workspace->device)
        std::free(memory);
    else
        workspace->free(memory);
}

void halide_error(void *user_context, const char *text) {
    Workspace *workspace = (Workspace *)user_context;
    try {
        if (workspace && workspace->error.empty()) workspace->error = text;
    } catch (const std::bad_alloc &) {  // the status says that it failed
    }
}

void halide_print(void *, const char *) {}

const char *holdfast_version(void) {
#define HOLDFAST_TEXT(x) #x
#define HOLDFAST_VERSION(major, minor, patch) HOLDFAST_TEXT(major) "." HOLDFAST_TEXT(minor) "." HOLDFAST_TEXT(patch)
    return HOLDFAST_VERSION(HOLDFAST_VERSION_MAJOR, HOLDFAST_VERSION_MINOR, HOLDFAST_VERSION_PATCH);
}

const char *holdfast_status_name(holdfast_status status) {
    switch (status) {
    case HOLDFAST_OK: return "HOLDFAST_OK";
    case HOLDFAST_INVALID_ARGUMENT: return "HOLDFAST_INVALID_ARGUMENT";
    case HOLDFAST_UNSUPPORTED: return "HOLDFAST_UNSUPPORTED";
    case HOLDFAST_TARGET_UNAVAILABLE: return "HOLDFAST_TARGET_UNAVAILABLE";
    case HOLDFAST_OUT_OF_MEMORY: return "HOLDFAST_OUT_OF_MEMORY";
    case HOLDFAST_INTERNAL_ERROR: return "HOLDFAST_INTERNAL_ERROR";
    case HOLDFAST_DEVICE_ERROR: return "HOLDFAST_DEVICE_ERROR";
    }
    return "unknown status";
}

const char *holdfast_cpu_features(void) { return cpu_features().c_str(); }

holdfast_context *holdfast_context_create(void) { return new (std::nothrow) holdfast_context; }

void holdfast_context_destroy(holdfast_context *context) { delete context; }

const char *holdfast_last_error(const holdfast_context *context) {
    return (context ? context->error : default_context_error).c_str();
}

}  // extern "C"

/// For the functions that set an option: the default context has none.
static holdfast_status set_option(holdfast_context *context, const std::function<void(holdfast_context &)> &body) {
    return guarded(context, [&](holdfast_context &resolved) {
        if (!context) fail(HOLDFAST_INVALID_ARGUMENT, "context is NULL; expected one made by holdfast_context_create");
        body(resolved);
    });
}

extern "C" {

holdfast_status holdfast_context_set_target(holdfast_context *context, const char *target) {
    return set_option(context, [&](holdfast_context &c) { c.target = target ? require_target(target) : nullptr; });
}

holdfast_status holdfast_context_set_backend(holdfast_context *context, const char *backend) {
    return set_option(context, [&](holdfast_context &c) {
        if (!backend)
            c.backend.reset();
        else
            c.backend = require_backend(backend);
    });
}

holdfast_status holdfast_context_set_device(holdfast_context *context, void *device) {
    return set_option(context, [&](holdfast_context &c) { c.device = device; });
}

holdfast_status holdfast_context_set_stream(holdfast_context *context, void *stream) {
    return set_option(context, [&](holdfast_context &c) { c.stream = stream; });
}

holdfast_status holdfast_context_set_threads(holdfast_context *context, int threads) {
    return set_option(context, [&](holdfast_context &c) {
        if (threads < 0 || threads > max_threads)
            fail(HOLDFAST_INVALID_ARGUMENT, "threads is ", threads, "; expected 0 to ", max_threads);
        c.threads = threads;
    });
}

holdfast_status holdfast_context_set_thread_pool(holdfast_context *context, holdfast_parallel_for parallel_for, void *user) {
    return set_option(context, [&](holdfast_context &c) { c.parallel_for = parallel_for, c.parallel_for_user = user; });
}

holdfast_status holdfast_context_set_allocator(holdfast_context *context, holdfast_allocate allocate,
                                               holdfast_deallocate deallocate, void *user) {
    return set_option(context, [&](holdfast_context &c) {
        if (!allocate != !deallocate)
            fail(HOLDFAST_INVALID_ARGUMENT, allocate ? "deallocate" : "allocate",
                 " is NULL; expected both functions or neither");
        c.idle.clear(), c.idle_of_gpu.clear();
        c.allocator = allocate ? Allocator{allocate, deallocate, user} : default_allocator;
    });
}

holdfast_status holdfast_context_set_verbose(holdfast_context *context, holdfast_verbose verbose, void *user) {
    return set_option(context, [&](holdfast_context &c) { c.verbose = verbose, c.verbose_user = user; });
}

int holdfast_variant_count(void) { return (int)variants().size(); }

holdfast_status holdfast_variant_at(holdfast_context *context, int index, holdfast_variant *variant) {
    return guarded(context, [&](holdfast_context &c) {
        const int count = holdfast_variant_count();
        if (!variant) fail(HOLDFAST_INVALID_ARGUMENT, "variant is NULL; expected a holdfast_variant to fill in");
        if (index < 0 || index >= count) fail(HOLDFAST_INVALID_ARGUMENT, "index is ", index, "; expected 0 to ", count - 1);
        const Variant &v = variants()[index];
        const std::string &missing = missing_for(*v.target);
        *variant = {v.name,     v.kernel,        v.dtype,         v.target->name,   v.chunk,
                    v.key_size, v.value_size,    v.row_alignment, v.round_operands, missing.empty(),
                    0,          missing.c_str(), v.degree};
        const Target *forced = c.target ? c.target : environment_target();
        if (missing.empty() && (!forced || forced == v.target) && (!c.backend || c.backend == v.target->backend))
            for (const int chunk_size : {0, v.chunk})  // that of calls, and of recurrent for blocks of tokens
                variant->selected |= (chunk_size == 0 || !std::strcmp(v.kernel, "recurrent")) &&
                                     &select_variant(v.kernel, v.dtype, v.key_size, v.value_size, chunk_size, v.target->backend,
                                                     forced, {}, v.degree) == &v;
    });
}

int holdfast_backend_count(void) { return (int)std::size(all_backends); }

holdfast_status holdfast_backend_at(int index, holdfast_backend *backend) {
    return guarded(nullptr, [&](holdfast_context &) {
        const int count = holdfast_backend_count();
        if (!backend) fail(HOLDFAST_INVALID_ARGUMENT, "backend is NULL; expected a holdfast_backend to fill in");
        if (backend->struct_size < sizeof *backend)
            fail(HOLDFAST_INVALID_ARGUMENT, "backend.struct_size is ", backend->struct_size,
                 "; expected sizeof(holdfast_backend), at least ", sizeof *backend);
        if (index < 0 || index >= count) fail(HOLDFAST_INVALID_ARGUMENT, "index is ", index, "; expected 0 to ", count - 1);
        static struct Lists {
            std::string devices[std::size(all_backends)], targets[std::size(all_backends)];
            std::once_flag once[std::size(all_backends)];
        } lists;
        const Backend b = all_backends[index];
        const Availability &found = availability(b);
        std::call_once(lists.once[index], [&] {
            for (const std::string &device : found.devices)
                lists.devices[index] += (lists.devices[index].empty() ? "" : "\n") + device;
            for (const Target &t : targets())
                if (t.backend == b) lists.targets[index] += (lists.targets[index].empty() ? "" : " ") + std::string(t.name);
        });
        const size_t size = backend->struct_size;
        *backend = {size,
                    name_of(b),
                    compiled(b),
                    found.missing.empty(),
                    found.missing.c_str(),
                    (int32_t)found.devices.size(),
                    lists.devices[index].c_str(),
                    lists.targets[index].c_str()};
    });
}

}  // extern "C"

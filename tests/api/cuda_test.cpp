// What a call with tensors on CUDA asks of the driver: stubs/cuda.cpp stands in its place, keeps a record and runs no kernel.
// MissingCuda runs in a process of its own for each way in which there is no CUDA (HOLDFAST_EXPECTED has the words).
#include "../backward.h"
#include "../power.h"
#include "../step.h"

#include <dlfcn.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <thread>

namespace {
using namespace test;

constexpr int64_t B = 2, T = 70, H = 3, K = 16, V = 24;

class Driver {
public:
    Driver() : library(dlopen("libcuda.so.1", RTLD_NOW)) { EXPECT_NE(library, nullptr) << dlerror(); }
    std::vector<std::string> record() const {
        std::istringstream text(find<const char *()>("stub_record")());
        std::vector<std::string> lines;
        for (std::string line; std::getline(text, line);) lines.push_back(line);
        return lines;
    }
    void clear() const { find<void()>("stub_clear")(); }
    void *context(int device) const { return find<void *(int)>("stub_context")(device); }
    void capture(bool begins) const { find<void(int)>("stub_capture")(begins); }
    void replace(void *context) const { find<void(void *)>("stub_replace")(context); }
    void *stream(void *context) const { return find<void *(void *)>("stub_stream")(context); }
    void make_current(void *context) const { find<int(void *)>("cuCtxPushCurrent_v2")(context); }
    void no_longer_current() const {
        void *context;
        find<int(void **)>("cuCtxPopCurrent_v2")(&context);
    }

private:
    void *library;
    template<class Function>
    Function *find(const char *name) const {
        return (Function *)dlsym(library, name);
    }
};

/// Lines that begin with `word`.
std::vector<std::string> of(const std::vector<std::string> &record, const std::string &word) {
    std::vector<std::string> lines;
    for (const std::string &line : record)
        if (line.substr(0, line.find(' ')) == word) lines.push_back(line);
    return lines;
}

/// A call with all tensors on a device, far from one another: nobody reads them. On the CPU: the problem's own.
struct Call {
    Problem p;
    Forward f = p.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), log_decay = f.log_decay.dl(), initial_state = f.initial_state.dl(),
             out = f.out.dl(), final_state = f.final_state.dl(), workspace = {};
    holdfast_forward_args args = forward_args(&q, &k, &v, &log_decay, &initial_state, &out, &final_state);
    int64_t workspace_bytes = 0;
    std::unique_ptr<char, void (*)(void *)> memory{nullptr, std::free};

    explicit Call(int device = 0, DLDeviceType type = kDLCUDA, Size size = {K, V}, DLDataType dtype = dl_type(f32))
        : p{B, T, H, size.K, size.V} {
        uint64_t address = 0;
        for (DLTensor *x : {&q, &k, &v, &out}) x->dtype = dtype;
        for (DLTensor *x : {&q, &k, &v, &log_decay, &initial_state, &out, &final_state}) {
            x->device = {type, device};
            if (type != kDLCPU) x->data = (void *)(address += (uint64_t)1 << 40);
        }
    }
    Call(const Call &) = delete;
    void give_workspace(holdfast_context *context, int64_t more = 0) {
        size_t bytes = 0;
        ASSERT_EQ(holdfast_workspace_size(context, &args, &bytes), HOLDFAST_OK) << holdfast_last_error(context);
        workspace_bytes = (int64_t)bytes + more;
        memory.reset((char *)std::aligned_alloc(256, (size_t)(workspace_bytes + 511) / 256 * 256));
        workspace = {memory.get(), q.device, 1, {kDLUInt, 8, 1}, &workspace_bytes, nullptr, 0};
        args.workspace = &workspace;
    }
    holdfast_status run(holdfast_context *context) { return holdfast_forward(context, &args); }
};

/// The same of a step.
struct StepCall {
    Problem p{B, 1, H, K, V};
    Step s = step(p.forward(), 0);
    DLTensor q = s.q.dl(), k = s.k.dl(), v = s.v.dl(), log_decay = s.log_decay.dl(), state = s.state.dl(), out = s.out.dl(),
             workspace = {};
    holdfast_step_args args = step_args(&q, &k, &v, &log_decay, &state, &out);
    int64_t workspace_bytes = 0;
    std::unique_ptr<char, void (*)(void *)> memory{nullptr, std::free};

    explicit StepCall(int device = 0, DLDeviceType type = kDLCUDA) {
        p.final_state.fill(p.random);
        uint64_t address = 0;
        for (DLTensor *x : {&q, &k, &v, &log_decay, &state, &out}) {
            x->device = {type, device};
            if (type != kDLCPU) x->data = (void *)(address += (uint64_t)1 << 40);
        }
    }
    StepCall(const StepCall &) = delete;
    void give_workspace(holdfast_context *context) {
        size_t bytes = 0;
        ASSERT_EQ(holdfast_step_workspace_size(context, &args, &bytes), HOLDFAST_OK) << holdfast_last_error(context);
        workspace_bytes = (int64_t)bytes;
        memory.reset((char *)std::aligned_alloc(256, (bytes + 255) / 256 * 256));
        workspace = {memory.get(), q.device, 1, {kDLUInt, 8, 1}, &workspace_bytes, nullptr, 0};
        args.workspace = &workspace;
    }
    holdfast_status run(holdfast_context *context) { return holdfast_step(context, &args); }
};

std::string text(const void *pointer) {
    std::ostringstream stream;
    stream << pointer;
    return stream.str();
}

const std::set<std::string> harmless = {"cuDeviceGet",         "cuDeviceGetAttribute", "cuCtxGetCurrent", "cuCtxGetDevice",
                                        "cuCtxGetId",          "cuCtxPushCurrent",     "cuCtxPopCurrent", "cuStreamGetCtx",
                                        "cuStreamIsCapturing", "cuLaunchKernel"};

std::set<std::string> others(const std::vector<std::string> &record) {
    std::set<std::string> names;
    for (const std::string &line : record)
        if (const std::string name = line.substr(0, line.find(' ')); !harmless.count(name)) names.insert(name);
    return names;
}

TEST(Cuda, IsListedWithItsDevices) {
    holdfast_backend backend = {};
    backend.struct_size = sizeof backend;
    for (int n = 0; n < holdfast_backend_count(); n++) {
        ASSERT_EQ(holdfast_backend_at(n, &backend), HOLDFAST_OK);
        if (std::string(backend.name) == "cuda") break;
    }
    EXPECT_STREQ(backend.name, "cuda");
    EXPECT_EQ(backend.compiled, 1);
    EXPECT_EQ(backend.available, 1) << backend.missing;
    EXPECT_STREQ(backend.missing, "");
    EXPECT_EQ(backend.device_count, 3);
    EXPECT_STREQ(backend.devices, "Stub 0 (sm_80)\nStub 1 (sm_90)\nStub 2 (sm_86)");
    EXPECT_NE(std::string(backend.targets).find("cuda"), std::string::npos);
}

TEST(Cuda, NothingButLaunchesWithWorkspaceAfterTheFirstCall) {
    Driver driver;
    Context context;
    Call call;
    call.give_workspace(context);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    const auto first = driver.record();
    EXPECT_EQ(others(first), (std::set<std::string>{"cuDevicePrimaryCtxRetain", "cuModuleLoadDataEx", "cuModuleGetFunction"}));
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    const auto second = driver.record();
    EXPECT_EQ(others(second), std::set<std::string>());
    EXPECT_EQ(of(second, "cuLaunchKernel"), of(first, "cuLaunchKernel"));
    EXPECT_GE(of(second, "cuLaunchKernel").size(), 4u);  // table, contributions, states, outputs
    EXPECT_EQ(context.messages.size(), 2u);
    EXPECT_NE(context.messages[1].find("_cuda (where the tensors are)"), std::string::npos) << context.messages[1];
    EXPECT_NE(context.messages[1].find("on CUDA device 0"), std::string::npos) << context.messages[1];
}

/// cu_seqlens of so many sequences of T tokens in all: some have none, if they are many.
struct Sequences {
    std::vector<int64_t> starts;
    int64_t extent;
    DLTensor cu_seqlens;

    Sequences(int64_t number, int64_t T)
        : starts((size_t)number + 1), extent(number + 1),
          cu_seqlens{starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &extent, nullptr, 0} {
        for (int64_t s = 0; s <= number; s++) starts[(size_t)s] = s * T / number;
    }
    Sequences(const Sequences &) = delete;
};

TEST(Cuda, PackedSequencesAreLaunchesAlone) {
    Driver driver;
    Context context;
    auto of_states = [](Call &call, int64_t number) {
        for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) x->shape[0] = 1;
        for (DLTensor *x : {&call.initial_state, &call.final_state}) x->shape[0] = number;
    };
    Call whole;
    of_states(whole, 1);
    ASSERT_EQ(whole.run(context), HOLDFAST_OK) << context.error();
    driver.clear();
    ASSERT_EQ(whole.run(context), HOLDFAST_OK) << context.error();
    const size_t launches = of(driver.record(), "cuLaunchKernel").size();
    for (auto [sequences, tables] : {std::pair{1, 1u}, {2, 1u}, {64, 1u}, {65, 2u}, {300, 5u}}) {
        SCOPED_TRACE(testing::Message() << sequences << " sequences");
        const Sequences packed(sequences, T);
        Call call;
        of_states(call, sequences), call.args.cu_seqlens = &packed.cu_seqlens;
        call.give_workspace(context);
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        for (const bool captured : {false, true}) {
            SCOPED_TRACE(testing::Message() << "captured " << captured);
            driver.capture(captured);
            driver.clear();
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            driver.capture(false);
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
            EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), launches - 1 + tables);
        }
    }
}

TEST(Cuda, GraphsDoNotCaptureTensorsOfTheHost) {
    Driver driver;
    Context context, copies;
    Call there, host(0, kDLCPU);
    there.give_workspace(context);
    ASSERT_EQ(holdfast_context_set_backend(copies, "cuda"), HOLDFAST_OK);
    ASSERT_EQ(there.run(context), HOLDFAST_OK) << context.error();
    ASSERT_EQ(host.run(copies), HOLDFAST_OK) << copies.error();
    driver.capture(true);
    EXPECT_EQ(there.run(context), HOLDFAST_OK) << context.error();
    driver.clear();
    EXPECT_EQ(host.run(copies), HOLDFAST_UNSUPPORTED);
    EXPECT_EQ(copies.error(),
              "the stream is being captured in a graph, and the call copies tensors of the CPU; expected them on the device");
    EXPECT_TRUE(of(driver.record(), "cuLaunchKernel").empty());
    driver.capture(false);
    EXPECT_EQ(host.run(copies), HOLDFAST_OK) << copies.error();
}

TEST(Cuda, GroupsTakeNoMoreLaunches) {
    Driver driver;
    Context context;
    std::set<size_t> counts;
    for (int64_t heads : {H, (int64_t)1}) {
        Call call;
        for (DLTensor *x : {&call.k, &call.v, &call.log_decay}) x->shape[2] = heads;
        for (DLTensor *x : {&call.initial_state, &call.final_state}) x->shape[1] = heads;
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        counts.insert(of(driver.record(), "cuLaunchKernel").size());
    }
    EXPECT_EQ(counts.size(), 1u);
}

TEST(Cuda, ValueMajorStatesCostNothing) {
    Driver driver;
    Context context;
    std::set<size_t> launches, sizes;
    for (bool value_major : {false, true}) {
        Call call;
        if (value_major) {
            call.args.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
            for (DLTensor *x : {&call.initial_state, &call.final_state})
                std::swap(x->shape[2], x->shape[3]), x->strides = nullptr;
        }
        call.give_workspace(context);
        sizes.insert((size_t)call.workspace_bytes);
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(others(driver.record()), std::set<std::string>());
        launches.insert(of(driver.record(), "cuLaunchKernel").size());
    }
    EXPECT_EQ(launches.size(), 1u);
    EXPECT_EQ(sizes.size(), 1u);
}

TEST(Cuda, TokenByTokenIsTwoLaunchesForSomeTokens) {
    Driver driver;
    Context context;
    // An initial state and log_decay are given; two heads of queries share one of keys; tokens lie 2^29 bytes apart.
    for (auto [given, shared, apart] :
         {std::make_tuple(true, false, false), {false, false, false}, {true, true, false}, {true, false, true}}) {
        SCOPED_TRACE(testing::Message() << "given " << given << ", shared " << shared << ", apart " << apart);
        Call call;
        call.args.form = HOLDFAST_FORM_RECURRENT;
        if (shared)
            for (DLTensor *x : {&call.q, &call.out}) x->shape[2] = 2 * H, x->strides = nullptr;
        int64_t strides[] = {V * H, 1 << 27, V, 1};
        if (apart) call.v.strides = strides;
        if (!given) call.args.initial_state = call.args.log_decay = nullptr;
        call.give_workspace(context);
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(others(driver.record()), std::set<std::string>());
        // The state goes to its place first; zeros for it are made, and for decays. 64 tokens at once.
        const int64_t launches = 2 * (shared || apart ? T : (T + 63) / 64) + (given ? 1 : 3);
        EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), (size_t)launches);
        EXPECT_NE(context.messages.back().find("token by token, on CUDA device 0"), std::string::npos);
        if (apart) continue;  // it needs less than is asked for: sizes do not depend on strides
        call.give_workspace(context, -1);
        EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find("as holdfast_workspace_size says"), std::string::npos) << context.error();
    }
}

TEST(Cuda, TokensAtOnceAreFewerWhereStatesAreLarge) {
    // States of 2^25 numbers, which Halide counts for each token: 2^31 for 64.
    Driver driver;
    Context context;
    Call call(0, kDLCUDA, {256, 16});
    const int64_t heads = (1 << 25) / (B * 256 * 16);
    for (DLTensor *x : {&call.q, &call.k, &call.v, &call.log_decay, &call.out}) x->shape[2] = heads, x->strides = nullptr;
    for (DLTensor *x : {&call.initial_state, &call.final_state}) x->shape[1] = heads, x->strides = nullptr;
    call.args.form = HOLDFAST_FORM_RECURRENT;
    call.give_workspace(context);
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), (size_t)(2 * ((T + 62) / 63) + 1));
}

TEST(Cuda, SequencesThatAreTooLongForOneCallOfTheKernelTakeSeveral) {
    Driver driver;
    Context context;
    // States of all chunks of a head: 2^31 bytes and more; then its rows, too far apart.
    const int64_t million = 1 << 20;
    for (const bool packed : {false, true})
        for (const bool apart : {false, true}) {
            SCOPED_TRACE(testing::Message() << "packed " << packed << ", apart " << apart);
            Call call(0, kDLCUDA, apart ? Size{K, V} : Size{512, 512});
            int64_t strides[] = {million << 12, 1 << 12, 0, 1}, starts[] = {0, million - 5, million - 5, million}, extent = 4;
            const DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &extent, nullptr, 0};
            for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) {
                x->shape[1] = apart ? million : million / 16, x->strides = nullptr;
                if (packed) x->shape[0] = 1;
            }
            if (!apart) starts[3] = million / 16, starts[1] = starts[2] = starts[3] - 5;
            if (apart) call.v.strides = strides;
            if (packed) call.args.cu_seqlens = &cu_seqlens;
            for (DLTensor *x : {&call.initial_state, &call.final_state}) {
                x->strides = nullptr;
                if (packed) x->shape[0] = 3;
            }
            size_t bytes = 0;
            ASSERT_EQ(holdfast_workspace_size(context, &call.args, &bytes), HOLDFAST_OK) << context.error();
            EXPECT_LT(bytes, (size_t)7 << 30);
            int64_t size = (int64_t)bytes;
            DLTensor memory = {(void *)((uint64_t)1 << 50), {kDLCUDA, 0}, 1, {kDLUInt, 8, 1}, &size, nullptr, 0};
            call.args.workspace = &memory;
            ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            driver.clear();
            ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
            EXPECT_GT(of(driver.record(), "cuLaunchKernel").size(), 4u * H);
        }
}

TEST(Cuda, StridedTensorsOfTheHostAreCopiedOneAfterTheOther) {
    // Memory of the caller's allocator, which may be pinned: the driver then reads it later, until the stream is waited for.
    static std::set<std::string> allocated;
    allocated.clear();
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    ASSERT_EQ(holdfast_context_set_allocator(
                  context,
                  [](void *, size_t bytes, size_t alignment) {
                      void *memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
                      allocated.insert(text(memory));
                      return memory;
                  },
                  [](void *, void *memory, size_t) { std::free(memory); }, nullptr),
              HOLDFAST_OK);
    Problem p{B, T, H, K, V, Gates::weak, Layout::padded};
    driver.clear();
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    int packed = 0;
    bool read = true;
    for (const std::string &line : driver.record()) {
        if (line.find("cuStreamSynchronize") == 0) read = true;
        if (line.find("cuMemcpyHtoDAsync") != 0) continue;
        EXPECT_TRUE(read) << "the memory of the copy before is written again";
        if (allocated.count(line.substr(line.find("from ") + 5))) packed++, read = false;
    }
    EXPECT_TRUE(read);
    EXPECT_GE(packed, 3);
}

TEST(Cuda, ValueMajorStatesOfTheParallelFormAreUsedWhereTheyLie) {
    Driver driver;
    Context context;
    std::vector<size_t> launches;
    for (bool value_major : {false, true}) {
        Call call;
        call.args.form = HOLDFAST_FORM_PARALLEL;
        if (value_major) {
            call.args.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
            for (DLTensor *x : {&call.initial_state, &call.final_state})
                std::swap(x->shape[2], x->shape[3]), x->strides = nullptr;
        }
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        launches.push_back(of(driver.record(), "cuLaunchKernel").size());
        EXPECT_EQ(others(driver.record()), std::set<std::string>());
    }
    EXPECT_EQ(launches[0], launches[1]);
}

TEST(Cuda, WithoutQueriesThereAreStates) {
    Driver driver;
    Context context;
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT})
        for (bool packed : {false, true}) {
            SCOPED_TRACE(testing::Message() << "form " << form << ", packed " << packed);
            Call call;
            call.args.form = form;
            for (DLTensor *x : {&call.q, &call.out}) x->shape[2] = 0, x->data = nullptr;
            int64_t starts[] = {0, 20, T}, extent = 3;
            const DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &extent, nullptr, 0};
            if (packed) {
                for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) x->shape[0] = 1;
                call.args.cu_seqlens = &cu_seqlens;
            }
            call.give_workspace(context);
            driver.clear();
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            EXPECT_GE(of(driver.record(), "cuLaunchKernel").size(), 1u);
        }
    StepCall step;
    for (DLTensor *x : {&step.q, &step.out}) x->shape[1] = 0, x->data = nullptr;
    step.give_workspace(context);
    driver.clear();
    EXPECT_EQ(step.run(context), HOLDFAST_OK) << context.error();
    EXPECT_GE(of(driver.record(), "cuLaunchKernel").size(), 1u);
}

TEST(Cuda, NoGridIsLargerThanTheDriverTakes) {
    Context context;
    constexpr int64_t many = 70'000;
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT})
        for (int axis : {0, 2}) {  // batch entries, heads
            SCOPED_TRACE(testing::Message() << "form " << form << ", axis " << axis);
            Call call;
            call.args.form = form;
            for (DLTensor *x :
                 {&call.q, &call.k, &call.v, &call.out, &call.log_decay, &call.initial_state, &call.final_state}) {
                const bool state = x == &call.initial_state || x == &call.final_state;
                if (!state) x->shape[1] = 1;
                x->shape[0] = axis == 0 ? many : 1, x->shape[state ? 1 : 2] = axis == 2 ? many : 1;
                x->strides = nullptr;
            }
            call.give_workspace(context);
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            // Without tokens the states go from one place to another.
            for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) x->shape[1] = 0;
            call.args.workspace = nullptr;
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        }
    StepCall step;
    for (DLTensor *x : {&step.q, &step.k, &step.v, &step.log_decay, &step.state, &step.out})
        x->shape[0] = many, x->shape[1] = 1, x->strides = nullptr;
    step.give_workspace(context);
    EXPECT_EQ(step.run(context), HOLDFAST_OK) << context.error();
}

TEST(Cuda, LaunchesDoNotDependOnTheSizes) {
    Driver driver;
    Context context;
    std::set<size_t> counts;
    for (int64_t tokens : {1, 32, 70}) {
        Call call;
        for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) x->shape[1] = tokens;
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        counts.insert(of(driver.record(), "cuLaunchKernel").size());
    }
    EXPECT_EQ(counts.size(), 1u);
}

TEST(Cuda, ContextKeepsMemoryWithoutWorkspace) {
    Driver driver;
    Context context;
    Call call;
    size_t bytes = 0;
    ASSERT_EQ(holdfast_workspace_size(context, &call.args, &bytes), HOLDFAST_OK);
    EXPECT_GT(bytes, (size_t)(B * H * K * V * 4));  // states, at least
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemAlloc"), (std::vector<std::string>{"cuMemAlloc " + std::to_string(bytes)}));
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(others(driver.record()), std::set<std::string>());
    driver.clear();
    context.destroy();
    EXPECT_EQ(of(driver.record(), "cuMemFree").size(), 1u);
}

TEST(Cuda, MemoryDoesNotGoFromOneStreamToAnother) {
    Driver driver;
    Context context;
    void *own = driver.context(0);
    Call call;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(own)), HOLDFAST_OK);
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(own)), HOLDFAST_OK);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemFree").size(), 1u);
    EXPECT_EQ(of(driver.record(), "cuMemAlloc").size(), 1u);
}

void expect_launches(const Driver &driver, void *context, void *stream) {
    const auto launches = of(driver.record(), "cuLaunchKernel");
    EXPECT_GE(launches.size(), 4u);
    for (const std::string &line : launches) {
        if (context) {
            EXPECT_NE(line.find("context " + text(context) + " "), std::string::npos) << line;
        }
        EXPECT_EQ(line.substr(line.find("stream")), "stream " + (stream ? text(stream) : "(nil)"));
    }
}

TEST(Cuda, WorksInTheContextAndStreamThatItIsGiven) {
    Driver driver;
    void *own = driver.context(1), *other = driver.context(1), *stream = driver.stream(other);
    Call call(1);
    {
        SCOPED_TRACE("nothing given: the primary context");
        Context context;
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        expect_launches(driver, nullptr, nullptr);
        EXPECT_EQ(of(driver.record(), "cuDevicePrimaryCtxRetain"), (std::vector<std::string>{"cuDevicePrimaryCtxRetain 1"}));
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(of(driver.record(), "cuDevicePrimaryCtxRetain").size(), 0u);
    }
    {
        SCOPED_TRACE("the current one, and it stays current");
        Context context;
        driver.make_current(own);
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        expect_launches(driver, own, nullptr);
        EXPECT_EQ(of(driver.record(), "cuCtxPushCurrent").size(), of(driver.record(), "cuCtxPopCurrent").size());
        driver.no_longer_current();
    }
    {
        SCOPED_TRACE("current, but of another device");
        Context context;
        driver.make_current(driver.context(0));
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(of(driver.record(), "cuCtxPushCurrent").size(), of(driver.record(), "cuCtxPopCurrent").size());
        driver.no_longer_current();
    }
    {
        SCOPED_TRACE("of the stream");
        Context context;
        ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        expect_launches(driver, other, stream);
    }
    {
        SCOPED_TRACE("set");
        Context context;
        ASSERT_EQ(holdfast_context_set_device(context, own), HOLDFAST_OK);
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        expect_launches(driver, own, nullptr);
    }
    {
        SCOPED_TRACE("set, of another device");
        Context context;
        ASSERT_EQ(holdfast_context_set_device(context, driver.context(0)), HOLDFAST_OK);
        driver.clear();
        EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find("of another device than the tensors, which are on CUDA device 1"), std::string::npos)
            << context.error();
        EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 0u);
    }
}

TEST(Cuda, TensorsOfTheHostGoToADeviceThatWillDo) {
    Driver driver;
    void *second = driver.context(1);
    for (const bool stream : {false, true}) {
        SCOPED_TRACE(stream ? "of the stream" : "set");
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
        ASSERT_EQ(stream ? holdfast_context_set_stream(context, driver.stream(second))
                         : holdfast_context_set_device(context, second),
                  HOLDFAST_OK);
        Call call(0, kDLCPU);
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        for (const std::string &line : of(driver.record(), "cuLaunchKernel"))
            EXPECT_NE(line.find("context " + text(second) + " "), std::string::npos) << line;
    }
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    Call call(0, kDLCPU);
    driver.make_current(second);
    driver.clear();
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    for (const std::string &line : of(driver.record(), "cuLaunchKernel"))
        EXPECT_NE(line.find("context " + text(second) + " "), std::string::npos) << line;
    driver.no_longer_current();
    // Of old devices none is taken, also where one of them is current.
    setenv("HOLDFAST_STUB_DEVICES", "75,80,75", 1);
    driver.clear();
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    driver.make_current(driver.context(2));
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    driver.no_longer_current();
    ASSERT_EQ(holdfast_context_set_device(context, driver.context(2)), HOLDFAST_OK);
    EXPECT_EQ(call.run(context), HOLDFAST_TARGET_UNAVAILABLE);
    EXPECT_EQ(context.error(), "CUDA device 2 is of sm_75; expected at least sm_80");
    unsetenv("HOLDFAST_STUB_DEVICES");
}

TEST(Cuda, ContextsThatTakeThePlaceOfOthersHaveMemoryOfTheirOwn) {
    Driver driver;
    void *own = driver.context(0);
    Context context;
    ASSERT_EQ(holdfast_context_set_device(context, own), HOLDFAST_OK);
    Call call;
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    driver.replace(own);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemAlloc").size(), 1u);
    EXPECT_EQ(of(driver.record(), "cuMemFree").size(), 0u) << "it went with its context";
    EXPECT_GE(of(driver.record(), "cuModuleLoadDataEx").size(), 1u);

    // Likewise the primary one, which the library keeps.
    Context primary;
    Call on_second(1);
    driver.clear();
    ASSERT_EQ(on_second.run(primary), HOLDFAST_OK) << primary.error();
    const std::string line = of(driver.record(), "cuLaunchKernel").at(0);
    void *kept = nullptr;
    std::istringstream(line.substr(line.find("context ") + 8)) >> kept;
    driver.replace(kept);
    driver.clear();
    ASSERT_EQ(on_second.run(primary), HOLDFAST_OK) << primary.error();
    EXPECT_EQ(of(driver.record(), "cuDevicePrimaryCtxRetain").size(), 1u);
    EXPECT_EQ(of(driver.record(), "cuMemAlloc").size(), 1u);
}

TEST(Cuda, StreamsOfEachThreadShareNoMemory) {
    Driver driver;
    Context context;
    void *const per_thread = (void *)2;  // CU_STREAM_PER_THREAD
    ASSERT_EQ(holdfast_context_set_stream(context, per_thread), HOLDFAST_OK);
    Call call;
    for (const bool other : {false, true, true}) {
        driver.clear();
        auto run = [&] { EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error(); };
        if (other)
            std::thread(run).join();
        else
            run();
        EXPECT_EQ(of(driver.record(), "cuMemAlloc").size(), 1u) << "the memory of another thread's stream";
    }
}

TEST(CudaThreads, HaveContextsAndStreamsOfTheirOwn) {
    Driver driver;
    constexpr int count = 4, turns = 50;
    void *contexts[count], *streams[count];
    for (int n = 0; n < count; n++) contexts[n] = driver.context(n % 3), streams[n] = driver.stream(contexts[n]);
    driver.clear();
    std::vector<std::thread> threads;
    for (int n = 0; n < count; n++)
        threads.emplace_back([&, n] {
            Context context;
            ASSERT_EQ(holdfast_context_set_stream(context, streams[n]), HOLDFAST_OK);
            Call call(n % 3);
            for (int turn = 0; turn < turns; turn++) EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        });
    for (std::thread &thread : threads) thread.join();
    std::map<std::string, int> lines;
    for (const std::string &line : driver.record()) lines[line]++;
    std::set<int> launches, modules;
    size_t all = 0;
    for (int n = 0; n < count; n++) {
        launches.insert(lines["cuLaunchKernel context " + text(contexts[n]) + " stream " + text(streams[n])]);
        modules.insert(lines["cuModuleLoadDataEx " + text(contexts[n])]);
        all += *launches.begin();
    }
    EXPECT_EQ(launches.size(), 1u);
    EXPECT_GE(*launches.begin(), 4 * turns);
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), all) << "launches in other contexts or streams";
    EXPECT_EQ(modules.size(), 1u) << "kernels are loaded once in each context";
    EXPECT_EQ(of(driver.record(), "cuCtxPushCurrent").size(), of(driver.record(), "cuCtxPopCurrent").size());
}

TEST(Cuda, CallsOnTheCpuLeaveDeviceMemoryWhereItIs) {
    Driver driver;
    Context context("", 2);
    ASSERT_EQ(holdfast_context_set_thread_pool(
                  context,
                  [](void *, int tasks, void (*task)(void *, int), void *closure) {
                      std::vector<std::thread> threads;
                      for (int n = 0; n < tasks; n++) threads.emplace_back(task, closure, n);
                      for (std::thread &thread : threads) thread.join();
                      return 0;
                  },
                  nullptr),
              HOLDFAST_OK);
    Call call;
    Problem host{1, 4096, 8, 32, 32};  // long enough for both threads
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    for (int n = 0; n < 10; n++) {
        driver.clear();
        ASSERT_EQ(host.forward().run(context), HOLDFAST_OK) << context.error();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        EXPECT_EQ(of(driver.record(), "cuMemAlloc").size(), 0u);
    }
}

TEST(Cuda, TensorsOfTheHostThatAreTooLargeToCopyAreNamed) {
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    Call call(0, kDLCPU);
    int64_t strides[] = {0, 0, 0, 1};  // all in one place, to be copied one after the other
    call.k.shape[1] = call.v.shape[1] = call.q.shape[1] = (int64_t)1 << 24;
    call.q.strides = call.k.strides = call.v.strides = strides;
    call.args.log_decay = nullptr;
    Reserved out((size_t)B * ((size_t)1 << 24) * H * V * sizeof(float));
    ASSERT_TRUE(out);
    call.out.data = out.floats(), call.out.shape[1] = (int64_t)1 << 24, call.out.strides = nullptr;
    EXPECT_EQ(call.run(context), HOLDFAST_UNSUPPORTED);
    EXPECT_EQ(context.error(), "q needs a buffer of 6442450944 bytes on cuda; expected at most 2147483647, or tensors there");
}

TEST(Cuda, KernelsAreLoadedOnceInEachContext) {
    Driver driver;
    void *one = driver.context(0), *two = driver.context(0);
    Context context;
    Call call;
    std::vector<size_t> loads;
    for (void *c : {one, two, one, two}) {
        ASSERT_EQ(holdfast_context_set_device(context, c), HOLDFAST_OK);
        driver.clear();
        ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
        loads.push_back(of(driver.record(), "cuModuleLoadDataEx").size());
    }
    EXPECT_EQ(loads, (std::vector<size_t>{2, 2, 0, 0}));
}

TEST(Cuda, HostTensorsAreCopiedWhenAskedFor) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    Call call(0, kDLCPU);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemcpyHtoDAsync").size(), 5u);
    EXPECT_EQ(of(driver.record(), "cuMemcpyDtoHAsync"),
              (std::vector<std::string>{"cuMemcpyDtoHAsync " + std::to_string(B * T * H * V * 4),
                                        "cuMemcpyDtoHAsync " + std::to_string(B * H * K * V * 4)}));
    EXPECT_EQ(driver.record().back().substr(0, 2), "cu");
    EXPECT_GE(of(driver.record(), "cuStreamSynchronize").size(), 1u);
    EXPECT_NE(context.messages.at(0).find("tensors copied from the CPU and back"), std::string::npos) << context.messages[0];
    EXPECT_NE(context.messages.at(0).find("backend forced by the context"), std::string::npos) << context.messages[0];

    Context untouched;  // and not otherwise
    driver.clear();
    ASSERT_EQ(call.run(untouched), HOLDFAST_OK) << untouched.error();
    EXPECT_TRUE(driver.record().empty());
}

TEST(Cuda, WorkspaceSizeAsksTheDriverNothing) {
    Driver driver;
    Context context;
    Call call;
    ASSERT_EQ(call.run(context), HOLDFAST_OK);
    driver.clear();
    size_t bytes = 0, again = 0, larger = 0;
    ASSERT_EQ(holdfast_workspace_size(context, &call.args, &bytes), HOLDFAST_OK);
    ASSERT_EQ(holdfast_workspace_size(context, &call.args, &again), HOLDFAST_OK);
    EXPECT_EQ(bytes, again);
    EXPECT_TRUE(driver.record().empty());
    Call longer;
    for (DLTensor *x : {&longer.q, &longer.k, &longer.v, &longer.out, &longer.log_decay})
        x->shape[1] = 1000, x->strides = nullptr;
    ASSERT_EQ(holdfast_workspace_size(context, &longer.args, &larger), HOLDFAST_OK);
    EXPECT_GT(larger, bytes);
    EXPECT_EQ(holdfast_workspace_size(context, &call.args, nullptr), HOLDFAST_INVALID_ARGUMENT);
}

/// A variant that takes some rows only, and calls that are for it.
struct Choosy {
    holdfast_variant variant;
    Dtype dtype;
    int64_t element() const { return dtype == f32 ? 4 : 2; }
    bool has_floor() const {
        const auto all = variants();
        return std::any_of(all.begin(), all.end(), [&](const holdfast_variant &v) {
            return v.kernel == std::string(variant.kernel) && v.dtype == std::string(variant.dtype) &&
                   v.target == std::string(variant.target) && v.key_size == 0 && v.row_alignment == element();
        });
    }
    std::unique_ptr<Call> call() const {
        return std::make_unique<Call>(0, kDLCUDA, Size{variant.key_size, variant.value_size}, dl_type(dtype));
    }
};
std::vector<Choosy> choosy_variants() {
    std::vector<Choosy> list;
    for (const holdfast_variant &v : variants())
        for (const Dtype &dtype : all_dtypes)
            if (v.target == std::string("cuda") && v.kernel == std::string("chunkwise") && v.dtype == std::string(dtype.name) &&
                v.row_alignment > (dtype == f32 ? 4 : 2))
                list.push_back({v, dtype});
    return list;
}

TEST(Cuda, RowsDecideAmongVariants) {
    Driver driver;
    const auto list = choosy_variants();
    if (list.empty()) GTEST_SKIP() << "HOLDFAST_SIZES left out all variants that take some rows only";
    for (const Choosy &choosy : list) {
        const std::string name = choosy.variant.name;
        SCOPED_TRACE(name);
        EXPECT_EQ(choosy.variant.row_alignment, 16);
        EXPECT_EQ(choosy.variant.selected, 1);
        EXPECT_EQ(choosy.variant.round_operands, !(choosy.dtype == f32));
        Context context;
        ASSERT_EQ(holdfast_context_set_device(context, driver.context(0)), HOLDFAST_OK);
        auto modules_loaded = [&](Call &call) {
            driver.clear();
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            return of(driver.record(), "cuModuleLoadDataEx").size();
        };
        auto aligned = choosy.call();
        aligned->q.byte_offset = 16 * 3, aligned->log_decay.byte_offset = aligned->initial_state.byte_offset = 4;
        EXPECT_EQ(modules_loaded(*aligned), 2u);  // the chunk table's and the variant's
        EXPECT_NE(context.messages.back().find("forward: " + name + " (where the tensors are), B"), std::string::npos)
            << context.messages.back();

        // Where a call has one batch entry, they have no distance.
        auto single = choosy.call();
        for (DLTensor *x : {&single->q, &single->k, &single->v, &single->log_decay, &single->initial_state, &single->out,
                            &single->final_state})
            x->shape[0] = 1;
        single->v.strides[0]++;
        EXPECT_EQ(modules_loaded(*single), 0u);
        EXPECT_NE(context.messages.back().find(name + " (where"), std::string::npos) << context.messages.back();

        size_t expected_loads = choosy.has_floor();
        for (const char *tensor : {"q", "k", "v", "out"})
            for (int spoiled = -1; spoiled < (choosy.variant.key_size > 64 ? 0 : 3); spoiled++) {
                SCOPED_TRACE(std::string(tensor) + (spoiled < 0 ? " offset" : " stride " + std::to_string(spoiled)));
                auto call = choosy.call();
                DLTensor &x = *tensor == 'q' ? call->q : *tensor == 'k' ? call->k : *tensor == 'v' ? call->v : call->out;
                if (spoiled < 0)
                    x.byte_offset = (uint64_t)choosy.element();
                else
                    x.strides[spoiled] = x.strides[0] * 2 + 8 / choosy.element();
                const std::string start = std::to_string(spoiled < 0 ? choosy.element() : 8);
                if (!choosy.has_floor()) {
                    EXPECT_EQ(call->run(context), HOLDFAST_UNSUPPORTED);
                    EXPECT_EQ(context.error().find(tensor + (" has rows that start at multiples of " + start) +
                                                   " bytes only; expected 16, as all variants of chunkwise for " +
                                                   choosy.dtype.name),
                              0u)
                        << context.error();
                    continue;
                }
                EXPECT_EQ(modules_loaded(*call), expected_loads);
                expected_loads = 0;
                const std::string &line = context.messages.back();
                EXPECT_NE(line.find("_k0_v0_cuda (where the tensors are, rows of " + std::string(tensor) + " at multiples of " +
                                    start + " bytes: " + name + " wants 16)"),
                          std::string::npos)
                    << line;
            }
    }
}

TEST(Cuda, WorkspaceIsEnoughForEveryVariant) {
    const auto list = choosy_variants();
    if (list.empty()) GTEST_SKIP() << "HOLDFAST_SIZES left out all variants that take some rows only";
    for (const Choosy &choosy : list) {
        SCOPED_TRACE(choosy.variant.name);
        Context context;
        size_t bytes = 0, again = 0, far = 0;
        auto aligned = choosy.call(), odd = choosy.call(), apart = choosy.call();
        odd->k.byte_offset = 4, odd->v.strides[0]++;
        apart->q.strides[0] = (int64_t)1 << 32;  // one batch entry in a call of the kernel
        for (auto [call, size] : {std::pair(&aligned, &bytes), {&odd, &again}, {&apart, &far}})
            ASSERT_EQ(holdfast_workspace_size(context, &(*call)->args, size), HOLDFAST_OK) << context.error();
        EXPECT_EQ(bytes, again);
        EXPECT_EQ(bytes, far);
        for (auto *call : {&aligned, &odd, &apart}) {
            if (call == &odd && !choosy.has_floor()) continue;
            (*call)->give_workspace(context);
            EXPECT_EQ((*call)->run(context), HOLDFAST_OK) << context.error();
        }
    }
}

TEST(Cuda, BadWorkspaceIsRefusedBeforeAnythingRuns) {
    Driver driver;
    Context context;
    const struct {
        const char *text;
        void (*spoil)(Call &);
    } cases[] = {
        {"expected at least", [](Call &c) { c.workspace_bytes--; }},
        {"expected a multiple of 256", [](Call &c) { c.workspace.byte_offset = 128; }},
        {"workspace is on the CPU; expected CUDA device 0", [](Call &c) { c.workspace.device = {kDLCPU, 0}; }},
        {"workspace is on CUDA device 1; expected CUDA device 0", [](Call &c) { c.workspace.device.device_id = 1; }},
        {"expected compact uint8", [](Call &c) { c.workspace.dtype = {kDLFloat, 32, 1}; }},
        {"expected compact uint8", [](Call &c) { c.workspace.ndim = 2; }},
        {"expected a multiple of 256", [](Call &c) { c.workspace.data = nullptr; }},
    };
    for (const auto &bad : cases) {
        SCOPED_TRACE(bad.text);
        Call call;
        call.give_workspace(context);
        bad.spoil(call);
        driver.clear();
        EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find(bad.text), std::string::npos) << context.error();
        EXPECT_TRUE(of(driver.record(), "cuLaunchKernel").empty());
    }
}

TEST(Cuda, TensorsOnTwoDevicesAreRefused) {
    Context context;
    Call call;
    call.v.device = {kDLCPU, 0};
    EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "v is on the CPU and q on CUDA device 0; expected all tensors on one device");
    call.v.device = {kDLCUDA, 1};
    EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "v is on CUDA device 1 and q on CUDA device 0; expected all tensors on one device");
}

TEST(Cuda, AnotherBackendDoesNotTakeItsTensors) {
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cpu"), HOLDFAST_OK);
    Call call;
    EXPECT_EQ(call.run(context), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("in memory of backend cuda"), std::string::npos) << context.error();
    ASSERT_EQ(holdfast_context_set_backend(context, nullptr), HOLDFAST_OK);
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    ASSERT_EQ(holdfast_context_set_target(context, "generic"), HOLDFAST_OK);
    EXPECT_EQ(call.run(context), HOLDFAST_UNSUPPORTED);
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK);
    EXPECT_EQ(call.run(context), HOLDFAST_TARGET_UNAVAILABLE);
    EXPECT_NE(context.error().find("target is 'generic', of backend cpu, and the context's backend is cuda"), std::string::npos)
        << context.error();
}

TEST(Cuda, EachCallOfTheDriverMayFail) {
    Driver driver;
    const struct {
        const char *function;
        int result;
        holdfast_status status;
        bool host;
        bool by_stream = false;  // its context is not given, but of the stream's
    } cases[] = {
        {"cuDevicePrimaryCtxRetain", 999, HOLDFAST_DEVICE_ERROR, false},
        {"cuDeviceGet", 101, HOLDFAST_DEVICE_ERROR, false},
        {"cuDeviceGetAttribute", 1, HOLDFAST_DEVICE_ERROR, false},
        {"cuCtxGetCurrent", 4, HOLDFAST_DEVICE_ERROR, false},
        {"cuCtxGetDevice", 201, HOLDFAST_DEVICE_ERROR, false},
        {"cuStreamGetCtx", 400, HOLDFAST_DEVICE_ERROR, false, true},
        {"cuCtxPushCurrent", 201, HOLDFAST_DEVICE_ERROR, false},
        {"cuModuleLoadDataEx", 209, HOLDFAST_DEVICE_ERROR, false},
        {"cuModuleLoadDataEx", 2, HOLDFAST_OUT_OF_MEMORY, false},
        {"cuModuleGetFunction", 500, HOLDFAST_DEVICE_ERROR, false},
        {"cuLaunchKernel", 701, HOLDFAST_DEVICE_ERROR, false},
        {"cuLaunchKernel", 2, HOLDFAST_OUT_OF_MEMORY, false},
        {"cuMemAlloc", 2, HOLDFAST_OUT_OF_MEMORY, false},
        {"cuMemAlloc", 700, HOLDFAST_DEVICE_ERROR, false},
        {"cuMemcpyHtoDAsync", 700, HOLDFAST_DEVICE_ERROR, true},
        {"cuMemcpyDtoHAsync", 700, HOLDFAST_DEVICE_ERROR, true},
        {"cuStreamSynchronize", 719, HOLDFAST_DEVICE_ERROR, true},
    };
    for (const auto &bad : cases) {
        // Every call of that function in turn, until one is not reached.
        for (int nth = 1; nth < 40; nth++) {
            SCOPED_TRACE(std::string(bad.function) + " fails with " + std::to_string(bad.result) + ", call " +
                         std::to_string(nth));
            Context context;
            const bool retain = std::string(bad.function) == "cuDevicePrimaryCtxRetain";
            if (bad.by_stream) {
                ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
            } else if (!retain) {  // a context of its own: kernels are loaded again
                ASSERT_EQ(holdfast_context_set_device(context, driver.context(0)), HOLDFAST_OK);
            } else if (nth > 1) {
                break;  // once it has succeeded, it is not called again
            }
            Call call(retain ? 2 : 0, bad.host ? kDLCPU : kDLCUDA);
            if (bad.host) {
                ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK);
            }
            driver.clear();
            const std::string fail = std::string(bad.function) + ":" + std::to_string(bad.result) + ":" + std::to_string(nth);
            setenv("HOLDFAST_STUB_FAIL", fail.c_str(), 1);
            const holdfast_status status = call.run(context);
            unsetenv("HOLDFAST_STUB_FAIL");
            const bool reached = (int)of(driver.record(), bad.function).size() >= nth;
            const size_t pushed = of(driver.record(), "cuCtxPushCurrent").size(),
                         popped = of(driver.record(), "cuCtxPopCurrent").size();
            if (!reached) {
                EXPECT_EQ(status, HOLDFAST_OK) << context.error();
                EXPECT_GT(nth, 1) << "never called";
                break;
            }
            EXPECT_EQ(status, bad.status) << context.error();
            EXPECT_NE(context.error().find("CUDA_ERROR_STUB (" + std::to_string(bad.result) + "), as the test asked for"),
                      std::string::npos)
                << context.error();
            EXPECT_NE(context.error().find(bad.function), std::string::npos) << context.error();
            EXPECT_EQ(pushed - (std::string(bad.function) == "cuCtxPushCurrent"), popped)
                << "the caller's context is not current again";
            EXPECT_EQ(call.run(context), HOLDFAST_OK) << "the context does not work after a failure: " << context.error();
        }
    }
}

TEST(Cuda, MoreSharedMemoryThanUsualMayBeRefused) {
    Driver driver;
    bool asked = false;
    for (const Choosy &choosy : choosy_variants()) {
        Context context;
        ASSERT_EQ(holdfast_context_set_device(context, driver.context(0)), HOLDFAST_OK);
        auto call = choosy.call();
        driver.clear();
        setenv("HOLDFAST_STUB_FAIL", "cuFuncSetAttribute:1", 1);
        const holdfast_status status = call->run(context);
        unsetenv("HOLDFAST_STUB_FAIL");
        if (of(driver.record(), "cuFuncSetAttribute").empty()) {
            EXPECT_EQ(status, HOLDFAST_OK) << context.error();
            continue;
        }
        asked = true;
        EXPECT_EQ(status, HOLDFAST_DEVICE_ERROR) << context.error();
        EXPECT_NE(context.error().find("bytes of shared memory: CUDA_ERROR_STUB (1), as the test asked for"), std::string::npos)
            << context.error();
        EXPECT_EQ(call->run(context), HOLDFAST_OK) << "the context does not work after a failure: " << context.error();
    }
    if (!asked) GTEST_SKIP() << "HOLDFAST_SIZES left out all variants that need more than 48 KB";
}

TEST(Cuda, WhatIsTooLargeForOneCallOfTheKernelTakesSeveral) {
    Driver driver;
    Context context;
    Call small, large;
    ASSERT_EQ(small.run(context), HOLDFAST_OK);
    driver.clear();
    ASSERT_EQ(small.run(context), HOLDFAST_OK);
    const size_t launches = of(driver.record(), "cuLaunchKernel").size();
    // Batch entries so far apart that 32 bits do not reach from one to the other.
    int64_t strides[] = {(int64_t)1 << 32, H * K, K, 1};
    large.q.strides = strides;
    driver.clear();
    ASSERT_EQ(large.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 2 * launches - 1);  // the table once
}

TEST(Cuda, NoTokensAndNoHeads) {
    Driver driver;
    Context context;
    Call call;
    for (DLTensor *x : {&call.q, &call.k, &call.v, &call.out, &call.log_decay}) x->shape[1] = 0;
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    Call none;
    for (DLTensor *x : {&none.q, &none.k, &none.v, &none.out, &none.log_decay}) x->shape[2] = 0;
    for (DLTensor *x : {&none.initial_state, &none.final_state}) x->shape[1] = 0;
    driver.clear();
    EXPECT_EQ(none.run(context), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(driver.record().empty());
}

TEST(Cuda, StepIsTwoLaunchesWithWorkspaceAfterTheFirst) {
    Driver driver;
    void *stream = driver.stream(driver.context(0));
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
    StepCall call;
    call.give_workspace(context);
    EXPECT_EQ(call.workspace_bytes, (B * H * V * 4 + 255) / 256 * 256);  // a row of sums for each head
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(others(driver.record()), (std::set<std::string>{"cuModuleLoadDataEx", "cuModuleGetFunction"}));
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    const auto second = driver.record();
    EXPECT_EQ(others(second), std::set<std::string>());
    EXPECT_EQ(of(second, "cuLaunchKernel").size(), 2u);
    for (const std::string &line : of(second, "cuLaunchKernel"))
        EXPECT_EQ(line.substr(line.find("stream")), "stream " + text(stream));
    EXPECT_EQ(context.messages.at(1).find("step: recurrent_f32_"), 0u) << context.messages[1];
    EXPECT_NE(context.messages.at(1).find("_cuda (where the tensors are)"), std::string::npos) << context.messages[1];
    EXPECT_NE(context.messages.at(1).find("token by token, on CUDA device 0"), std::string::npos) << context.messages[1];

    StepCall without;  // a decay of one is made on the device
    without.args.log_decay = nullptr;
    without.give_workspace(context);
    EXPECT_GT(without.workspace_bytes, call.workspace_bytes);
    ASSERT_EQ(without.run(context), HOLDFAST_OK) << context.error();
    driver.clear();
    ASSERT_EQ(without.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(others(driver.record()), std::set<std::string>());
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 3u);
}

TEST(Cuda, StepsKeepMemoryWithoutWorkspace) {
    Driver driver;
    Context context;
    StepCall call;
    size_t bytes = 0;
    ASSERT_EQ(holdfast_step_workspace_size(context, &call.args, &bytes), HOLDFAST_OK);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemAlloc"), (std::vector<std::string>{"cuMemAlloc " + std::to_string(bytes)}));
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(others(driver.record()), std::set<std::string>());
}

TEST(Cuda, StepsOnTheHostAreCopiedWhenAskedFor) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    StepCall call(0, kDLCPU);
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemcpyHtoDAsync").size(), 5u);  // the state once
    EXPECT_EQ(of(driver.record(), "cuMemcpyDtoHAsync"),
              (std::vector<std::string>{"cuMemcpyDtoHAsync " + std::to_string(B * H * V * 4),
                                        "cuMemcpyDtoHAsync " + std::to_string(B * H * K * V * 4)}));
    EXPECT_GE(of(driver.record(), "cuStreamSynchronize").size(), 1u);
}

TEST(Cuda, BadStepsAreRefusedBeforeAnythingRuns) {
    Driver driver;
    Context context;
    const struct {
        const char *text;
        void (*spoil)(StepCall &);
    } cases[] = {
        {"as holdfast_step_workspace_size says", [](StepCall &c) { c.workspace_bytes--; }},
        {"state is on the CPU and q on CUDA device 0", [](StepCall &c) { c.state.device = {kDLCPU, 0}; }},
        {"out overlaps state in memory", [](StepCall &c) { c.out.data = c.state.data; }},
    };
    for (const auto &bad : cases) {
        SCOPED_TRACE(bad.text);
        StepCall call;
        call.give_workspace(context);
        bad.spoil(call);
        driver.clear();
        EXPECT_EQ(call.run(context), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find(bad.text), std::string::npos) << context.error();
        EXPECT_TRUE(of(driver.record(), "cuLaunchKernel").empty());
    }
    StepCall call;
    EXPECT_EQ(holdfast_step_workspace_size(context, &call.args, nullptr), HOLDFAST_INVALID_ARGUMENT);
    setenv("HOLDFAST_STUB_FAIL", "cuLaunchKernel:701:2", 1);
    driver.clear();
    EXPECT_EQ(call.run(context), HOLDFAST_DEVICE_ERROR);
    unsetenv("HOLDFAST_STUB_FAIL");
    EXPECT_NE(context.error().find("cuLaunchKernel: CUDA_ERROR_STUB (701)"), std::string::npos) << context.error();
    EXPECT_EQ(call.run(context), HOLDFAST_OK) << context.error();
}

TEST(Cuda, StatesFarApartTakeSeveralCalls) {
    Driver driver;
    Context context;
    StepCall call;
    int64_t strides[] = {(int64_t)1 << 32, K * V, V, 1};
    call.state.strides = strides;
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    driver.clear();
    ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), (size_t)(2 * B));
    strides[0] = (int64_t)1 << 37, strides[1] = (int64_t)1 << 35, strides[2] = (int64_t)1 << 29;
    EXPECT_EQ(call.run(context), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("with a stride of 536870912 along K, reaches beyond 2^31 bytes"), std::string::npos)
        << context.error();
}

/// Calls of power retention, forward and step, with all tensors on a device.
struct PowerCudaCall {
    PowerProblem p{B, T, H, 1, K, V};
    Tensor views[9] = {p.q, p.k, p.v, p.log_decay, p.initial_state, p.initial_keys, p.out, p.state, p.keys};
    Tensor tokens[5] = {token(p.q, 0), token(p.k, 0), token(p.v, 0), token(p.log_decay, 0), token(p.out, 0)};
    DLTensor dl[9], token_dl[5], memory = {};
    holdfast_forward_args forward = forward_args(&dl[0], &dl[1], &dl[2], &dl[3], &dl[4], &dl[6], &dl[7]);
    holdfast_step_args step = step_args(&token_dl[0], &token_dl[1], &token_dl[2], &token_dl[3], &dl[4], &token_dl[4]);
    int64_t bytes = 0;

    PowerCudaCall() {
        uint64_t address = 0;
        auto put = [&](DLTensor &to, Tensor &view) {
            to = view.dl();
            to.device = {kDLCUDA, 0}, to.data = (void *)(address += (uint64_t)1 << 40);
        };
        for (int n = 0; n < 9; n++) put(dl[n], views[n]);
        for (int n = 0; n < 5; n++) put(token_dl[n], tokens[n]), token_dl[n].strides = nullptr;
        forward.degree = step.degree = 2;
        forward.initial_sum_of_keys = step.sum_of_keys = &dl[5], forward.final_sum_of_keys = &dl[8];
    }
    PowerCudaCall(const PowerCudaCall &) = delete;
    void give_workspace(size_t size) {
        bytes = (int64_t)size;
        memory = {(void *)((uint64_t)1 << 50), {kDLCUDA, 0}, 1, {kDLUInt, 8, 1}, &bytes, nullptr, 0};
        forward.workspace = step.workspace = &memory;
    }
};

TEST(Cuda, PowerRetentionIsLaunchesAloneForEachChunk) {
    Driver driver;
    void *stream = driver.stream(driver.context(0));
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
    PowerCudaCall call;
    size_t bytes = 0;
    ASSERT_EQ(holdfast_workspace_size(context, &call.forward, &bytes), HOLDFAST_OK) << context.error();
    driver.clear();
    ASSERT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemAlloc"), (std::vector<std::string>{"cuMemAlloc " + std::to_string(bytes)}));
    std::vector<size_t> launches;
    for (int64_t tokens : {64, 65, 70, 1, 0}) {
        for (int n : {0, 1, 2, 3, 6}) call.dl[n].shape[1] = tokens;
        ASSERT_EQ(holdfast_workspace_size(context, &call.forward, &bytes), HOLDFAST_OK) << context.error();
        call.give_workspace(bytes);
        for (int n = 0; n < 2; n++) {  // no tokens are another kernel
            driver.clear();
            ASSERT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_OK) << context.error();
        }
        const auto record = driver.record();
        EXPECT_EQ(others(record), std::set<std::string>());
        launches.push_back(of(record, "cuLaunchKernel").size());
        for (const std::string &line : of(record, "cuLaunchKernel"))
            EXPECT_EQ(line.substr(line.find("stream")), "stream " + text(stream));
    }
    EXPECT_EQ(launches[1], launches[2]);
    EXPECT_EQ(launches[3], launches[0]);
    EXPECT_EQ(launches[4], 2u);                   // the state and the sum of keys go from one place to the other
    EXPECT_EQ(launches[1], 2 * launches[0] - 1);  // zeros once
    EXPECT_EQ(context.messages.back().find("forward: power_f32_c64_k0_v0_cuda (where the tensors are), B 2, T 0"), 0u)
        << context.messages.back();

    // Packed sequences are calls of their own; they need no more memory than the longest.
    for (int n : {0, 1, 2, 3, 6}) call.dl[n].shape[0] = 1, call.dl[n].shape[1] = T;
    call.dl[4].shape[0] = call.dl[5].shape[0] = call.dl[7].shape[0] = call.dl[8].shape[0] = 1;
    ASSERT_EQ(holdfast_workspace_size(context, &call.forward, &bytes), HOLDFAST_OK) << context.error();
    call.give_workspace(bytes - 1);
    EXPECT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_NE(context.error().find("as holdfast_workspace_size says"), std::string::npos) << context.error();
    call.give_workspace(bytes);
    call.dl[4].shape[0] = call.dl[5].shape[0] = call.dl[7].shape[0] = call.dl[8].shape[0] = 2;
    int64_t starts[] = {0, 6, T}, extent = 3;
    const DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &extent, nullptr, 0};
    call.forward.cu_seqlens = &cu_seqlens;
    driver.clear();
    ASSERT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(others(driver.record()), std::set<std::string>());
    EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 2 * launches[0]);
}

TEST(Cuda, TheParallelFormIsLaunchesAlone) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    PowerCudaCall call;
    call.forward.form = HOLDFAST_FORM_PARALLEL;
    std::vector<size_t> launches;
    for (int64_t tokens : {70, 70, 33}) {
        for (int n : {0, 1, 2, 3, 6}) call.dl[n].shape[1] = tokens;
        size_t bytes = 0;
        ASSERT_EQ(holdfast_workspace_size(context, &call.forward, &bytes), HOLDFAST_OK) << context.error();
        call.give_workspace(bytes - 1);
        driver.clear();
        EXPECT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 0u) << "something ran";
        call.give_workspace(bytes);
        driver.clear();
        ASSERT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_OK) << context.error();
        launches.push_back(of(driver.record(), "cuLaunchKernel").size());
        if (launches.size() > 1) {
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
        }
    }
    EXPECT_GT(launches[1], launches[2]) << "power retention's chunks, of the final state, are one less";
    EXPECT_EQ(context.messages.back().find("forward: parallel_f32_c32_k0_v0_cuda (where the tensors are), B 2, T 33"), 0u)
        << context.messages.back();

    // Without states there is the one call of the kernel.
    call.forward.initial_state = call.forward.initial_sum_of_keys = nullptr;
    call.forward.final_state = call.forward.final_sum_of_keys = nullptr;
    driver.clear();
    ASSERT_EQ(holdfast_forward(context, &call.forward), HOLDFAST_OK) << context.error();
    EXPECT_LT(of(driver.record(), "cuLaunchKernel").size(), launches[2]);
}

TEST(Cuda, StepsOfPowerRetentionAreLaunchesAlone) {
    Driver driver;
    Context context;
    PowerCudaCall call;
    std::vector<size_t> launches;
    for (bool apart : {false, true}) {  // batch entries
        if (apart) call.dl[4].strides[0] *= 2;
        size_t bytes = 0;
        ASSERT_EQ(holdfast_step_workspace_size(context, &call.step, &bytes), HOLDFAST_OK) << context.error();
        EXPECT_GT(bytes, (size_t)(B * H * V * 4));
        call.give_workspace(bytes);
        ASSERT_EQ(holdfast_step(context, &call.step), HOLDFAST_OK) << context.error();
        driver.clear();
        ASSERT_EQ(holdfast_step(context, &call.step), HOLDFAST_OK) << context.error();
        EXPECT_EQ(others(driver.record()), std::set<std::string>());
        launches.push_back(of(driver.record(), "cuLaunchKernel").size());
    }
    EXPECT_EQ(launches[1], B * launches[0]);
    EXPECT_EQ(context.messages.back().find("step: power_step_f32_k0_v0_cuda (where the tensors are)"), 0u)
        << context.messages.back();
}

TEST(Cuda, PowerStatesInTheTiledOrderTakeFourLaunchesMore) {
    Driver driver;
    Context context;
    for (const bool step : {false, true}) {
        std::vector<size_t> launches, sizes;
        for (holdfast_expansion expansion : {HOLDFAST_EXPANSION_TIGHT, HOLDFAST_EXPANSION_TILED}) {
            PowerCudaCall call;
            call.forward.expansion = call.step.expansion = expansion;
            call.forward.state_layout = call.step.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
            for (int n : {4, 5, 7, 8}) {
                const int64_t D = holdfast_state_size(K, 2, expansion);
                call.dl[n].strides = nullptr;
                if (n == 4 || n == 7)
                    call.dl[n].shape[3] = D, call.dl[n].shape[2] = V;
                else
                    call.dl[n].shape[2] = D;
            }
            size_t bytes = 0;
            ASSERT_EQ(step ? holdfast_step_workspace_size(context, &call.step, &bytes)
                           : holdfast_workspace_size(context, &call.forward, &bytes),
                      HOLDFAST_OK)
                << context.error();
            call.give_workspace(bytes);
            for (int n = 0; n < 2; n++) {
                driver.clear();
                ASSERT_EQ(step ? holdfast_step(context, &call.step) : holdfast_forward(context, &call.forward), HOLDFAST_OK)
                    << context.error();
            }
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
            launches.push_back(of(driver.record(), "cuLaunchKernel").size()), sizes.push_back(bytes);
        }
        EXPECT_EQ(launches[1], launches[0] + 4);  // the state and the sum of keys, in and out
        EXPECT_GE(sizes[1], sizes[0] + (size_t)(B * H * holdfast_state_size(K, 2, 0) * V * 4));
    }
}

/// Calls of holdfast_rotate and holdfast_head_norm_gate, of x and gate of the same shape.
struct AroundCall {
    Array rows = Array({B, T, H, V}).fill(0.5f), table = Array({H, V}).fill(0.5f);
    Tensor views[5] = {rows, rows, rows, table, Tensor(table.data(), {V / 2}, {1})};
    DLTensor x = views[0].dl(), gate = views[1].dl(), out = views[2].dl(), weight = views[3].dl(), theta = views[4].dl();
    int64_t extents[2] = {B, T};
    DLTensor positions = {nullptr, {kDLCUDA, 0}, 2, {kDLInt, 64, 1}, extents, nullptr, 0};
    holdfast_rotate_args rotate = {sizeof rotate, &x, &theta, nullptr, &out, 5, 0};
    holdfast_head_norm_gate_args norm = {sizeof norm, &x, &gate, &weight, &out, HOLDFAST_NORM_RMS, 1e-6f};

    explicit AroundCall(DLDeviceType type = kDLCUDA) {
        uint64_t address = 0;
        for (DLTensor *t : {&x, &gate, &out, &weight, &theta, &positions}) {
            t->device = {type, 0};
            if (type != kDLCPU) t->data = (void *)(address += (uint64_t)1 << 40);
        }
    }
    AroundCall(const AroundCall &) = delete;
};

TEST(Cuda, RotationsAndNormsAreOneLaunchAndNothingElse) {
    Driver driver;
    void *stream = driver.stream(driver.context(0));
    variants(nullptr);  // once in a process the driver is asked for its devices
    for (const char *kernel : {"rotate", "head_norm_gate"})
        for (bool less : {false, true}) {  // without positions or weight; tokens of one batch entry
            SCOPED_TRACE(kernel + std::string(less ? ", less" : ""));
            const bool rotate = *kernel == 'r';
            Context context;
            ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
            AroundCall call;
            if (!less)
                call.rotate.positions = &call.positions, call.rotate.offset = 0;
            else
                call.norm.weight = call.norm.gate = nullptr;
            auto run = [&] {
                driver.clear();
                return rotate ? holdfast_rotate(context, &call.rotate) : holdfast_head_norm_gate(context, &call.norm);
            };
            ASSERT_EQ(run(), HOLDFAST_OK) << context.error();
            EXPECT_EQ(others(driver.record()),
                      less ? std::set<std::string>() : (std::set<std::string>{"cuModuleLoadDataEx", "cuModuleGetFunction"}));
            ASSERT_EQ(run(), HOLDFAST_OK) << context.error();
            const auto record = driver.record();
            EXPECT_EQ(others(record), std::set<std::string>());
            ASSERT_EQ(of(record, "cuLaunchKernel").size(), 1u);
            const std::string line = of(record, "cuLaunchKernel")[0];
            EXPECT_EQ(line.substr(line.find("stream")), "stream " + text(stream));
            EXPECT_EQ(context.messages.back(), std::string(kernel) + ": " + kernel +
                                                   "_f32_cuda (where the tensors are), B 2, T 70, H 3, size 24, on CUDA "
                                                   "device 0");
            // More tokens than a grid of blocks may have, and tokens too far apart.
            for (DLTensor *t : {&call.x, &call.gate, &call.out}) t->shape[1] = 70'000, t->strides = nullptr;
            call.extents[1] = 70'000;
            ASSERT_EQ(run(), HOLDFAST_OK) << context.error();
            EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 3u);
            for (DLTensor *t : {&call.x, &call.gate, &call.out}) t->shape[1] = 0;
            call.extents[1] = 0;
            ASSERT_EQ(run(), HOLDFAST_OK) << context.error();
            EXPECT_TRUE(driver.record().empty());
        }
}

TEST(Cuda, GradientsOfRotationsAndNormsAreLaunchesAndNothingElse) {
    Driver driver;
    void *stream = driver.stream(driver.context(0));
    variants(nullptr);
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
    AroundCall call, gradients;
    for (DLTensor *t : {&gradients.x, &gradients.gate, &gradients.out, &gradients.weight})
        t->data = (char *)t->data + ((uint64_t)1 << 50);
    const holdfast_rotate_backward_args rotate = {sizeof rotate, &call.x, &call.theta, nullptr, &gradients.x, 5, 0};
    holdfast_head_norm_gate_backward_args norm = {};
    norm.struct_size = sizeof norm, norm.x = &call.x, norm.dout = &gradients.out, norm.eps = 1e-6f;
    auto launches = [&](const std::function<holdfast_status()> &run) {
        EXPECT_EQ(run(), HOLDFAST_OK) << context.error();  // loads kernels, and has memory grow
        driver.clear();
        EXPECT_EQ(run(), HOLDFAST_OK) << context.error();
        const auto record = driver.record();
        EXPECT_EQ(others(record), std::set<std::string>());
        for (const std::string &line : of(record, "cuLaunchKernel"))
            EXPECT_EQ(line.substr(line.find("stream")), "stream " + text(stream));
        return (int)of(record, "cuLaunchKernel").size();
    };
    auto of_norm = [&] { return launches([&] { return holdfast_head_norm_gate_backward(context, &norm); }); };
    EXPECT_EQ(launches([&] { return holdfast_rotate_backward(context, &rotate); }), 1);
    norm.dx = &gradients.x;
    EXPECT_EQ(of_norm(), 3);  // the sums of squares, the weights, dx
    norm.norm = HOLDFAST_NORM_LAYER;
    EXPECT_EQ(of_norm(), 4);
    norm.gate = &call.gate, norm.dgate = &gradients.gate;
    EXPECT_EQ(of_norm(), 5);
    norm.weight = &call.weight, norm.dweight = &gradients.weight;
    EXPECT_EQ(of_norm(), 10);
    for (DLTensor *t : {&call.x, &call.gate, &gradients.x, &gradients.gate, &gradients.out}) t->shape[1] = 0;
    norm.dweight = nullptr;
    driver.clear();
    ASSERT_EQ(holdfast_head_norm_gate_backward(context, &norm), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(driver.record().empty());
    norm.dweight = &gradients.weight;
    EXPECT_GE(of_norm(), 1);  // zeros
}

/// Calls of holdfast_backward with everything wanted and all tensors on a device, decays per head.
struct GradientCall {
    Backward p;
    std::deque<Tensor> views;
    std::vector<DLTensor> t;  // q, k, v, out, dout, states, gradients of rows, gradients of states, decays
    holdfast_backward_args args = {};
    int64_t bytes = 0;
    DLTensor memory = {};

    GradientCall(int degree, holdfast_form form, int64_t entries = B, int64_t heads = H, int64_t group = 2)
        : p{entries, 130, heads, group, 5, 7, degree, degree > 1, Gates::per_head} {
        const bool states = form == HOLDFAST_FORM_CHUNKWISE;
        Array *all[] = {
            &p.q,           &p.k,  &p.v,  &p.out, &p.dout,           &p.initial_state, &p.initial_keys, &p.dfinal_state,
            &p.dfinal_keys, &p.dq, &p.dk, &p.dv,  &p.dinitial_state, &p.dinitial_keys};
        uint64_t address = 0;
        auto put = [&](const Tensor &view) {
            views.push_back(view), t.push_back(views.back().dl());
            t.back().device = {kDLCUDA, 0}, t.back().data = (void *)(address += (uint64_t)1 << 40);
        };
        for (Array *x : all) put(*x);
        put(Tensor(p.log_decay.data(), {heads}, {1})), put(p.dlog_decay);
        args.struct_size = sizeof args, args.degree = degree, args.form = form;
        args.q = &t[0], args.k = &t[1], args.v = &t[2], args.dout = &t[4], args.dq = &t[9], args.dk = &t[10], args.dv = &t[11];
        args.log_decay = &t[14], args.dlog_decay = &t[15];
        if (p.normalize) args.out = &t[3];
        if (states) args.initial_state = &t[5], args.dfinal_state = &t[7], args.dinitial_state = &t[12];
        if (states && p.normalize)
            args.initial_sum_of_keys = &t[6], args.dfinal_sum_of_keys = &t[8], args.dinitial_sum_of_keys = &t[13];
    }
    GradientCall(const GradientCall &) = delete;
    /// Another extent of an axis of rows, or of states.
    void resize(int axis, int64_t extent) {
        for (int n : {0, 1, 2, 3, 4, 9, 10, 11}) t[n].shape[axis] = extent, t[n].strides = nullptr;
    }
    void resize_states(int axis, int64_t extent) {
        for (int n : {5, 6, 7, 8, 12, 13})
            if (axis < t[n].ndim) t[n].shape[axis] = extent, t[n].strides = nullptr;
    }
    void give_workspace(holdfast_context *context) {
        size_t needed = 0;
        ASSERT_EQ(holdfast_backward_workspace_size(context, &args, &needed), HOLDFAST_OK) << holdfast_last_error(context);
        bytes = (int64_t)needed;
        memory = {(void *)((uint64_t)1 << 50), {kDLCUDA, 0}, 1, {kDLUInt, 8, 1}, &bytes, nullptr, 0};
        args.workspace = &memory;
    }
};

TEST(Cuda, NoGridOfGradientsIsLargerThanTheDriverTakes) {
    Context context;
    constexpr int64_t many = 70'000;
    for (const auto &[degree, form] :
         {std::pair{1, HOLDFAST_FORM_CHUNKWISE}, {2, HOLDFAST_FORM_CHUNKWISE}, {2, HOLDFAST_FORM_PARALLEL}}) {
        SCOPED_TRACE(testing::Message() << "degree " << degree << ", form " << form);
        for (const bool heads : {false, true})
            for (const int64_t tokens : {1, 0}) {
                GradientCall call(degree, form, 1, 1, 1);
                call.resize(heads ? 2 : 0, many), call.resize(1, tokens), call.resize_states(heads ? 1 : 0, many);
                if (heads) call.t[14].shape[0] = call.t[15].shape[0] = many, call.t[14].strides = call.t[15].strides = nullptr;
                call.give_workspace(context);
                EXPECT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            }
    }
}

TEST(Cuda, GradientsOfSequencesThatAreTooLongForOneCallOfTheKernelTakeSeveral) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    const int64_t million = 1 << 20;
    for (const bool packed : {false, true})
        for (const bool apart : {false, true}) {  // states of all chunks beyond 2^31 bytes; or rows
            SCOPED_TRACE(testing::Message() << "packed " << packed << ", apart " << apart);
            const int64_t T = apart ? million : million / 8;
            GradientCall call(1, HOLDFAST_FORM_CHUNKWISE, 1, 1, 2);
            call.resize(1, T);
            if (!apart) {
                for (int n : {0, 1, 9, 10}) call.t[n].shape[3] = 256;
                for (int n : {2, 3, 4, 11}) call.t[n].shape[3] = 512;
                call.resize_states(2, 256), call.resize_states(3, 512);
            }
            int64_t strides[] = {0, 1 << 12, 0, 1}, starts[] = {0, T - 5, T - 5, T}, extent = 4;
            if (apart) call.t[2].strides = strides;
            const DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &extent, nullptr, 0};
            if (packed) call.args.cu_seqlens = &cu_seqlens, call.resize_states(0, 3);
            call.give_workspace(context);
            EXPECT_LT(call.bytes, (int64_t)9 << 30);
            ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            driver.clear();
            ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
            const size_t several = of(driver.record(), "cuLaunchKernel").size();
            call.args.dq = nullptr, call.args.dlog_decay = nullptr;  // without them no states are made first
            ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            driver.clear();
            ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            EXPECT_LT(of(driver.record(), "cuLaunchKernel").size(), several);
        }
}

/// Those of a call that a graph takes down, of which nothing else may be.
size_t captured_launches(Driver &driver, Context &context, const GradientCall &call) {
    driver.capture(true);
    driver.clear();
    EXPECT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
    driver.capture(false);
    EXPECT_EQ(others(driver.record()), std::set<std::string>());
    return of(driver.record(), "cuLaunchKernel").size();
}

TEST(Cuda, GradientsOfPackedSequencesAreLaunchesAlone) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    std::map<int64_t, size_t> launches;
    for (const int64_t number : {1, 64, 65, 200}) {
        SCOPED_TRACE(testing::Message() << number << " sequences");
        GradientCall call(1, HOLDFAST_FORM_CHUNKWISE, 1);
        const Sequences packed(number, call.t[0].shape[1]);
        call.resize_states(0, number), call.args.cu_seqlens = &packed.cu_seqlens;
        call.give_workspace(context);
        ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
        launches[number] = captured_launches(driver, context, call);
    }
    EXPECT_EQ(launches[64], launches[1]);
    EXPECT_EQ(launches[65], launches[1] + 1);
    EXPECT_EQ(launches[200], launches[1] + 3);
}

TEST(Cuda, GradientsAreLaunchesAlone) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    for (const auto &[degree, form, kernel] : {std::make_tuple(1, HOLDFAST_FORM_CHUNKWISE, "chunkwise_backward_f32_c32"),
                                               {2, HOLDFAST_FORM_CHUNKWISE, "power_backward_f32_c64"},
                                               {2, HOLDFAST_FORM_PARALLEL, "parallel_backward_f32_c32"}}) {
        SCOPED_TRACE(kernel);
        GradientCall call(degree, form);
        auto &t = call.t;
        holdfast_backward_args &args = call.args;
        std::vector<size_t> launches;
        for (int64_t tokens : {130, 130, 40}) {
            for (int n : {0, 1, 2, 3, 4, 9, 10, 11}) t[n].shape[1] = tokens;
            size_t needed = 0;
            ASSERT_EQ(holdfast_backward_workspace_size(context, &args, &needed), HOLDFAST_OK) << context.error();
            int64_t bytes = (int64_t)needed - 1;
            const DLTensor memory = {(void *)((uint64_t)1 << 50), {kDLCUDA, 0}, 1, {kDLUInt, 8, 1}, &bytes, nullptr, 0};
            args.workspace = &memory;
            driver.clear();
            EXPECT_EQ(holdfast_backward(context, &args), HOLDFAST_INVALID_ARGUMENT);
            EXPECT_NE(context.error().find("as holdfast_backward_workspace_size says"), std::string::npos) << context.error();
            EXPECT_EQ(of(driver.record(), "cuLaunchKernel").size(), 0u) << "something ran";
            bytes++;
            driver.clear();
            ASSERT_EQ(holdfast_backward(context, &args), HOLDFAST_OK) << context.error();
            launches.push_back(of(driver.record(), "cuLaunchKernel").size());
            if (launches.size() > 1) {  // the first loads the kernels
                EXPECT_EQ(others(driver.record()), std::set<std::string>());
            }
        }
        EXPECT_EQ(launches[0], launches[1]);
        if (kernel[1] == 'o')  // chunk after chunk
            EXPECT_GT(launches[1], 2 * launches[2]);
        else
            EXPECT_EQ(launches[1], launches[2]);
        EXPECT_EQ(context.messages.back().find(std::string("backward: ") + kernel + "_k0_v0_cuda (where the tensors are)"), 0u)
            << context.messages.back();
    }
}

TEST(Cuda, GradientsLaunchWhatTheWantedOnesNeedAlone) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    for (const int degree : {1, 2}) {
        SCOPED_TRACE(degree);
        GradientCall call(degree, HOLDFAST_FORM_CHUNKWISE);
        call.give_workspace(context);
        call.bytes += 1 << 20;  // calls that want less may need more
        const holdfast_backward_args all = call.args;
        auto launches = [&](const std::string &wanted, bool dout = true) {
            holdfast_backward_args args = all;
            auto want = [&](char what, DLTensor *&gradient) {
                if (wanted.find(what) == std::string::npos) gradient = nullptr;
            };
            want('q', args.dq), want('k', args.dk), want('v', args.dv), want('g', args.dlog_decay);
            want('s', args.dinitial_state), want('s', args.dinitial_sum_of_keys);
            if (!dout) args.dout = nullptr;
            EXPECT_EQ(holdfast_backward(context, &args), HOLDFAST_OK) << context.error();
            driver.clear();
            EXPECT_EQ(holdfast_backward(context, &args), HOLDFAST_OK) << context.error();
            EXPECT_EQ(others(driver.record()), std::set<std::string>());
            return (int)of(driver.record(), "cuLaunchKernel").size();
        };
        const int whole = launches("qkvgs"), of_queries = launches("q"), of_others = launches("kvgs");
        for (const char *alone : {"q", "k", "v", "g", "s"}) EXPECT_LT(launches(alone), whole) << alone;
        EXPECT_LT(launches("qkvg"), whole);
        EXPECT_GE(launches("qs"), of_queries + 4);  // what rows add, the scan back of two steps, the result
        EXPECT_LT(launches("kvgs", false), of_others);
        EXPECT_LE(launches("s", false), launches("s"));
    }
}

TEST(Cuda, GradientsThatNothingComesToAreClearedAndNothingElse) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_stream(context, driver.stream(driver.context(0))), HOLDFAST_OK);
    for (const Dtype &dtype : {f32, bf16})
        for (const auto &[degree, form] :
             {std::pair{1, HOLDFAST_FORM_CHUNKWISE}, {2, HOLDFAST_FORM_CHUNKWISE}, {2, HOLDFAST_FORM_PARALLEL}}) {
            SCOPED_TRACE(testing::Message() << dtype.name << ", degree " << degree << ", form " << form);
            GradientCall call(degree, form);
            for (int n : {0, 1, 2, 3, 4, 9, 10, 11}) call.t[n].dtype = dl_type(dtype);
            call.args.dout = call.args.dfinal_state = call.args.dfinal_sum_of_keys = nullptr;
            call.give_workspace(context);
            EXPECT_LT(call.bytes, 1 << 12);
            ASSERT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
            const size_t launches = captured_launches(driver, context, call);
            // Those of fp32 take a zero, and a kernel that copies it.
            const size_t rows = 3, floats = 1 + (call.args.dinitial_state ? 1 : 0) + (call.args.dinitial_sum_of_keys ? 1 : 0);
            EXPECT_EQ(launches, rows * (dtype == f32 ? 2 : 1) + 2 * floats);
            EXPECT_TRUE(context.messages.empty()) << context.messages.back();
        }
}

TEST(Cuda, RotationsAndNormsOfTheHostAreCopiedWhenAskedFor) {
    Driver driver;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_OK) << context.error();
    AroundCall call(kDLCPU);
    const std::vector<std::string> out = {"cuMemcpyDtoHAsync " + std::to_string(B * T * H * V * 4)};
    driver.clear();
    ASSERT_EQ(holdfast_rotate(context, &call.rotate), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemcpyHtoDAsync").size(), 2u);
    EXPECT_EQ(of(driver.record(), "cuMemcpyDtoHAsync"), out);
    driver.clear();
    ASSERT_EQ(holdfast_head_norm_gate(context, &call.norm), HOLDFAST_OK) << context.error();
    EXPECT_EQ(of(driver.record(), "cuMemcpyHtoDAsync").size(), 3u);
    EXPECT_EQ(of(driver.record(), "cuMemcpyDtoHAsync"), out);
    EXPECT_GE(of(driver.record(), "cuStreamSynchronize").size(), 1u);
}

TEST(MissingCuda, IsSaidAndTheRestWorks) {
    const char *expected = std::getenv("HOLDFAST_EXPECTED");
    if (!expected) GTEST_SKIP() << "run by CTest, once for each way";
    holdfast_backend backend = {};
    backend.struct_size = sizeof backend;
    for (int n = 0; n < holdfast_backend_count(); n++) {
        ASSERT_EQ(holdfast_backend_at(n, &backend), HOLDFAST_OK);
        if (std::string(backend.name) == "cuda") break;
    }
    EXPECT_EQ(backend.compiled, 1);
    EXPECT_EQ(backend.available, 0);
    EXPECT_NE(std::string(backend.missing).find(expected), std::string::npos) << backend.missing;

    Context context;
    Call call;
    for (int n = 0; n < 2; n++) {
        EXPECT_EQ(call.run(context), HOLDFAST_TARGET_UNAVAILABLE);
        EXPECT_NE(context.error().find(backend.missing), std::string::npos) << context.error();
    }
    EXPECT_EQ(holdfast_context_set_backend(context, "cuda"), HOLDFAST_TARGET_UNAVAILABLE);
    EXPECT_EQ(holdfast_context_set_target(context, "cuda"), HOLDFAST_TARGET_UNAVAILABLE);
    EXPECT_NE(context.error().find(backend.missing), std::string::npos) << context.error();
    EXPECT_EQ(Call(0, kDLCPU).run(context), HOLDFAST_OK) << "tensors on the CPU are computed all the same: " << context.error();
}

}  // namespace

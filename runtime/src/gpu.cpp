#include "gpu.h"

#include "chunk_table.h"
#include "cuda.h"
#include "opencl.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

namespace holdfast {
namespace {

constexpr halide_type_t bytes_type(halide_type_uint, 8);

/// Whether a host tensor is laid out as its copy on the device is.
bool packed_already(const Tensor &copied, const Tensor &host) {
    return std::equal(copied.stride, copied.stride + copied.rank, host.stride);
}

/// Between a host tensor and its elements in order.
void copy(char *packed, const Tensor &host, bool in) {
    int64_t index[Tensor::max_rank] = {};
    const int last = host.rank - 1;
    const int64_t element = host.dtype.bytes(), row = host.shape[last], stride = host.stride[last];
    const int64_t pieces = stride == 1 ? 1 : row, bytes = stride == 1 ? row * element : element;
    while (true) {
        char *from = host.data;
        for (int axis = 0; axis < last; axis++) from += index[axis] * host.stride[axis] * element;
        for (int64_t n = 0; n < pieces; n++, packed += bytes, from += stride * element)
            in ? std::memcpy(packed, from, bytes) : std::memcpy(from, packed, bytes);
        int axis = last - 1;
        while (axis >= 0 && ++index[axis] == host.shape[axis]) index[axis--] = 0;
        if (axis < 0) return;
    }
}

/// The caller's workspace, checked: its address.
uint64_t checked_workspace(const DLTensor &w, const Tensor &first, size_t needed, const char *size_function) {
    Backend backend;
    if (!backend_of(w.device.device_type, &backend) || backend != Backend::cuda || w.device.device_id != first.device.device_id)
        fail(HOLDFAST_INVALID_ARGUMENT, "workspace is on ", describe(w.device), "; expected ", describe(first.device), ", as ",
             first.name);
    if (w.ndim != 1 || !w.shape || w.dtype.code != kDLUInt || w.dtype.bits != 8 || w.dtype.lanes != 1 ||
        (w.strides && w.shape[0] > 1 && w.strides[0] != 1))
        fail(HOLDFAST_INVALID_ARGUMENT, "workspace has ", w.ndim,
             " dimensions, or another type than uint8, or gaps; expected compact uint8 [bytes]");
    if (w.shape[0] < 0 || (uint64_t)w.shape[0] < needed)
        fail(HOLDFAST_INVALID_ARGUMENT, "workspace has ", w.shape[0], " bytes; expected at least ", needed, ", as ",
             size_function, " says");
    const uint64_t address = (uint64_t)w.data + w.byte_offset;
    if (!w.data || address % Arena::alignment)
        fail(HOLDFAST_INVALID_ARGUMENT, "workspace is at address ", address, "; expected a multiple of ", Arena::alignment);
    return address;
}

/// What each API cannot do with tensors that are already there.
void check_place(const std::vector<const Tensor *> &tensors, const Place &place) {
    const Tensor &first = *tensors[0];
    if (first.on_host() || place.backend == Backend::cuda) return;
    if (place.backend == Backend::vulkan)
        fail(HOLDFAST_UNSUPPORTED, first.name, " is on ", describe(first.device),
             ", and buffers of other Vulkan devices than the library's own cannot be used; "
             "expected tensors on the CPU, with backend vulkan forced");
    if (place.backend == Backend::opencl && !place.stream)
        fail(HOLDFAST_INVALID_ARGUMENT, first.name, " is on ", describe(first.device),
             " and the context has no stream; expected holdfast_context_set_stream "
             "with a cl_command_queue of the buffers' cl_context");
    for (const Tensor *t : tensors)
        for (int axis = 0; axis < t->rank && !t->empty(); axis++)
            if (t->shape[axis] > 1 && t->stride[axis] < 0)
                fail(HOLDFAST_UNSUPPORTED, t->name, " has stride ", t->stride[axis], " on axis ", axis,
                     "; expected none below 0 on ", describe(t->device));
}

/// What a workspace's kernels find while a call lasts, also one that fails.
class Lent {
public:
    Lent(Workspace &workspace, DeviceCall &call) : workspace(workspace) { workspace.device = &call; }
    Lent(const Lent &) = delete;
    ~Lent() { workspace.device = nullptr; }

private:
    Workspace &workspace;
};

}  // namespace

int64_t span(const Tensor &t, std::initializer_list<int64_t> most) {
    if (!t.rank || t.empty()) return 0;
    int64_t elements = 1;
    for (int n = 0; n < t.rank; n++) {
        const int64_t extent = n < (int)most.size() ? std::min(most.begin()[n], t.shape[n]) : t.shape[n];
        elements += (extent - 1) * std::llabs(t.stride[n]);
    }
    return elements * t.dtype.bytes();
}

Part largest_part(Part part, const std::function<bool(int64_t batch, int64_t of_each)> &fits) {
    while (part.batch > 1 && !fits(part.batch, part.of_each)) part.batch = (part.batch + 1) / 2;
    while (part.of_each > 1 && !fits(part.batch, part.of_each)) part.of_each = (part.of_each + 1) / 2;
    return fits(part.batch, part.of_each) ? part : Part{0, 0};
}

void Run::check(const char *what, int rc) const {
    if (rc == 0) return;
    const std::string text = workspace.error.empty() ? "" : ": " + workspace.error;
    const bool memory = rc == halide_error_code_out_of_memory || rc == halide_error_code_device_malloc_failed ||
                        text.find("OUT_OF_MEMORY") != std::string::npos || text.find("ALLOCATION_FAILURE") != std::string::npos;
    const bool device = rc == halide_error_code_gpu_device_error || rc == halide_error_code_device_run_failed ||
                        rc == halide_error_code_copy_to_host_failed || rc == halide_error_code_copy_to_device_failed ||
                        rc == halide_error_code_device_sync_failed || rc == halide_error_code_generic_error;
    fail(memory   ? HOLDFAST_OUT_OF_MEMORY
         : device ? HOLDFAST_DEVICE_ERROR
                  : HOLDFAST_INTERNAL_ERROR,
         what, " on ", name_of(call.place.backend), " returned ", rc, text);
}

Memory::Memory(const Run &run, int64_t bytes) : run(run), own(true) {
    whole = {}, axis = {0, (int32_t)bytes, 1};
    whole.type = bytes_type, whole.dimensions = 1, whole.dim = &axis;
    if (bytes > most_bytes)
        fail(HOLDFAST_UNSUPPORTED, "a buffer of ", bytes, " bytes is wanted; expected at most ", most_bytes);
    run.check("allocation of device memory", halide_device_malloc(&run.workspace, &whole, run.interface()));
}

Memory::Memory(const Run &run, void *native) : run(run), own(false) {
    whole = {}, axis = {0, 0, 1};
    whole.type = bytes_type, whole.dimensions = 1, whole.dim = &axis;
    if (run.cuda())
        whole.device = (uint64_t)native, whole.device_interface = run.interface();
    else
        run.check("taking over a buffer",
                  run.interface()->wrap_native(&run.workspace, &whole, (uint64_t)native, run.interface()));
}

Memory::~Memory() {
    whole.set_device_dirty(false);
    if (own)
        halide_device_free(&run.workspace, &whole);
    else if (!run.cuda())
        run.interface()->detach_native(&run.workspace, &whole);
}

void Memory::copy_in(const void *host, int64_t bytes) {
    if (run.call.rehearsal) return;
    if (run.cuda()) return cuda::copy_in(whole.device, host, bytes, (CUstream)run.call.place.stream);
    axis.extent = (int32_t)bytes;
    whole.host = (uint8_t *)host;
    whole.set_host_dirty();
    run.check("copying to the device", run.interface()->copy_to_device(&run.workspace, &whole, run.interface()));
    whole.host = nullptr;
}

void Memory::copy_out(void *host, int64_t bytes) {
    if (run.call.rehearsal) return;
    if (run.cuda()) {
        cuda::copy_out(host, whole.device, bytes, (CUstream)run.call.place.stream);
        return cuda::wait((CUstream)run.call.place.stream);
    }
    axis.extent = (int32_t)bytes;
    whole.host = (uint8_t *)host;
    whole.set_device_dirty();
    run.check("copying from the device", run.interface()->copy_to_host(&run.workspace, &whole));
    whole.host = nullptr;
}

View::View(const Memory &memory, int64_t offset, halide_type_t element, std::initializer_list<halide_dimension_t> list)
    : Buffer(nullptr, element, list), memory(memory) {
    device = memory.whole.device, device_interface = memory.whole.device_interface;
    if (memory.run.cuda())
        device += offset;
    else if (offset)
        begin_at(offset);
}

void View::begin_at(int64_t offset) {
    // Kernels count from the beginning of the memory, as far as 32 bits reach: runtime/src/buffer_offset.cpp.
    int64_t last = offset / type.bytes();
    for (int axis = 0; axis < dimensions; axis++) last += (int64_t)std::max(axes[axis].extent - 1, 0) * axes[axis].stride;
    if (last <= most_bytes) {
        padding = (void *)(intptr_t)(offset / type.bytes());
        return;
    }
    // Beyond that it is a part of the buffer for the API too, which wants a multiple of something.
    const Place &place = memory.run.call.place;
    int64_t multiple = sizeof(float);
#if HOLDFAST_HAS_OPENCL
    if (place.backend == Backend::opencl) multiple = opencl::offset_alignment(place.context);
#endif
    // Halide counts in elements of the source: here those that the offset is a multiple of, so that 32 bits reach far.
    int32_t step = 128;
    while (offset % step) step /= 2;
    if (offset % multiple || offset / step > most_bytes)
        fail(HOLDFAST_UNSUPPORTED, "a tensor, or what one call of a kernel has of it, is at byte offset ", offset,
             " of its buffer, 2^31 elements or more from its beginning; expected a multiple of ", multiple, ", which ",
             name_of(place.backend), " demands there");
    halide_dimension_t from(0, 1, step), to((int32_t)(offset / step), 1, step);
    halide_buffer_t source = memory.whole, target = memory.whole;
    source.dim = &from, target.dim = &to;
    target.device = 0, target.device_interface = nullptr;
    memory.run.check("taking a part of a buffer",
                     source.device_interface->device_crop(&memory.run.workspace, &source, &target));
    device = target.device, device_interface = target.device_interface;
    cropped = true;
}

View::~View() {
    set_device_dirty(false);
    if (cropped) device_interface->device_release_crop(&memory.run.workspace, this);
}

OnDevice::OnDevice(const Run &run, const Tensor &tensor, bool read) : t(tensor) {
    if (!t.rank) return;
    if (!t.on_host()) {
        if (t.empty()) return;  // nobody asks where it is
        start = t.handle ? (int64_t)(intptr_t)t.data : 0;
        memory = std::make_unique<Memory>(run, t.handle ? t.handle : t.data);
        return;
    }
    int64_t count = 1;
    for (int axis = t.rank - 1; axis >= 0; axis--) t.stride[axis] = count, count *= t.shape[axis];
    const int64_t bytes = count * t.dtype.bytes();
    if (bytes > most_bytes)
        fail(HOLDFAST_UNSUPPORTED, t.name, " needs a buffer of ", bytes, " bytes on ", name_of(run.call.place.backend),
             "; expected at most ", most_bytes, ", or tensors there");
    memory = std::make_unique<Memory>(run, std::max<int64_t>(bytes, 1));
    if (!read || !count || run.call.rehearsal) return;
    if (packed_already(t, tensor)) {
        memory->copy_in(tensor.data, bytes);
    } else {
        Scratch packed(run.workspace, (bytes + 3) / 4);
        copy((char *)packed.floats(), tensor, true);
        memory->copy_in(packed.floats(), bytes);
        if (run.cuda()) cuda::wait((CUstream)run.call.place.stream);  // a caller's allocator may give memory that is read later
    }
}

void OnDevice::fetch(const Run &run, const Tensor &host) {
    if (!t.rank || !t.on_host() || host.empty() || run.call.rehearsal) return;
    const int64_t bytes = t.shape[0] * t.stride[0] * t.dtype.bytes();
    if (packed_already(t, host)) return memory->copy_out(host.data, bytes);
    Scratch packed(run.workspace, (bytes + 3) / 4);
    memory->copy_out(packed.floats(), bytes);
    copy((char *)packed.floats(), host, false);
}

int64_t OnDevice::at(int64_t i0, int64_t i1, int64_t i2) const {
    const int64_t index[] = {i0, i1, i2, 0};
    int64_t bytes = start;
    for (int axis = 0; axis < t.rank; axis++) bytes += index[axis] * t.stride[axis] * t.dtype.bytes();
    return bytes;
}

Tensor floats_of(const char *name, std::initializer_list<int64_t> shape) {
    Tensor t{name, f32, nullptr, {kDLCPU, 0}, nullptr, (int)shape.size(), {}, {}, 0, 0};
    std::copy(shape.begin(), shape.end(), t.shape);
    return t;
}

const char *size_function_of(const char *call) {
    return std::strcmp(call, "step") ? "holdfast_workspace_size" : "holdfast_step_workspace_size";
}

static bool in_place(const Tensor &final, const Tensor &initial) {
    return final.rank && initial.rank && same_elements(final, initial);
}

Operands::Operands(const Run &run, const Problem &p)
    : run(run), p(p), q(run, p.q, true), k(run, p.k, true), v(run, p.v, true), log_decay(run, p.log_decay, true),
      initial(run, p.initial_state, true), initial_sum(run, p.initial_sum, true), out(run, p.out, false),
      weights(run, p.weights, false),
      final(in_place(p.final_state, p.initial_state) ? initial : final_of_its_own.emplace(run, p.final_state, false)),
      final_sum(in_place(p.final_sum, p.initial_sum) ? initial_sum : final_sum_of_its_own.emplace(run, p.final_sum, false)) {}

void Operands::fetch() {
    out.fetch(run, p.out);
    final.fetch(run, p.final_state);
    final_sum.fetch(run, p.final_sum);
    weights.fetch(run, p.weights);
}

void Operands::pass_state(int64_t s, int64_t h, int64_t sequences, int64_t heads) const {
    const int32_t H = (int32_t)heads, N = (int32_t)sequences;
    for (auto [from, to] : {std::pair{&initial, &final}, {&initial_sum, &final_sum}}) {
        if (!to->t.rank || to == from) continue;
        const holdfast_expansion order = p.expansion;
        if (from->t.rank)
            convert(run, features_of(*from, s, h, H, N), order, features_of(*to, s, h, H, N), order);
        else
            clear(run, features_of(*to, s, h, H, N));
    }
}

void Operands::pass_states() {
    const Part part = largest_part(p, *this, 0, 0, p.packed() ? p.N : 1);
    if (!part.batch) fail(HOLDFAST_UNSUPPORTED, "the state of one head reaches beyond 2^31 bytes; expected less");
    const int64_t N = std::min(p.packed() ? p.N : part.batch, most_blocks);
    for (int64_t s = 0; s < p.N; s += N)
        for (int64_t h = 0; h < p.Hk; h += part.of_each)
            pass_state(s, h, std::min(N, p.N - s), std::min(part.of_each, p.Hk - h));
    fetch();
}

/// What counts of dlog_decay.
static const Tensor &of_tokens(const Tensor &dlog_decay) {
    static const Tensor none{};
    return dlog_decay.rank == 3 ? dlog_decay : none;
}

BackwardOperands::BackwardOperands(const Run &run, const BackwardProblem &p)
    : q(run, p.q, true), k(run, p.k, true), v(run, p.v, true), log_decay(run, p.log_decay, true),
      initial(run, p.initial_state, true), initial_sum(run, p.initial_sum, true),
      out(run, p.normalized ? p.out : Tensor{}, true), dout(run, p.dout, true), dfinal(run, p.dfinal_state, true),
      dfinal_sum(run, p.dfinal_sum, true), dq(run, p.dq, false), dk(run, p.dk, false), dv(run, p.dv, false),
      dlog_decay(run, of_tokens(p.dlog_decay), false), dinitial(run, p.dinitial_state, false),
      dinitial_sum(run, p.dinitial_sum, false) {}

void BackwardOperands::fetch(const Run &run, const BackwardProblem &p) {
    dq.fetch(run, p.dq), dk.fetch(run, p.dk), dv.fetch(run, p.dv), dlog_decay.fetch(run, p.dlog_decay);
    dinitial.fetch(run, p.dinitial_state), dinitial_sum.fetch(run, p.dinitial_sum);
}

DecaysPerHead::DecaysPerHead(const Run &run, const BackwardProblem &p) : run(run), p(p) {
    if (p.dlog_decay.rank != 1) return;
    if (!p.dlog_decay.on_host()) narrow(p.dlog_decay, 0, p.Hk);  // before anything is written
    if (const int64_t bytes = p.B * p.T * p.Hk * (int64_t)sizeof(float); bytes > most_bytes)
        fail(HOLDFAST_UNSUPPORTED, "dlog_decay is one per head, and those of all ", p.B * p.T,
             " tokens, which are added up, need a buffer of ", bytes, " bytes; expected at most ", most_bytes);
    of_tokens.emplace(run, floats_of("dlog_decay of every token", {p.B, p.T, p.Hk}), false);
}

View DecaysPerHead::part(const OnDevice &dlog_decay, const Memory &unwanted_row, int64_t b, int64_t start, int64_t t, int64_t h,
                         int32_t tokens, int32_t heads, int32_t entries) const {
    if (of_tokens) return decays_of(*of_tokens, nullptr, b, start + t, h, tokens, heads, entries);
    if (dlog_decay.t.rank) return decays_of(dlog_decay, nullptr, b, t, h, tokens, heads, entries);
    return View(unwanted_row, 0, float32, {{0, tokens, 0}, {0, heads, 0}, {0, entries, 0}});
}

void DecaysPerHead::finish() {
    if (!of_tokens) return;
    OnDevice sums(run, p.dlog_decay, false);
    const int32_t stride = narrow(sums.t, 0, p.Hk);
    // Those of as many batch entries and heads as a grid of blocks takes; then of these parts.
    const int64_t parts = p.T ? (p.B + most_blocks - 1) / most_blocks : 0;
    std::optional<OnDevice> of_parts;
    if (parts > 1) of_parts.emplace(run, floats_of("dlog_decay of every part", {1, parts, p.Hk}), false);
    for (int64_t h = 0; h < p.Hk; h += most_blocks) {
        const int32_t H = (int32_t)std::min(most_blocks, p.Hk - h);
        auto sum = [&](View &&gradients, View &&to) {
            run.check("sum_decays", run.variant.target->sum_decays(&run.workspace, &gradients, &to));
        };
        auto result = [&] { return View(*sums.memory, sums.at(h), float32, {{0, H, stride}}); };
        if (parts == 0) clear(run, View(*sums.memory, sums.at(h), float32, {{0, H, stride}, {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}));
        for (int64_t n = 0; n < parts; n++) {
            const int64_t b = n * most_blocks;
            sum(decays_of(*of_tokens, nullptr, b, 0, h, (int32_t)p.T, H, (int32_t)std::min(most_blocks, p.B - b)),
                parts == 1 ? result() : View(*of_parts->memory, of_parts->at(0, n, h), float32, {{0, H, 1}}));
        }
        if (parts > 1) sum(decays_of(*of_parts, nullptr, 0, 0, h, (int32_t)parts, H, 1), result());
    }
    sums.fetch(run, p.dlog_decay);
}

bool writes_nothing(const BackwardProblem &p) { return !p.Hk || (!p.N && p.dlog_decay.rank != 1); }

/// Make all elements of a tensor on the device zero.
static void clear(const Run &run, const Tensor &tensor) {
    if (tensor.empty()) return;
    OnDevice x(run, tensor, false);
    Tensor &t = x.t;  // with four axes, of which the first two are the tensor's where it has more than one
    while (t.rank < Tensor::max_rank) {
        const int axis = t.rank > 1 ? t.rank - 1 : 0;
        std::copy_backward(t.shape + axis, t.shape + t.rank, t.shape + t.rank + 1);
        std::copy_backward(t.stride + axis, t.stride + t.rank, t.stride + t.rank + 1);
        t.shape[axis] = 1, t.stride[axis] = 0, t.rank++;
    }
    const halide_type_t type = t.dtype == f32 ? float32 : halide_type_t(halide_type_uint, 16);
    each_part({&x}, [&](int64_t i, int64_t j, int64_t entries, int64_t rows) {
        clear(run, View(*x.memory, x.at(i, j), type,
                        {{0, (int32_t)t.shape[3], narrow(t, 3, t.shape[3])},
                         {0, (int32_t)t.shape[2], narrow(t, 2, t.shape[2])},
                         {0, (int32_t)rows, narrow(t, 1, rows)},
                         {0, (int32_t)entries, narrow(t, 0, entries)}}));
    });
}

GpuCall gradient_call(const Variant &variant, const BackwardProblem &p, std::function<void(const Run &)> issue) {
    return {variant, p.all_tensors(),
            [&p, issue = std::move(issue)](const Run &run) {
                for (const Tensor &zero : p.zeros) clear(run, zero);
                issue(run);
            },
            p.workspace, "holdfast_backward_workspace_size"};
}

/// Of zeros alone: any variant will do, whose target has what clears them.
static GpuCall clear_call(const BackwardProblem &p, const Choice &choice) {
    const std::vector<Variant> &all = variants();
    const auto variant = std::find_if(all.begin(), all.end(), [&](const Variant &v) {
        return choice.forced ? v.target == choice.forced : v.target->backend == choice.backend;
    });
    return gradient_call(*variant, p, [](const Run &) {});
}

void clear_on_gpu(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    if (!p.zeros.empty()) clear_call(p, choice).run(c);
}

size_t clear_workspace_on_gpu(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    if (given.zeros.empty()) return 0;
    const BackwardProblem p = nearest(given);
    return clear_call(p, choice).workspace(c);
}

std::vector<int64_t> longest_first(const BackwardProblem &p) {
    std::vector<int64_t> order(p.packed() ? p.N : 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.length(a) > p.length(b); });
    return order;
}

/// Only `extent` elements of an axis, from `from` on.
static void cut(Tensor &t, int axis, int64_t from, int64_t extent) {
    if (!t.rank || t.empty()) return;
    t.data += from * t.stride[axis] * t.dtype.bytes();
    t.shape[axis] = extent;
    if (extent == 0) t.low = t.high = 0;
}

Problem sequence_of(Problem p, int64_t s) {
    const int64_t start = p.start(s), length = p.length(s);
    for (Tensor *rows : {&p.q, &p.k, &p.v, &p.out}) cut(*rows, 1, start, length);
    if (p.log_decay.rank == 3) cut(p.log_decay, 1, start, length);
    for (Tensor *states : {&p.initial_state, &p.final_state, &p.initial_sum, &p.final_sum}) cut(*states, 0, s, 1);
    cut(p.weights, 2, start, length);
    p.T = length, p.N = 1, p.starts.clear();
    return p;
}

BackwardProblem sequence_of(const BackwardProblem &given, int64_t s) {
    BackwardProblem p = given;
    static_cast<Problem &>(p) = sequence_of(static_cast<const Problem &>(given), s);
    const int64_t start = given.start(s), length = given.length(s);
    for (Tensor *rows : {&p.dout, &p.dq, &p.dk, &p.dv}) cut(*rows, 1, start, length);
    if (p.dlog_decay.rank == 3) cut(p.dlog_decay, 1, start, length);
    for (Tensor *states : {&p.dfinal_state, &p.dfinal_sum, &p.dinitial_state, &p.dinitial_sum}) cut(*states, 0, s, 1);
    return p;
}

/// Batch entries are an axis of a grid of blocks, heads of queries another.
static bool blocks_fit(const Problem &p, int64_t batch, int64_t heads) {
    return (batch == 1 || batch <= most_blocks) && (heads == 1 || heads * std::max<int64_t>(p.group(), 1) <= most_blocks);
}

Part largest_part(const Problem &p, const Operands &x, int64_t tokens, int64_t bytes_of_a_head, int64_t sequences) {
    auto fits = [&](int64_t batch, int64_t heads) {
        if (!blocks_fit(p, batch, heads)) return false;
        int64_t most = 0;
        for (const OnDevice *rows : {&x.k, &x.v}) most = std::max(most, span(rows->t, {batch, tokens, heads}));
        for (const OnDevice *rows : {&x.q, &x.out}) most = std::max(most, span(rows->t, {batch, tokens, heads * p.group()}));
        for (const OnDevice *states : {&x.initial, (const OnDevice *)&x.final, &x.initial_sum, (const OnDevice *)&x.final_sum})
            most = std::max(most, span(states->t, {std::max(batch, sequences), heads}));
        most = std::max(most, span(x.weights.t, {batch, heads * p.group()}));
        const Tensor &g = x.log_decay.t;
        most = std::max(most, g.rank == 3 ? span(g, {batch, tokens, heads}) : span(g, {heads}));
        return most <= most_bytes && (double)bytes_of_a_head * batch * heads <= (double)most_bytes;
    };
    return largest_part({p.B, p.Hk}, fits);
}

Part largest_part(const BackwardProblem &p, const BackwardOperands &x, int64_t tokens, int64_t bytes_of_a_head,
                  int64_t sequences) {
    return largest_part({p.B, p.Hk}, [&](int64_t batch, int64_t heads) {
        if (!blocks_fit(p, batch, heads)) return false;
        int64_t most = 0;
        for (const OnDevice *rows : {&x.k, &x.v, &x.dk, &x.dv}) most = std::max(most, span(rows->t, {batch, tokens, heads}));
        for (const OnDevice *rows : {&x.q, &x.out, &x.dout, &x.dq})
            most = std::max(most, span(rows->t, {batch, tokens, heads * p.group()}));
        for (const OnDevice *states : {&x.initial, &x.initial_sum, &x.dfinal, &x.dfinal_sum, &x.dinitial, &x.dinitial_sum})
            most = std::max(most, span(states->t, {std::max(batch, sequences), heads}));
        for (const OnDevice *g : {&x.log_decay, &x.dlog_decay})
            most = std::max(most, g->t.rank == 3 ? span(g->t, {batch, tokens, heads}) : span(g->t, {heads}));
        return most <= most_bytes && (double)bytes_of_a_head * (double)batch * (double)heads <= (double)most_bytes;
    });
}

void each_part(const std::vector<const OnDevice *> &tensors,
               const std::function<void(int64_t b, int64_t t, int64_t entries, int64_t tokens)> &run) {
    const int64_t B = tensors[0]->t.shape[0], T = tensors[0]->t.shape[1];
    const Part part = largest_part({std::min(B, most_blocks), std::min(T, most_blocks)}, [&](int64_t entries, int64_t tokens) {
        return std::all_of(tensors.begin(), tensors.end(), [&](const OnDevice *x) {
            return (x->t.rank > 1 ? span(x->t, {entries, tokens}) : span(x->t, {tokens})) <= most_bytes;
        });
    });
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, tensors[0]->t.name, " and the other tensors reach beyond 2^31 bytes within one token");
    for (int64_t b = 0; b < B; b += part.batch)
        for (int64_t t = 0; t < T; t += part.of_each) run(b, t, std::min(part.batch, B - b), std::min(part.of_each, T - t));
}

int32_t narrow(const Tensor &t, int axis, int64_t extent) {
    if (extent <= 1) return 0;
    if (t.stride[axis] > most_bytes || t.stride[axis] < -most_bytes)
        fail(HOLDFAST_UNSUPPORTED, t.name, " has stride ", t.stride[axis], " on axis ", axis,
             "; expected less than 2^31 either way");
    return (int32_t)t.stride[axis];
}

void fill_chunk_table(const Run &run, const Memory &memory, int64_t bytes, int64_t tokens, int64_t chunk, int64_t count) {
    View table(memory, 0, int32, {{0, (int32_t)(bytes / 4), 1}});
    run.check("chunk_table", run.variant.target->chunk_table(&run.workspace, (int32_t)chunk, (int32_t)count, (int32_t)count + 1,
                                                             0, 0, 0, (int32_t)tokens, (int32_t)count, &table));
}

void fill_chunk_table(const Run &run, const Memory &memory, int64_t bytes, const std::vector<int64_t> &starts, int64_t chunk) {
    if (run.call.rehearsal) return;  // it takes no memory
    View table(memory, 0, int32, {{0, (int32_t)(bytes / 4), 1}});
    const int32_t sequences = (int32_t)starts.size() - 1, count = chunks_of(starts, chunk);
    int32_t chunks = 0;
    for (int32_t before = 0; before < sequences; before += packed_at_once) {
        std::array<int32_t, chunk_table_numbers(packed_at_once)> numbers = {
            (int32_t)chunk, count, count + sequences, before, (int32_t)starts[before], chunks};
        int32_t *token_end = &numbers[chunk_table_numbers(0)], *chunk_end = token_end + packed_at_once;
        for (int32_t s = before; s < before + packed_at_once; s++) {  // behind the last one, empty ones
            const int64_t end = starts[std::min(s + 1, sequences)];
            chunks += (int32_t)((end - starts[std::min(s, sequences)] + chunk - 1) / chunk);
            *token_end++ = (int32_t)end, *chunk_end++ = chunks;
        }
        auto call = [&](auto... n) { return run.variant.target->packed_chunk_table(&run.workspace, n..., &table); };
        run.check("packed_chunk_table", std::apply(call, numbers));
    }
}

View rows_of(const OnDevice &r, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads, int32_t entries) {
    return View(*r.memory, r.at(b, t, h), halide_type(r.t.dtype),
                {{0, (int32_t)r.t.shape[3], 1},
                 {0, tokens, narrow(r.t, 1, tokens)},
                 {0, heads, narrow(r.t, 2, heads)},
                 {0, entries, narrow(r.t, 0, entries)}});
}

View groups_of(const OnDevice &r, int64_t group, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads,
               int32_t entries) {
    const int32_t G = (int32_t)group;
    return View(*r.memory, r.at(b, t, h * group), halide_type(r.t.dtype),
                {{0, (int32_t)r.t.shape[3], 1},
                 {0, tokens, narrow(r.t, 1, tokens)},
                 {0, G, narrow(r.t, 2, group)},
                 {0, heads, narrow(r.t, 2, heads) * G},
                 {0, entries, narrow(r.t, 0, entries)}});
}

View decays_of(const OnDevice &g, const Zeros *none, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads,
               int32_t entries) {
    if (none) return View(none->memory, none->offset, float32, {{0, tokens, 0}, {0, heads, 0}, {0, entries, 0}});
    if (g.t.rank == 1)
        return View(*g.memory, g.at(h), float32, {{0, tokens, 0}, {0, heads, narrow(g.t, 0, heads)}, {0, entries, 0}});
    return View(
        *g.memory, g.at(b, t, h), float32,
        {{0, tokens, narrow(g.t, 1, tokens)}, {0, heads, narrow(g.t, 2, heads)}, {0, entries, narrow(g.t, 0, entries)}});
}

View features_of(const OnDevice &s, int64_t b, int64_t h, int32_t heads, int32_t entries) {
    const bool state = s.t.rank == 4;
    const int32_t V = state ? (int32_t)s.t.shape[3] : 1;
    return View(*s.memory, s.at(b, h), float32,
                {{0, V, state ? narrow(s.t, 3, V) : 0},
                 {0, (int32_t)s.t.shape[2], narrow(s.t, 2, s.t.shape[2])},
                 {0, heads, narrow(s.t, 1, heads)},
                 {0, entries, narrow(s.t, 0, entries)}});
}

View sums_of(const OnDevice &s, int64_t b, int64_t h, int32_t heads, int32_t entries) {
    return View(*s.memory, s.at(b, h), float32,
                {{0, (int32_t)s.t.shape[2], narrow(s.t, 2, s.t.shape[2])},
                 {0, heads, narrow(s.t, 1, heads)},
                 {0, entries, narrow(s.t, 0, entries)}});
}

void convert(const Run &run, View &&from, holdfast_expansion order, View &&to, holdfast_expansion wanted, Of of) {
    int32_t how = order == wanted ? 0 : wanted == HOLDFAST_EXPANSION_TILED ? 1 : 2;  // FeatureOrder of generators/expansion.h,
    if (how && of == Of::gradients) how += 2;                                        // in which those of gradients follow
    run.check("convert_state", run.variant.target->convert_state(&run.workspace, &from, how, &to));
}

void clear(const Run &run, View &&to) {
    if (to.type.bits == 16) return run.check("clear_16", run.variant.target->clear_16(&run.workspace, &to));
    Memory zero(run, Arena::alignment);
    fill_chunk_table(run, zero, Arena::alignment, 0, 1, 0);  // of no chunks: zeros
    View from(zero, 0, float32,
              {{0, to.axes[0].extent, 0}, {0, to.axes[1].extent, 0}, {0, to.axes[2].extent, 0}, {0, to.axes[3].extent, 0}});
    convert(run, std::move(from), HOLDFAST_EXPANSION_TIGHT, std::move(to), HOLDFAST_EXPANSION_TIGHT);
}

/// The elements of its last axis alone in places of their own; of decays none.
static void bring_near(Tensor &t, bool decays = false) {
    std::fill_n(t.stride, t.rank, 0);
    if (t.rank && !decays) t.stride[t.rank - 1] = 1;
}

Problem with_queries(Problem p) {
    if (p.H == 0 && p.Hk > 0) p.q = p.k, p.H = p.Hk, p.out = p.weights = {};
    return p;
}

Problem nearest(Problem p) {
    if (p.q.on_host()) return p;
    for (Tensor *t : {&p.q, &p.k, &p.v, &p.out, &p.initial_state, &p.final_state, &p.initial_sum, &p.final_sum, &p.weights})
        bring_near(*t);
    bring_near(p.log_decay, true);
    return p;
}

BackwardProblem nearest(const BackwardProblem &given) {
    BackwardProblem p = given;
    if (p.q.on_host()) return p;
    static_cast<Problem &>(p) = nearest(static_cast<const Problem &>(given));
    for (Tensor *t : {&p.dout, &p.dfinal_state, &p.dfinal_sum, &p.dq, &p.dk, &p.dv, &p.dinitial_state, &p.dinitial_sum})
        bring_near(*t);
    for (Tensor &zero : p.zeros) bring_near(zero);
    bring_near(p.dlog_decay, true);
    return p;
}

size_t GpuCall::rehearse(Workspace &workspace) const {
    Arena arena(Arena::alignment, std::numeric_limits<size_t>::max() / 2);
    DeviceCall call{Place{Backend::cuda}, &arena, nullptr, true};
    const Lent while_it_lasts(workspace, call);
    issue({variant, workspace, call});
    return arena.most();
}

size_t GpuCall::workspace(holdfast_context &c) const {
    size_t bytes = 0;
    if (variant.target->backend == Backend::cuda) c.on_gpu([&](Workspace &workspace) { bytes = rehearse(workspace); });
    return bytes;
}

void GpuCall::run(holdfast_context &c) const {
    const Tensor &first = *tensors[0];
    Place place{variant.target->backend, nullptr, c.stream};
    c.on_gpu([&](Workspace &workspace) {
        workspace.error.clear();
        if (place.backend == Backend::cuda) {
            const size_t needed = rehearse(workspace);
            const CUcontext context = cuda::choose_context((CUcontext)c.device, (CUstream)c.stream,
                                                           first.on_host() ? cuda::any_device : first.device.device_id);
            const cuda::Current current(context);
            place.context = context, place.id = cuda::id_of(context), place.thread = cuda::thread_of((CUstream)c.stream);
            uint64_t memory = 0;
            if (lent) {
                memory = checked_workspace(*lent, first, needed, size_function);
            } else if (needed) {
                workspace.device_memory.move_to(place);
                memory = workspace.device_memory.block(needed);
            }
            Arena arena(memory, needed);
            DeviceCall call{place, &arena};
            const Lent while_it_lasts(workspace, call);
            issue({variant, workspace, call});
            return;
        }
#if HOLDFAST_HAS_OPENCL
        if (place.backend == Backend::opencl && place.stream) place.context = opencl::context_of(place.stream);
#endif
        if (place.backend != Backend::opencl) place.stream = nullptr;
        check_place(tensors, place);
        workspace.device_memory.move_to(place);
        DeviceCall call{place, nullptr, &workspace.device_memory};
        const Lent while_it_lasts(workspace, call);
        std::lock_guard<std::mutex> lock(call_mutex(place.backend));
        const Run run{variant, workspace, call};
        workspace.device_memory.begin();
        issue(run);
        if (!first.on_host() && place.backend == Backend::metal)
            run.check("waiting for the device", halide_device_sync_global(&workspace, run.interface()));
        workspace.device_memory.finish(&workspace);
    });
}

}  // namespace holdfast

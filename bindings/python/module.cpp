// Python module `_holdfast`: lends the memory of Python's arrays to holdfast.h, without a copy, and turns statuses into
// exceptions. Signatures, defaults and documentation are the package's (holdfast/__init__.py).
#include <holdfast/holdfast.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#if !defined(DLPACK_MAJOR_VERSION) || DLPACK_MAJOR_VERSION < 1
#error "The Python module needs the dlpack.h of DLPack 1.0 or newer, such as the PyPI package apache-tvm-ffi carries"
#endif

namespace py = pybind11;

namespace {

/// Raise `type` with `parts` one after the other; an error that is set already becomes its cause.
template<class... Parts>
[[noreturn]] void raise(PyObject *type, const Parts &...parts) {
    std::ostringstream text;
    (text << ... << parts);
    if (PyErr_Occurred())
        py::raise_from(type, text.str().c_str());
    else
        PyErr_SetString(type, text.str().c_str());
    throw py::error_already_set();
}

/// Python objects that live as long as the process. Made once; never freed, for the interpreter may be gone by then.
struct Constants {
    py::object target_unavailable = py::reinterpret_steal<py::object>(
        PyErr_NewExceptionWithDoc("holdfast.TargetUnavailable",
                                  "The forced target (HOLDFAST_TARGET, set_target) or backend is unknown, or this machine "
                                  "cannot run it, or that of the arrays.",
                                  PyExc_RuntimeError, nullptr));
    py::str dlpack = "__dlpack__", dlpack_device = "__dlpack_device__", exchange_api = "__dlpack_c_exchange_api__";
    py::str requires_grad = "requires_grad";
    py::tuple version = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    py::tuple keywords = py::make_tuple("max_version", "copy"),
              keywords_of_a_gpu = py::make_tuple("max_version", "copy", "stream");
    py::str stream = "stream";
    py::object empty = numpy("empty"), ndarray = numpy("ndarray");
    py::object float32 = numpy("float32"), float16 = numpy("float16"), uint16 = numpy("uint16");
    py::str dtype = "dtype";

    static py::object numpy(const char *name) { return py::module_::import("numpy").attr(name); }
};
const Constants &constants() {
    static const Constants *const all = new Constants;
    return *all;
}

/// A text of the library in terms of Python: each of these words by another.
std::string translated(const std::string &text, std::initializer_list<std::pair<const char *, const char *>> words) {
    auto in_word = [](char c) { return std::isalnum((unsigned char)c) || c == '_'; };
    std::string result;
    for (size_t at = 0, end; at < text.size(); at = end) {
        for (end = at + 1; in_word(text[at]) && end < text.size() && in_word(text[end]);) end++;
        std::string word = text.substr(at, end - at);
        for (auto [from, to] : words)
            if (word == from) {
                word = to;
                break;
            }
        result += word;
    }
    return result;
}

[[noreturn]] void raise_status(holdfast_status status, const std::string &text) {
    PyObject *type = status == HOLDFAST_INVALID_ARGUMENT     ? PyExc_ValueError
                     : status == HOLDFAST_UNSUPPORTED        ? PyExc_NotImplementedError
                     : status == HOLDFAST_TARGET_UNAVAILABLE ? constants().target_unavailable.ptr()
                     : status == HOLDFAST_OUT_OF_MEMORY      ? PyExc_MemoryError
                                                             : PyExc_RuntimeError;
    const bool of_arguments = status == HOLDFAST_INVALID_ARGUMENT || status == HOLDFAST_UNSUPPORTED;
    raise(type, of_arguments ? translated(text, {{"NULL", "None"}, {"HOLDFAST_EXPANSION_TILED", "'tiled'"}}) : text);
}

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// ---- Arrays ------------------------------------------------------------------------------------------------------------

/// The element type that a buffer's format stands for ("f", "<f", "@d"); bits = 0 for one that DLPack has no name for.
DLDataType element_type(const char *format, Py_ssize_t bytes) {
    if (!format) format = "B";
    if (*format && std::strchr("@=<", *format)) format++;  // byte orders that are the machine's: kernels are little-endian
    const char letter = *format && !format[1] ? *format : 0;
    auto is = [&](const char *letters) { return letter && std::strchr(letters, letter); };
    const int code = is("efdg") ? kDLFloat : is("bhilqn") ? kDLInt : is("cBHILQN") ? kDLUInt : is("?") ? kDLBool : -1;
    return code < 0 ? DLDataType{0, 0, 0} : DLDataType{(uint8_t)code, (uint8_t)(8 * bytes), 1};
}

constexpr DLDataType float32 = {kDLFloat, 32, 1}, float16 = {kDLFloat, 16, 1}, bfloat16 = {kDLBfloat, 16, 1};
bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

/// What the library takes for the argument of that name.
std::string expected_dtypes(const std::string &name) {
    static const char *const rows[] = {"q", "k", "v", "x", "gate", "out", "weights", "dout", "dx", "dgate", "dq", "dk", "dv"};
    static const char *const integers[] = {"positions", "cu_seqlens"};
    auto is_of = [&](const auto &names) { return std::find(std::begin(names), std::end(names), name) != std::end(names); };
    return is_of(rows) ? "float32, float16 or bfloat16" : is_of(integers) ? "int32 or int64" : "float32";
}

/// The bits of a NumPy array of ml_dtypes' bfloat16, as uint16; null for anything else. NumPy exports no such array, neither
/// as a buffer nor by DLPack; its dtype is known by its name, so that ml_dtypes need not be there.
py::object bits_of_bfloat16(py::handle array) {
    const Constants &c = constants();
    if (!py::isinstance(array, c.ndarray)) return {};
    const py::object dtype = array.attr(c.dtype);
    if (std::string(py::str(dtype.attr("name"))) != "bfloat16" || dtype.attr("itemsize").cast<int>() != 2) return {};
    return array.attr("view")(c.uint16);
}

/// NumPy's capsule of `bits`, an array of uint16, as one of bfloat16.
py::object bfloat16_capsule(const py::object &bits, const py::kwargs &options) {
    py::object capsule = bits.attr(constants().dlpack)(**options);
    if (void *versioned = PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")) {
        ((DLManagedTensorVersioned *)versioned)->dl_tensor.dtype = bfloat16;
    } else {
        PyErr_Clear();
        void *managed = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
        if (!managed) throw py::error_already_set();
        ((DLManagedTensor *)managed)->dl_tensor.dtype = bfloat16;
    }
    return capsule;
}

/// An array argument as a DLTensor. Keeps the memory alive, and its exporter from resizing it, for as long as it lives.
class Array {
public:
    Array() = default;
    Array(const Array &) = delete;
    ~Array() {
        if (view.obj) PyBuffer_Release(&view);
        if (exchanged && exchanged->deleter) exchanged->deleter(exchanged);
    }

    /// `rank` is what the library expects; it only serves to describe a tensor that its producer does not export. `stream`,
    /// for memory of CUDA: where work with it will be put, as DLPack numbers streams; its producer makes that one wait.
    void borrow(const char *name, py::handle array, int rank, bool writable = false, uint64_t stream = 1) {
        this->stream = stream;
        const bool is_buffer = PyObject_CheckBuffer(array.ptr());
        if (is_buffer && PyObject_GetBuffer(array.ptr(), &view, PyBUF_RECORDS_RO) == 0)
            borrow_buffer(name, writable);
        else if (!(is_buffer ? borrow_bfloat16(name, array, writable) : exchange(name, array, writable)))
            borrow_dlpack(name, array, rank, writable);
        given = true;
    }

    DLTensor *get() { return given ? &tensor : nullptr; }

private:
    DLTensor tensor{};
    bool given = false;
    Py_buffer view{};
    py::object capsule;
    DLManagedTensorVersioned *exchanged = nullptr;
    uint64_t stream = 1;
    int64_t shape[PyBUF_MAX_NDIM], strides[PyBUF_MAX_NDIM];

    void borrow_buffer(const char *name, bool writable) {
        if (writable && view.readonly) raise(PyExc_ValueError, name, " is read-only; expected memory to write to");
        const DLDataType type = element_type(view.format, view.itemsize);
        if (!type.bits)
            raise(PyExc_NotImplementedError, name, " has elements of buffer format '", view.format, "'; expected ",
                  expected_dtypes(name));
        tensor = {view.buf, {kDLCPU, 0}, view.ndim, type, shape, view.strides ? strides : nullptr, 0};  // ctypes: null, compact
        for (int axis = 0; axis < view.ndim; axis++) {
            shape[axis] = view.shape[axis];
            if (!view.strides) continue;
            strides[axis] = view.strides[axis] / view.itemsize;
            if (view.strides[axis] % view.itemsize && shape[axis] > 1)
                raise(PyExc_ValueError, name, " has a stride of ", view.strides[axis], " bytes on axis ", axis,
                      "; expected a multiple of ", view.itemsize);
        }
    }

    /// Whether it was one: bits_of_bfloat16().
    bool borrow_bfloat16(const char *name, py::handle array, bool writable) {
        py::object bits;
        {
            const py::error_scope refusal;  // of the buffer protocol
            bits = bits_of_bfloat16(array);
        }
        if (!bits) return false;
        PyErr_Clear();
        if (PyObject_GetBuffer(bits.ptr(), &view, PyBUF_RECORDS_RO) != 0) throw py::error_already_set();
        borrow_buffer(name, writable);
        tensor.dtype = bfloat16;
        return true;
    }

    /// By the C functions of the array's type, which DLPack has from 1.3 on (PyTorch): no Python runs, and a tensor takes a tenth of the
    /// time that its __dlpack__() takes. Whether it was borrowed; where it was not, borrow_dlpack() does it, or says what is wrong.
    bool exchange(const char *name, py::handle array, bool writable) {
#if DLPACK_MAJOR_VERSION > 1 || DLPACK_MINOR_VERSION >= 3
        const Constants &c = constants();
        const py::error_scope keep;  // nothing that fails here is an error
        const auto table =
            py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject *)Py_TYPE(array.ptr()), c.exchange_api.ptr()));
        if (!table || !PyCapsule_IsValid(table.ptr(), "dlpack_exchange_api")) return false;
        const auto *api = (const DLPackExchangeAPI *)PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api");
        const auto requires_grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(array.ptr(), c.requires_grad.ptr()));
        if (api->header.version.major != DLPACK_MAJOR_VERSION || requires_grad.ptr() == Py_True ||
            api->managed_tensor_from_py_object_no_sync(array.ptr(), &exchanged) != 0)
            return false;
        const DLDevice device = exchanged->dl_tensor.device;
        if (device.device_type != kDLCPU) {  // no stream is made to wait here: those of one stream alone need none
            void *current = nullptr;
            if (device.device_type != kDLCUDA ||
                api->current_work_stream(device.device_type, device.device_id, &current) != 0 ||
                (current ? (uint64_t)(uintptr_t)current : 1) != stream)
                return false;
        }
        take(name, *exchanged, writable);
        return true;
#else
        return (void)name, (void)array, (void)writable, false;
#endif
    }

    void borrow_dlpack(const char *name, py::handle array, int rank, bool writable) {
        export_capsule(name, array);
        if (!capsule) {
            // The library's own answer about the device is wanted, and it has all the rest to say yes to.
            std::fill_n(shape, rank, 0);
            tensor = {nullptr, tensor.device, rank, float32, shape, nullptr, 0};
        } else if (auto *versioned = (DLManagedTensorVersioned *)pointer("dltensor_versioned")) {
            take(name, *versioned, writable);
        } else if (auto *managed = (DLManagedTensor *)pointer("dltensor")) {
            tensor = managed->dl_tensor;
        } else {
            raise(PyExc_TypeError, name, " is of type ", type_name(array), ", whose __dlpack__ returned an object of type ",
                  type_name(capsule), "; expected a capsule that holds a DLPack tensor");
        }
    }

    void take(const char *name, const DLManagedTensorVersioned &versioned, bool writable) {
        if (versioned.version.major != DLPACK_MAJOR_VERSION)
            raise(PyExc_BufferError, name, " is exported as DLPack ", versioned.version.major, ".", versioned.version.minor,
                  "; expected ", DLPACK_MAJOR_VERSION);
        if (writable && versioned.flags & DLPACK_FLAG_BITMASK_READ_ONLY)
            raise(PyExc_ValueError, name, " is read-only; expected memory to write to");
        if (writable && versioned.flags & DLPACK_FLAG_BITMASK_IS_COPIED)
            raise(PyExc_ValueError, name, " exports a copy of itself; expected its own memory, to write to");
        tensor = versioned.dl_tensor;
    }

    // The capsule is not marked as used: its own destructor gives the tensor back when we let go of it.
    void *pointer(const char *capsule_name) const {
        return PyCapsule_IsValid(capsule.ptr(), capsule_name) ? PyCapsule_GetPointer(capsule.ptr(), capsule_name) : nullptr;
    }

    /// Sets `capsule`, or, for a tensor of another device that is not exported, tensor.device alone.
    void export_capsule(const char *name, py::handle array) {
        const Constants &c = constants();
        std::optional<py::error_already_set> refusal;
        if (PyErr_Occurred()) refusal.emplace();  // of the buffer protocol, which names fewer dtypes than DLPack
        if (py::hasattr(array, c.dlpack)) {
            on_cpu(array);
            const bool has_streams = tensor.device.device_type == kDLCUDA || tensor.device.device_type == kDLCUDAManaged;
            const py::int_ number(stream);
            PyObject *arguments[] = {array.ptr(), c.version.ptr(), Py_False, number.ptr()};
            capsule = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(
                c.dlpack.ptr(), arguments, 1, (has_streams ? c.keywords_of_a_gpu : c.keywords).ptr()));
            if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer from before DLPack 1.0
                PyErr_Clear();
                const py::tuple keyword = py::make_tuple(c.stream);
                PyObject *old[] = {array.ptr(), number.ptr()};
                capsule = py::reinterpret_steal<py::object>(
                    PyObject_VectorcallMethod(c.dlpack.ptr(), old, 1, has_streams ? keyword.ptr() : nullptr));
            }
            if (capsule) return;
            refusal.emplace();
            if (!refusal->matches(PyExc_Exception)) throw *refusal;  // Ctrl-C
        }
        if (!refusal)
            raise(PyExc_TypeError, name, " is of type ", type_name(array), "; expected an array (buffer protocol or DLPack)");

        // Not exported: say why, with the producer's own error as the cause.
        auto explain = [&](PyObject *type, const auto &...parts) {
            refusal->restore();
            raise(type, name, parts...);
        };
        if (py::getattr(array, "requires_grad", py::none()).ptr() == Py_True)
            explain(PyExc_NotImplementedError, " requires grad; expected ", name,
                    ".detach(), or holdfast.torch, which differentiates");
        if (!on_cpu(array)) return;
        const py::object dtype = py::getattr(array, "dtype", py::none());
        const std::string dtype_name = dtype.is_none() ? "float32" : py::str(dtype), expected = expected_dtypes(name);
        const std::string type = dtype_name.substr(dtype_name.rfind('.') + 1);  // torch.float32
        if (expected.find(type) == std::string::npos)
            explain(PyExc_NotImplementedError, " has dtype ", dtype_name, "; expected ", expected);
        explain(PyExc_TypeError, " is of type ", type_name(array),
                ", which does not share its memory; expected an array that does");
    }

    /// Whether the array says that it is in the CPU's memory, or nothing. Sets tensor.device.
    bool on_cpu(py::handle array) {
        tensor.device = {kDLCPU, 0};
        try {
            const py::tuple device = array.attr(constants().dlpack_device)();
            tensor.device = {(DLDeviceType)device[0].cast<int>(), device[1].cast<int>()};
        } catch (const std::exception &) {  // no such method, or a broken one
        }
        return tensor.device.device_type == kDLCPU;
    }
};

// ---- Settings ----------------------------------------------------------------------------------------------------------

/// What Python has set, for all threads. Touched only by who holds the GIL.
struct Settings {
    int version = 0;  // counts changes
    int threads = 0;
    std::optional<std::string> target, backend;
    py::object listener;
    py::object allocate;  // null: contexts allocate
};
Settings &settings() {
    static Settings *const all = new Settings;
    return *all;
}

// ---- The GIL -----------------------------------------------------------------------------------------------------------

/// Where a thread may wait for the GIL. A daemon thread that does so while Python exits is ended by unwinding its stack, and
/// C++ calls that a crash. It waits for the end of the process instead, as Python itself has it from 3.14 on.
struct WaitForGil {
    bool waiting = true;
    ~WaitForGil() {
        while (waiting) pause();
    }
};

/// Pass a kernel call's line on to the listener of set_verbose. The call goes on whatever that raises.
void call_verbose(void *, const char *message) {
    WaitForGil wait;
    const PyGILState_STATE gil = PyGILState_Ensure();
    if (PyObject *listener = settings().listener.inc_ref().ptr()) {  // null: taken away by another thread since
        PyObject *result = PyObject_CallFunction(listener, "s", message);
        if (!result) PyErr_WriteUnraisable(listener);
        Py_XDECREF(result);
        Py_DECREF(listener);
    }
    PyGILState_Release(gil);
    wait.waiting = false;
}

/// A call of the library, with other Python threads running meanwhile.
template<class Args>
holdfast_status without_gil(holdfast_status (*function)(holdfast_context *, const Args *), holdfast_context *context,
                            const Args &args) {
    PyThreadState *thread = PyEval_SaveThread();
    const holdfast_status status = function(context, &args);
    WaitForGil wait;
    PyEval_RestoreThread(thread);
    wait.waiting = false;
    return status;
}

// ---- Contexts ----------------------------------------------------------------------------------------------------------

/// A context and the version of the settings that it has.
struct ThreadContext {
    holdfast_context *context = nullptr;
    int version = 0;
    ~ThreadContext() { holdfast_context_destroy(context); }
};

/// The calling thread's context, with the settings of now. One for each thread: they run at once.
holdfast_context *context() {
    thread_local ThreadContext mine;
    if (!mine.context) mine.context = holdfast_context_create();
    if (!mine.context) raise(PyExc_MemoryError, "out of memory");
    const Settings &wanted = settings();
    if (mine.version != wanted.version) {
        for (holdfast_status status :
             {holdfast_context_set_threads(mine.context, wanted.threads),
              holdfast_context_set_target(mine.context, wanted.target ? wanted.target->c_str() : nullptr),
              holdfast_context_set_backend(mine.context, wanted.backend ? wanted.backend->c_str() : nullptr),
              holdfast_context_set_verbose(mine.context, wanted.listener ? call_verbose : nullptr, nullptr)})
            if (status) raise_status(status, holdfast_last_error(mine.context));
        mine.version = wanted.version;
    }
    return mine.context;
}

void set_num_threads(int threads) {
    holdfast_context *c = context();
    if (holdfast_status status = holdfast_context_set_threads(c, threads)) raise_status(status, holdfast_last_error(c));
    settings().threads = threads;
    settings().version++;
}

void set_backend(std::optional<std::string> backend) {
    holdfast_context *c = context();
    if (holdfast_status status = holdfast_context_set_backend(c, backend ? backend->c_str() : nullptr))
        raise_status(status, holdfast_last_error(c));
    settings().backend = std::move(backend);
    settings().version++;
}

void set_target(std::optional<std::string> target) {
    holdfast_context *c = context();
    if (holdfast_status status = holdfast_context_set_target(c, target ? target->c_str() : nullptr))
        raise_status(status, holdfast_last_error(c));
    settings().target = std::move(target);
    settings().version++;
}

void set_verbose(py::object listener) {
    settings().version++;
    std::swap(settings().listener, listener);
    if (settings().listener.is_none()) settings().listener = py::object();
}

// ---- Functions ---------------------------------------------------------------------------------------------------------

float scale_argument(py::handle scale) {
    if (scale.is_none()) return 0;  // the library's K^-1/2
    const double value = PyFloat_AsDouble(scale.ptr());
    if (PyErr_Occurred())
        raise(PyExc_TypeError, "scale is of type ", type_name(scale), "; expected a number, or None for K^-1/2");
    if ((float)value == 0 || (std::isinf((float)value) && std::isfinite(value)))  // of NaN and infinity the library says it
        raise(PyExc_ValueError, "scale is ", value, "; expected a float32 other than 0, or None for K^-1/2");
    return (float)value;
}

int64_t chunk_size_argument(py::handle chunk_size) {
    if (chunk_size.is_none()) return 0;                                      // the library's choice
    const Py_ssize_t value = PyNumber_AsSsize_t(chunk_size.ptr(), nullptr);  // clips: any bound beyond is as good
    if (PyErr_Occurred()) raise(PyExc_TypeError, "chunk_size is of type ", type_name(chunk_size), "; expected an int, or None");
    if (value < 1)
        raise(PyExc_ValueError, "chunk_size is ", std::string(py::str(chunk_size)), "; expected at least 1, or None");
    return value;
}

/// Whether q, k and v have shapes, of `rank` axes, from which those of the outputs follow: the library refuses all others.
bool shapes_agree(int rank, const DLTensor &q, const DLTensor &k, const DLTensor &v) {
    for (const DLTensor *tensor : {&q, &k, &v})
        if (tensor->ndim != rank || !tensor->shape) return false;
    auto small = [](int64_t extent) { return extent >= 0 && extent <= std::numeric_limits<int32_t>::max(); };
    const int last = rank - 1, heads = rank - 2;
    return std::equal(q.shape, q.shape + heads, k.shape) && q.shape[last] == k.shape[last] &&
           std::equal(k.shape, k.shape + last, v.shape) && std::all_of(q.shape, q.shape + rank, small) &&
           small(k.shape[heads]) && small(v.shape[last]);
}

/// A new NumPy array for elements of that type, of bfloat16 for their bits, in uint16.
template<class... Extents>
py::object empty_array(DLDataType type, Extents... extents) {
    const Constants &c = constants();
    const py::object &dtype = same(type, float16) ? c.float16 : same(type, bfloat16) ? c.uint16 : c.float32;
    return c.empty(py::make_tuple(extents...), dtype);
}

/// Stands in, where q is, for an `out` whose shape is not known, so that the library gets as far as saying what is wrong.
struct Nowhere {
    int64_t shape[4] = {};
    DLTensor tensor;
    Nowhere(int rank, const DLTensor &q) : tensor{nullptr, q.device, rank, q.dtype, shape, nullptr, 0} {}
};

// ---- Memory of CUDA ------------------------------------------------------------------------------------------------------

/// Workspace for a call on CUDA, where set_cuda_allocator has said who allocates: alive as long as this.
class Workspace {
public:
    template<class Args>
    Workspace(Args &args, holdfast_status (*size_of)(holdfast_context *, const Args *, size_t *), holdfast_context *context,
              uint64_t stream) {
        const DLDevice device = args.q->device;
        if (!settings().allocate || device.device_type != kDLCUDA) return;
        size_t bytes = 0;
        if (holdfast_status status = size_of(context, &args, &bytes)) raise_status(status, holdfast_last_error(context));
        if (bytes) memory = settings().allocate(bytes, device.device_id, stream);
        if (!memory || memory.is_none()) return;
        array.borrow("workspace", memory, 1, true, stream);
        args.workspace = array.get();
    }

private:
    py::object memory;
    Array array;
};

/// `allocate(bytes, device, stream)` returns memory on that CUDA device, an array of uint8, for a call in that stream, as DLPack numbers
/// streams; or None, for contexts to allocate, as without it.
void set_cuda_allocator(py::object allocate) { settings().allocate = allocate.is_none() ? py::object() : std::move(allocate); }

/// Numbers of holdfast_forward_args; of its enumerations, those of holdfast.h. Without it: all 0.
struct Options {
    int32_t degree = 0, normalize = 0, form = 0, state_layout = 0, expansion = 0;
    bool sums = false, weights = false;
    int64_t state_interval = 0;

    explicit Options(py::handle tuple) {
        if (tuple.is_none()) return;
        const py::tuple t = py::reinterpret_borrow<py::tuple>(tuple);
        int32_t *const numbers[] = {&degree, &normalize, &form, &state_layout, &expansion};
        for (int n = 0; n < 5; n++) *numbers[n] = t[n].cast<int32_t>();
        sums = t[6].cast<bool>(), weights = t[7].cast<bool>();  // 5: D, for Python's own use
        state_interval = t[8].cast<int64_t>();
    }

    /// D.
    int64_t expanded_size(int64_t key_size) const {
        return degree > 1 ? holdfast_state_size(key_size, degree, expansion) : key_size;
    }
};

/// How many `states` there are of sequences of cu_seqlens, or of B of T tokens; of what the library refuses any number.
int64_t number_of_states(const DLTensor *cu_seqlens, int64_t B, int64_t T, int64_t interval) {
    auto of = [&](int64_t tokens) { return std::max<int64_t>(tokens, 0) / interval + (tokens % interval > 0) + 1; };
    if (!cu_seqlens) return B * of(T);
    const bool wide = cu_seqlens->dtype.bits == 64;
    if (cu_seqlens->ndim != 1 || cu_seqlens->device.device_type != kDLCPU || (!wide && cu_seqlens->dtype.bits != 32)) return 0;
    auto at = [&](int64_t n) -> int64_t {
        const char *first = (const char *)cu_seqlens->data + cu_seqlens->byte_offset;
        n *= cu_seqlens->strides ? cu_seqlens->strides[0] : 1;
        return wide ? ((const int64_t *)first)[n] : ((const int32_t *)first)[n];
    };
    int64_t sum = 0;
    for (int64_t n = 1; n < cu_seqlens->shape[0]; n++) sum += of(std::min(at(n), T) - std::max<int64_t>(at(n - 1), 0));
    return sum;
}

/// (out, state, sum of keys, states, weights), None for what is not wanted, or out where that is all: NumPy arrays, except for those
/// that are given. New ones of bfloat16 are its bits, in uint16. `stream` is of CUDA, as DLPack numbers them.
py::object forward(py::handle q, py::handle k, py::handle v, py::handle log_decay, py::handle scale, py::handle chunk_size,
                   py::handle initial_state, bool return_state, py::object out, py::object final_state, uint64_t stream,
                   py::handle initial_sum, py::handle cu_seqlens, py::handle options, py::object final_sum, py::object weights,
                   py::object states) {
    const Options o(options);
    Array initial_sum_array, cu_seqlens_array, final_sum_array, weights_array, states_array;
    Array q_array, k_array, v_array, log_decay_array, initial_state_array, out_array, final_state_array;
    q_array.borrow("q", q, 4, false, stream);
    k_array.borrow("k", k, 4, false, stream);
    v_array.borrow("v", v, 4, false, stream);
    if (!log_decay.is_none()) log_decay_array.borrow("log_decay", log_decay, 1, false, stream);
    if (!initial_state.is_none()) initial_state_array.borrow("initial_state", initial_state, 4, false, stream);
    if (!out.is_none()) out_array.borrow("out", out, 4, true, stream);
    if (!final_state.is_none()) final_state_array.borrow("final_state", final_state, 4, true, stream);
    if (!initial_sum.is_none()) initial_sum_array.borrow("initial_sum_of_keys", initial_sum, 3, false, stream);
    if (!cu_seqlens.is_none()) cu_seqlens_array.borrow("cu_seqlens", cu_seqlens, 1, false, stream);
    if (!final_sum.is_none()) final_sum_array.borrow("final_sum_of_keys", final_sum, 3, true, stream);
    if (!weights.is_none()) weights_array.borrow("weights", weights, 4, true, stream);
    if (!states.is_none()) states_array.borrow("states", states, 4, true, stream);

    holdfast_forward_args args = {};
    args.struct_size = sizeof args;
    args.q = q_array.get();
    args.k = k_array.get();
    args.v = v_array.get();
    args.log_decay = log_decay_array.get();
    args.initial_state = initial_state_array.get();
    args.scale = scale_argument(scale);
    args.chunk_size = chunk_size_argument(chunk_size);
    args.degree = o.degree, args.normalize = o.normalize, args.form = o.form;
    args.state_layout = o.state_layout, args.expansion = o.expansion;
    args.initial_sum_of_keys = initial_sum_array.get();
    args.cu_seqlens = cu_seqlens_array.get();

    const DLDataType type = args.q->dtype;
    Nowhere nowhere(4, *args.q);
    if (shapes_agree(4, *args.q, *args.k, *args.v)) {
        const int64_t *shape = args.q->shape, V = args.v->shape[3], Hk = args.k->shape[2];
        const int64_t D = o.expanded_size(shape[3]);
        const bool packed = args.cu_seqlens && args.cu_seqlens->ndim == 1 && args.cu_seqlens->shape[0] > 0;
        const int64_t N = packed ? args.cu_seqlens->shape[0] - 1 : shape[0];
        auto make = [&](const char *name, py::object &array, Array &borrowed, DLDataType of, auto... extents) {
            array = empty_array(of, extents...);
            borrowed.borrow(name, array, 4, true);
            borrowed.get()->dtype = of;
        };
        if (out.is_none()) make("out", out, out_array, type, shape[0], shape[1], shape[2], V);
        const bool value_major = o.state_layout == HOLDFAST_STATE_VALUE_MAJOR;
        if (return_state && final_state.is_none())
            make("final_state", final_state, final_state_array, float32, N, Hk, value_major ? V : D, value_major ? D : V);
        if (return_state && o.sums && final_sum.is_none())
            make("final_sum_of_keys", final_sum, final_sum_array, float32, N, Hk, D);
        if (o.weights && weights.is_none())
            make("weights", weights, weights_array, type, shape[0], shape[2], shape[1], shape[1]);
        if (o.state_interval > 0 && states.is_none()) {
            const int64_t M = number_of_states(args.cu_seqlens, shape[0], shape[1], o.state_interval);
            make("states", states, states_array, float32, M, Hk, value_major ? V : D, value_major ? D : V);
        }
    }
    args.out = out_array.get() ? out_array.get() : &nowhere.tensor;
    args.final_state = final_state_array.get();
    args.final_sum_of_keys = final_sum_array.get();
    args.weights = weights_array.get();
    args.states = states_array.get(), args.state_interval = o.state_interval;

    holdfast_context *c = context();
    holdfast_context_set_stream(c, args.q->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    const Workspace workspace(args, holdfast_workspace_size, c, stream);
    if (holdfast_status status = without_gil(holdfast_forward, c, args)) raise_status(status, holdfast_last_error(c));
    if (!return_state && !o.weights && !o.state_interval) return out;
    return py::make_tuple(out, final_state, final_sum, states, weights);
}

/// The gradients of q, k, v, log_decay, the initial state and its sum of keys, of which bit n of `wanted` asks for the n-th: NumPy
/// arrays as from forward(), None for the others. `given` is None, or a tuple of six in which those that are not None are written and
/// returned instead.
py::object backward(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle log_decay, py::handle out,
                    py::handle scale, py::handle chunk_size, py::handle initial_state, py::handle initial_sum,
                    py::handle dfinal_state, py::handle dfinal_sum, py::handle cu_seqlens, int wanted, py::handle given,
                    py::handle options, uint64_t stream, py::handle states) {
    const Options o(options);
    Array states_array, dout_array, q_array, k_array, v_array, log_decay_array, out_array, initial_state_array,
        initial_sum_array;
    Array dfinal_state_array, dfinal_sum_array, cu_seqlens_array, made[6];
    auto borrow = [&](Array &array, const char *name, py::handle given, int rank) {
        if (!given.is_none()) array.borrow(name, given, rank, false, stream);
        return array.get();
    };
    holdfast_backward_args args = {};
    args.struct_size = sizeof args;
    q_array.borrow("q", q, 4, false, stream), k_array.borrow("k", k, 4, false, stream);
    v_array.borrow("v", v, 4, false, stream);
    args.q = q_array.get(), args.k = k_array.get(), args.v = v_array.get(), args.dout = borrow(dout_array, "dout", dout, 4);
    args.log_decay = borrow(log_decay_array, "log_decay", log_decay, 1);
    args.out = borrow(out_array, "out", out, 4);
    args.initial_state = borrow(initial_state_array, "initial_state", initial_state, 4);
    args.initial_sum_of_keys = borrow(initial_sum_array, "initial_sum_of_keys", initial_sum, 3);
    args.dfinal_state = borrow(dfinal_state_array, "dfinal_state", dfinal_state, 4);
    args.dfinal_sum_of_keys = borrow(dfinal_sum_array, "dfinal_sum_of_keys", dfinal_sum, 3);
    args.cu_seqlens = borrow(cu_seqlens_array, "cu_seqlens", cu_seqlens, 1);
    args.states = borrow(states_array, "states", states, 4), args.state_interval = o.state_interval;
    args.scale = scale_argument(scale), args.chunk_size = chunk_size_argument(chunk_size);
    args.degree = o.degree, args.normalize = o.normalize, args.form = o.form;
    args.state_layout = o.state_layout, args.expansion = o.expansion;

    py::object gradients[6] = {py::none(), py::none(), py::none(), py::none(), py::none(), py::none()};
    DLTensor *tensors[6] = {};
    const bool per_head = args.log_decay && args.log_decay->ndim == 1;
    if (!given.is_none()) {
        static constexpr const char *names[] = {"dq", "dk", "dv", "dlog_decay", "dinitial_state", "dinitial_sum_of_keys"};
        const int ranks[] = {4, 4, 4, per_head ? 1 : 3, 4, 3};
        const py::tuple arrays = py::reinterpret_borrow<py::tuple>(given);
        for (int n = 0; n < 6; n++) {
            gradients[n] = arrays[n];
            if (gradients[n].is_none()) continue;
            made[n].borrow(names[n], gradients[n], ranks[n], true, stream);
            tensors[n] = made[n].get();
        }
    }
    // Where shapes do not agree the library says so before it asks for gradients; of arrays on a GPU all are given.
    if (shapes_agree(4, *args.q, *args.k, *args.v) && args.q->device.device_type == kDLCPU) {
        const int64_t *shape = args.q->shape, B = shape[0], T = shape[1], Hk = args.k->shape[2], V = args.v->shape[3];
        const int64_t D = o.expanded_size(shape[3]);
        const bool packed = args.cu_seqlens && args.cu_seqlens->ndim == 1 && args.cu_seqlens->shape[0] > 0;
        const int64_t N = packed ? args.cu_seqlens->shape[0] - 1 : B;
        const bool value_major = o.state_layout == HOLDFAST_STATE_VALUE_MAJOR;
        auto make = [&](int n, const char *name, DLDataType of, auto... extents) {
            if (tensors[n] || !(wanted >> n & 1)) return;
            gradients[n] = empty_array(of, extents...);
            made[n].borrow(name, gradients[n], 4, true);
            tensors[n] = made[n].get();
            tensors[n]->dtype = of;
        };
        make(0, "dq", args.q->dtype, B, T, shape[2], shape[3]);
        make(1, "dk", args.q->dtype, B, T, Hk, shape[3]);
        make(2, "dv", args.q->dtype, B, T, Hk, V);
        per_head ? make(3, "dlog_decay", float32, Hk) : make(3, "dlog_decay", float32, B, T, Hk);
        make(4, "dinitial_state", float32, N, Hk, value_major ? V : D, value_major ? D : V);
        make(5, "dinitial_sum_of_keys", float32, N, Hk, D);
    }
    args.dq = tensors[0], args.dk = tensors[1], args.dv = tensors[2], args.dlog_decay = tensors[3];
    args.dinitial_state = tensors[4], args.dinitial_sum_of_keys = tensors[5];

    holdfast_context *c = context();
    holdfast_context_set_stream(c, args.q->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    const Workspace workspace(args, holdfast_backward_workspace_size, c, stream);
    if (holdfast_status status = without_gil(holdfast_backward, c, args)) raise_status(status, holdfast_last_error(c));
    return py::make_tuple(gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]);
}

/// out: a NumPy array as from forward(), except for one that is given. The state and the sum of keys are updated in place. `stream` as for
/// forward().
py::object step(py::handle q, py::handle k, py::handle v, py::handle log_decay, py::handle state, py::handle scale,
                py::object out, uint64_t stream, py::handle sum_of_keys, int32_t degree, int32_t normalize,
                int32_t state_layout, int32_t expansion) {
    Array sum_array;
    if (!sum_of_keys.is_none()) sum_array.borrow("sum_of_keys", sum_of_keys, 3, true, stream);
    Array q_array, k_array, v_array, log_decay_array, state_array, out_array;
    q_array.borrow("q", q, 3, false, stream);
    k_array.borrow("k", k, 3, false, stream);
    v_array.borrow("v", v, 3, false, stream);
    if (!log_decay.is_none()) log_decay_array.borrow("log_decay", log_decay, 1, false, stream);
    state_array.borrow("state", state, 4, true, stream);
    if (!out.is_none()) out_array.borrow("out", out, 3, true, stream);

    holdfast_step_args args = {};
    args.struct_size = sizeof args;
    args.q = q_array.get();
    args.k = k_array.get();
    args.v = v_array.get();
    args.log_decay = log_decay_array.get();
    args.state = state_array.get();
    args.scale = scale_argument(scale);
    args.sum_of_keys = sum_array.get();
    args.degree = degree, args.normalize = normalize;
    args.state_layout = state_layout, args.expansion = expansion;

    const DLDataType type = args.q->dtype;
    Nowhere nowhere(3, *args.q);
    if (out.is_none() && shapes_agree(3, *args.q, *args.k, *args.v)) {
        out = empty_array(type, args.q->shape[0], args.q->shape[1], args.v->shape[2]);
        out_array.borrow("out", out, 3, true);
        out_array.get()->dtype = type;
    }
    args.out = out_array.get() ? out_array.get() : &nowhere.tensor;

    holdfast_context *c = context();
    holdfast_context_set_stream(c, args.q->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    const Workspace workspace(args, holdfast_step_workspace_size, c, stream);
    if (holdfast_status status = without_gil(holdfast_step, c, args)) raise_status(status, holdfast_last_error(c));
    return out;
}

/// Makes `out`, unless it is given, a new array of the shape and type of x, and borrows it. For an x of another rank than 4, or 1 and 2
/// of weights, which the library refuses, there is none.
void borrow_out(Array &array, py::object &out, const DLTensor &x, uint64_t stream, const char *name = "out",
                bool of_weight = false) {
    const bool given = !out.is_none();
    auto small = [](int64_t extent) { return extent >= 0 && extent <= std::numeric_limits<int32_t>::max(); };
    if (!given) {
        if (of_weight ? x.ndim != 1 && x.ndim != 2 : x.ndim != 4) return;
        if (!x.shape || !std::all_of(x.shape, x.shape + x.ndim, small)) return;
        out = x.ndim == 1   ? empty_array(x.dtype, x.shape[0])
              : x.ndim == 2 ? empty_array(x.dtype, x.shape[0], x.shape[1])
                            : empty_array(x.dtype, x.shape[0], x.shape[1], x.shape[2], x.shape[3]);
    }
    array.borrow(name, out, of_weight ? 1 : 4, true, stream);
    if (!given) array.get()->dtype = x.dtype;
}

/// Rotation, of x to out, or its gradient, of dout to dx. out: a NumPy array as from forward(), except for one that is given.
/// `stream` as for forward().
py::object turn(bool backward, py::handle x, py::handle theta, int64_t offset, py::handle positions, bool interleaved,
                py::object out, uint64_t stream) {
    Array x_array, theta_array, positions_array, out_array;
    x_array.borrow(backward ? "dout" : "x", x, 4, false, stream);
    theta_array.borrow("theta", theta, 1, false, stream);
    if (!positions.is_none()) positions_array.borrow("positions", positions, 1, false, stream);
    borrow_out(out_array, out, *x_array.get(), stream, backward ? "dx" : "out");
    const DLTensor *from = x_array.get();
    Nowhere nowhere(4, *from);
    DLTensor *to = out_array.get() ? out_array.get() : &nowhere.tensor;

    holdfast_context *c = context();
    holdfast_context_set_stream(c, from->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    auto run = [&](auto function, auto args) {
        args.struct_size = sizeof args;
        args.theta = theta_array.get();
        args.positions = positions_array.get();
        args.offset = offset;
        args.interleaved = interleaved;
        if (holdfast_status status = without_gil(function, c, args)) raise_status(status, holdfast_last_error(c));
    };
    if (backward) {
        holdfast_rotate_backward_args args = {};
        args.dout = from, args.dx = to;
        run(holdfast_rotate_backward, args);
    } else {
        holdfast_rotate_args args = {};
        args.x = from, args.out = to;
        run(holdfast_rotate, args);
    }
    return out;
}

py::object rotate(py::handle x, py::handle theta, int64_t offset, py::handle positions, bool interleaved, py::object out,
                  uint64_t stream) {
    return turn(false, x, theta, offset, positions, interleaved, std::move(out), stream);
}

py::object rotate_backward(py::handle dout, py::handle theta, int64_t offset, py::handle positions, bool interleaved,
                           py::object dx, uint64_t stream) {
    return turn(true, dout, theta, offset, positions, interleaved, std::move(dx), stream);
}

/// out: as from rotate(). Which order the state has follows from its D.
py::object convert_state(int64_t key_size, py::handle state, int expansion, py::object out) {
    Array state_array, out_array;
    state_array.borrow("state", state, 4);
    const DLTensor &from = *state_array.get();
    if (from.ndim != 3 && from.ndim != 4)
        raise(PyExc_ValueError, "state has ", from.ndim, " dimensions; expected 4, [N, Hk, D, V], or 3, [N, Hk, D]");
    const int64_t *shape = from.shape, D = holdfast_state_size(key_size, 2, expansion);
    const int tiled = HOLDFAST_EXPANSION_TILED;
    const bool is_tiled = shape[2] == holdfast_state_size(key_size, 2, tiled);
    if (out.is_none())
        out = from.ndim == 3 ? empty_array(float32, shape[0], shape[1], D)
                             : empty_array(float32, shape[0], shape[1], D, shape[3]);
    out_array.borrow("out", out, from.ndim, true);
    holdfast_context *c = context();
    if (holdfast_status status =
            holdfast_convert_state(c, key_size, &from, is_tiled ? tiled : HOLDFAST_EXPANSION_TIGHT, out_array.get(), expansion))
        raise_status(status, translated(holdfast_last_error(c), {{"from", "state"}, {"to", "out"}}));
    return out;
}

/// out: as from rotate().
py::object head_norm_gate(py::handle x, py::handle gate, py::handle weight, bool layer_norm, double eps, py::object out,
                          uint64_t stream) {
    Array x_array, gate_array, weight_array, out_array;
    x_array.borrow("x", x, 4, false, stream);
    if (!gate.is_none()) gate_array.borrow("gate", gate, 4, false, stream);
    if (!weight.is_none()) weight_array.borrow("weight", weight, 1, false, stream);
    borrow_out(out_array, out, *x_array.get(), stream);

    holdfast_head_norm_gate_args args = {};
    args.struct_size = sizeof args;
    args.x = x_array.get();
    args.gate = gate_array.get();
    args.weight = weight_array.get();
    args.norm = layer_norm ? HOLDFAST_NORM_LAYER : HOLDFAST_NORM_RMS;
    args.eps = (float)eps;
    Nowhere nowhere(4, *args.x);
    args.out = out_array.get() ? out_array.get() : &nowhere.tensor;

    holdfast_context *c = context();
    holdfast_context_set_stream(c, args.x->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    if (holdfast_status status = without_gil(holdfast_head_norm_gate, c, args)) raise_status(status, holdfast_last_error(c));
    return out;
}

/// gradients: of x, gate and weight; each None: not wanted, True: made, as from rotate(), or given. They are returned.
py::tuple head_norm_gate_backward(py::handle dout, py::handle x, py::handle gate, py::handle weight, bool layer_norm,
                                  double eps, const py::tuple &gradients, uint64_t stream) {
    Array dout_array, x_array, gate_array, weight_array, arrays[3];
    dout_array.borrow("dout", dout, 4, false, stream);
    x_array.borrow("x", x, 4, false, stream);
    if (!gate.is_none()) gate_array.borrow("gate", gate, 4, false, stream);
    if (!weight.is_none()) weight_array.borrow("weight", weight, 1, false, stream);
    py::object results[3];
    const char *const names[] = {"dx", "dgate", "dweight"};
    for (int n = 0; n < 3; n++) {
        results[n] = gradients[n];
        if (results[n].is_none()) continue;
        const bool made = results[n].is(py::bool_(true));
        if (made) results[n] = py::none();
        borrow_out(arrays[n], results[n], n == 2 && made ? *weight_array.get() : *x_array.get(), stream, names[n], n == 2);
    }

    holdfast_head_norm_gate_backward_args args = {};
    args.struct_size = sizeof args;
    args.x = x_array.get();
    args.gate = gate_array.get();
    args.weight = weight_array.get();
    args.dout = dout_array.get();
    args.dx = arrays[0].get();
    args.dgate = arrays[1].get();
    args.dweight = arrays[2].get();
    args.norm = layer_norm ? HOLDFAST_NORM_LAYER : HOLDFAST_NORM_RMS;
    args.eps = (float)eps;

    holdfast_context *c = context();
    holdfast_context_set_stream(c, args.x->device.device_type == kDLCPU ? nullptr : (void *)(uintptr_t)stream);
    if (holdfast_status status = without_gil(holdfast_head_norm_gate_backward, c, args))
        raise_status(status, holdfast_last_error(c));
    return py::make_tuple(results[0], results[1], results[2]);
}

std::vector<holdfast_backend> all_backends() {
    std::vector<holdfast_backend> list(holdfast_backend_count());
    for (int n = 0; n < (int)list.size(); n++) {
        list[n].struct_size = sizeof list[n];
        if (holdfast_status status = holdfast_backend_at(n, &list[n])) raise_status(status, holdfast_last_error(nullptr));
    }
    return list;
}

/// One dict for each backend.
py::dict backends() {
    py::dict dict;
    for (const holdfast_backend &b : all_backends()) {
        py::dict backend;
        backend["compiled"] = b.compiled != 0;
        backend["available"] = b.available != 0;
        backend["why_not"] = b.missing;
        backend["devices"] = py::str(b.devices).attr("splitlines")();
        backend["targets"] = py::str(b.targets).attr("split")();
        dict[b.name] = backend;
    }
    return dict;
}

/// ([one dict for each variant], why none of them runs: "" where they do).
py::tuple variants() {
    py::list list;
    std::string why_not;
    std::set<std::string> gpu_targets;
    for (const holdfast_backend &backend : all_backends()) {
        std::istringstream names(backend.targets);
        for (std::string name; std::string(backend.name) != "cpu" && names >> name;) gpu_targets.insert(name);
    }
    holdfast_context *c = context();
    for (int n = 0; n < holdfast_variant_count(); n++) {
        holdfast_variant v;
        const holdfast_status status = holdfast_variant_at(c, n, &v);
        if (status == HOLDFAST_TARGET_UNAVAILABLE)
            why_not = holdfast_last_error(c);
        else if (status)
            raise_status(status, holdfast_last_error(c));
        py::dict variant;
        variant["name"] = v.name;
        variant["kernel"] = v.kernel;
        variant["dtype"] = v.dtype;
        variant["chunk"] = v.chunk;
        variant["key_size"] = v.key_size;
        variant["value_size"] = v.value_size;
        variant["target"] = v.target;
        variant["row_alignment"] = v.row_alignment;
        variant["degree"] = v.degree;
        variant["round_operands"] = v.round_operands != 0;
        variant["runs_here"] = v.runs_here != 0;
        variant["selected"] = v.selected != 0;
        const py::str missing = v.missing;
        variant["missing"] =
            gpu_targets.count(v.target) && !v.runs_here ? py::list(py::make_tuple(missing)) : py::list(missing.attr("split")());
        list.append(variant);
    }
    return py::make_tuple(list, why_not);
}

}  // namespace

PYBIND11_MODULE(_holdfast, m) {
    m.attr("TargetUnavailable") = constants().target_unavailable;
    m.def("forward", forward);
    m.def("backward", backward);
    m.def("bfloat16_capsule", bfloat16_capsule);
    m.def("step", step);
    m.def("rotate", rotate);
    m.def("rotate_backward", rotate_backward);
    m.def("convert_state", convert_state);
    m.def("state_size", holdfast_state_size);
    m.def("state_interval", [](int64_t key_size, int64_t value_size, bool wide) {
        return holdfast_state_interval(key_size, value_size, wide ? float32 : float16);
    });
    m.def("head_norm_gate", head_norm_gate);
    m.def("head_norm_gate_backward", head_norm_gate_backward);
    m.def("backends", backends);
    m.def("variants", variants);
    m.def("version", holdfast_version);
    m.def("cpu_features", holdfast_cpu_features);
    m.def("set_cuda_allocator", set_cuda_allocator);
    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", [] { return settings().threads; });
    m.def("set_backend", set_backend);
    m.def("set_target", set_target);
    m.def("set_verbose", set_verbose);
}

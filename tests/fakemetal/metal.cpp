// A stand-in for the parts of Apple's Objective-C runtime and Metal framework that Halide's Metal runtime uses, so that that
// runtime, the generated host code and the very MSL text that ships run on Linux. MSL is compiled with the host's C++ compiler
// against ./metal_stdlib; the thread groups of a kernel run one after another (threadgroup.h).
//
// It is stricter than a GPU: new device and threadgroup memory holds NaN, command buffers run as late as they may, and what a
// device or the framework would refuse or leave undefined ends the process. docs/testing-without-hardware.md says what
// remains unproved.
//
//   FAKEMETAL_ORDER         forward (default), reverse or shuffle: of threads between barriers, and of groups
//   FAKEMETAL_DROP_BARRIER  n: leave out barrier n of each MSL text, counted from 0; ends the process where there are fewer
//   FAKEMETAL_TRACE         1: print every dispatch
#include "threadgroup.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

namespace fakemetal {

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("fakemetal: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    std::fflush(nullptr);
    std::abort();
}

namespace {

std::string setting(const char *name, const char *otherwise = "") {
    const char *value = std::getenv(name);
    return value && *value ? value : otherwise;
}

// ---- Objects --------------------------------------------------------------------------------------------------------

enum class Kind {
    any,
    class_,
    string,
    pool,
    options,
    device,
    queue,
    command_buffer,
    encoder,
    blit,
    buffer,
    library,
    function,
    pipeline,
    error
};

struct Object {
    const Kind kind;
    long references = 1;
    explicit Object(Kind kind) : kind(kind) {}
    Object(const Object &) = delete;
    virtual ~Object() = default;
};

Object *retain(Object *object) {
    if (object) object->references++;
    return object;
}
void release(Object *object) {
    if (!object || object->kind == Kind::class_) return;
    if (--object->references == 0) delete object;
}

/// A counted reference.
template<class T>
class Reference {
public:
    Reference(T *object = nullptr) : object((T *)retain(object)) {}
    Reference(const Reference &other) : Reference(other.object) {}
    Reference &operator=(Reference other) {
        std::swap(object, other.object);
        return *this;
    }
    ~Reference() { release(object); }
    T *operator->() const { return object; }
    T *get() const { return object; }

private:
    T *object;
};

struct Class : Object {
    std::string name;
    explicit Class(const char *name) : Object(Kind::class_), name(name) {}
};
struct String : Object {
    std::string text;
    explicit String(std::string text = "", Kind kind = Kind::string) : Object(kind), text(std::move(text)) {}
};
struct Buffer : Object {
    std::vector<char> memory;
    explicit Buffer(size_t bytes) : Object(Kind::buffer), memory(bytes, (char)0xff) {}  // NaN, and no likely index
};
struct Library : Object {
    void *handle;
    explicit Library(void *handle) : Object(Kind::library), handle(handle) {}
};
struct Function : Object {
    std::string name;
    Launch launch;
    int buffers;
    Reference<Library> library;
    Function(const std::string &name, Launch launch, Library *library)
        : Object(Kind::function), name(name), launch(launch), library(library) {
        launch(&buffers, nullptr, nullptr, nullptr, nullptr);
    }
};
struct Pipeline : Object {
    Reference<Function> function;
    explicit Pipeline(Function *function) : Object(Kind::pipeline), function(function) {}
};

/// What an encoder has been told so far; a command once it is dispatched.
struct Argument {
    Reference<Buffer> buffer;
    size_t offset = 0;
    std::vector<char> bytes;  // setBytes: instead of a buffer
    char *address() { return bytes.empty() ? buffer->memory.data() + offset : bytes.data(); }
};
struct Dispatch {
    Reference<Pipeline> pipeline;
    std::map<size_t, Argument> arguments;
    size_t shared_bytes = 0;
    Size groups = {}, threads = {};
};
/// An Objective-C block, as the compiler lays it out.
struct Block {
    void *isa;
    int flags, reserved;
    void (*invoke)(Block *, Object *);
    struct {
        unsigned long reserved, size;
    } *descriptor;
};
struct Queue;
struct CommandBuffer : Object {
    Reference<Queue> queue;
    std::vector<std::function<void()>> commands;
    std::vector<std::vector<char>> handlers;  // copies of blocks
    bool committed = false, done = false;
    explicit CommandBuffer(Queue *queue);
};
struct Queue : Object {
    std::vector<Reference<CommandBuffer>> pending;
    Queue() : Object(Kind::queue) {}
};
CommandBuffer::CommandBuffer(Queue *queue) : Object(Kind::command_buffer), queue(queue) {}

struct Encoder : Object {
    Reference<CommandBuffer> commands;
    Dispatch dispatch;
    Encoder(Kind kind, CommandBuffer *commands) : Object(kind), commands(commands) {}
};

// Pools of objects to release later, per thread, nested; null while there is none. Not destroyed with the thread: Halide cleans
// up from a destructor at exit.
thread_local std::vector<std::vector<Object *>> *pools = nullptr;

Object *new_pool() {
    if (!pools) pools = new std::vector<std::vector<Object *>>;
    pools->emplace_back();
    return new Object(Kind::pool);
}
template<class T>
T *autorelease(T *object) {
    // Without a pool nobody gives it back: so it is in Halide's cleaning up at exit.
    static auto &for_good = *new std::vector<Object *>;
    (pools ? pools->back() : for_good).push_back(object);
    return object;
}

// ---- MSL to machine code --------------------------------------------------------------------------------------------

std::string contents(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

/// `source` without its n-th barrier.
std::string without_barrier(const std::string &source, size_t n) {
    const std::regex barrier("threadgroup_barrier\\([^;]*\\);");
    std::sregex_iterator match(source.begin(), source.end(), barrier), end;
    for (size_t k = 0; k < n && match != end; k++) ++match;
    if (match == end) die("no barrier %zu", n);
    return std::string(source).erase(match->position(), match->length());
}

/// C++ for metal_stdlib: attributes gone, and for each kernel a function that takes its arguments from arrays.
std::string translated(const std::string &source) {
    std::string text = "#include <metal_stdlib>\n#line 1 \"kernel.metal\"\n";
    text += std::regex_replace(source, std::regex("\\[\\[[^\\]]*\\]\\]"), "");
    const std::regex kernel("kernel void ([A-Za-z_0-9]+)\\(");
    for (std::sregex_iterator match(source.begin(), source.end(), kernel), end; match != end; ++match) {
        const std::string name = (*match)[1];
        text += "\nextern \"C\" void launch_" + name +
                "(int *count, void **buffers, void *shared, const unsigned *group_index, "
                "const unsigned *thread_index) { metal::launch(&" +
                name + ", count, buffers, shared, group_index, thread_index); }\n";
    }
    return text;
}

/// Compiles MSL, or finds it compiled in the cache. Null with the compiler's message in `error`.
Library *compile(std::string source, std::string &error) {
    const std::string drop = setting("FAKEMETAL_DROP_BARRIER");
    if (!drop.empty()) source = without_barrier(source, std::stoul(drop));
    const std::string text = translated(source), flags = FAKEMETAL_FLAGS, compiler = FAKEMETAL_COMPILER;
    const size_t hash = std::hash<std::string>()(text + flags + compiler + contents(FAKEMETAL_INCLUDE "/metal_stdlib"));
    const std::string path = FAKEMETAL_CACHE "/" + std::to_string(hash), library = path + ".so";
    if (access(library.c_str(), R_OK)) {
        const std::string own = path + "." + std::to_string(getpid()), cpp = own + ".cpp", log = own + ".log",
                          made = own + ".so";
        std::ofstream(cpp, std::ios::binary) << text;
        const std::string command = compiler + " -std=c++17 -shared -fPIC -fno-strict-aliasing -ffp-contract=off -w " + flags +
                                    " -I" FAKEMETAL_INCLUDE " '" + cpp + "' -o '" + made + "' >'" + log + "' 2>&1";
        if (std::system(command.c_str())) {
            error = contents(log).substr(0, 4000);
            std::fprintf(stderr, "fakemetal: %s does not compile:\n%s", cpp.c_str(), error.c_str());  // Halide drops it
            return nullptr;
        }
        std::rename(made.c_str(), library.c_str());
        std::rename(cpp.c_str(), (path + ".cpp").c_str());
        std::remove(log.c_str());
    }
    void *handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        error = dlerror();
        return nullptr;
    }
    *(void (**)())dlsym(handle, "fakemetal_barrier") = wait_at_barrier;
    return new Library(handle);
}

// ---- Running --------------------------------------------------------------------------------------------------------

void run(Dispatch &d) {
    const Function &function = *d.pipeline->function.get();
    const char *name = function.name.c_str();
    const size_t threads = (size_t)d.threads[0] * d.threads[1] * d.threads[2];
    const size_t groups = (size_t)d.groups[0] * d.groups[1] * d.groups[2];
    // What every Apple GPU has.
    if (threads > 1024) die("%s: %zu threads in a group; expected at most 1024", name, threads);
    if (d.shared_bytes > 32768) die("%s: %zu bytes of threadgroup memory; expected at most 32768", name, d.shared_bytes);
    std::vector<void *> buffers;
    for (int n = 0; n < function.buffers; n++) {
        if (!d.arguments.count(n)) die("%s: buffer %d is not set", name, n);
        buffers.push_back(d.arguments[n].address());
    }

    const std::string wanted = setting("FAKEMETAL_ORDER", "forward");
    const Order order = wanted == "reverse" ? Order::reverse : wanted == "shuffle" ? Order::shuffle : Order::forward;
    if (order == Order::forward && wanted != "forward") die("FAKEMETAL_ORDER is '%s'", wanted.c_str());
    static std::mt19937 random(1);
    std::vector<size_t> turns(groups);
    for (size_t n = 0; n < groups; n++) turns[n] = order == Order::reverse ? groups - 1 - n : n;
    if (order == Order::shuffle) std::shuffle(turns.begin(), turns.end(), random);
    for (size_t n : turns) {
        // Its own allocation for each group: the address sanitizer sees its ends.
        struct alignas(16) Lane {
            char bytes[16];
        };
        std::vector<Lane> shared(std::max<size_t>(d.shared_bytes / 16, 1));
        std::memset(shared.data(), 0xff, shared.size() * 16);
        const Size group = {unsigned(n % d.groups[0]), unsigned(n / d.groups[0] % d.groups[1]),
                            unsigned(n / d.groups[0] / d.groups[1])};
        run_group(function.launch, buffers.data(), shared.data(), group, d.threads, order, random);
    }
    if (setting("FAKEMETAL_TRACE") == "1")
        std::fprintf(stderr, "fakemetal: %s groups %ux%ux%u threads %ux%ux%u shared %zu\n", name, d.groups[0], d.groups[1],
                     d.groups[2], d.threads[0], d.threads[1], d.threads[2], d.shared_bytes);
}

std::recursive_mutex running;  // one queue at a time

/// Runs what was committed to the queue before `last`, and that: nothing runs before somebody waits, so that a missing
/// synchronisation shows.
void run_until(CommandBuffer *last) {
    std::lock_guard<std::recursive_mutex> lock(running);
    Reference<Queue> queue = last->queue;
    while (!last->done) {
        Reference<CommandBuffer> next = queue->pending.front();
        queue->pending.erase(queue->pending.begin());
        for (auto &command : next->commands) command();
        next->commands.clear();
        next->done = true;
        for (auto &handler : next->handlers) ((Block *)handler.data())->invoke((Block *)handler.data(), next.get());
    }
}

// ---- Methods --------------------------------------------------------------------------------------------------------

using Selector = const char *;
void *find(Object *, Selector);

Object *alloc(Class *c, Selector) {
    if (c->name == "NSString") return new String;
    if (c->name == "NSAutoreleasePool") return new_pool();
    if (c->name == "MTLCompileOptions") return new Object(Kind::options);
    die("alloc of class %s", c->name.c_str());
}
Object *itself(Object *object, Selector) { return object; }
Object *retain_(Object *object, Selector) { return retain(object); }
unsigned long retain_count(Object *object, Selector) { return (unsigned long)object->references; }
void release_(Object *object, Selector) { release(object); }
bool responds(Object *object, Selector, Selector s) { return find(object, s) != nullptr; }
void drain(Object *pool, Selector) {
    const std::vector<Object *> objects = std::move(pools->back());
    pools->pop_back();
    if (pools->empty()) delete pools, pools = nullptr;
    for (Object *object : objects) release(object);
    release(pool);
}
Object *string_init(String *s, Selector, const char *bytes, size_t length, size_t, unsigned char) {
    s->text.assign(bytes, length);
    return s;
}
const char *utf8(String *s, Selector) { return s->text.c_str(); }
void set_fast_math(Object *, Selector, unsigned char on) {
    if (on) die("fast math is on: exp and division would lose accuracy");
}

Object *new_buffer(Object *, Selector, size_t bytes, size_t) { return bytes ? new Buffer(bytes) : nullptr; }
Object *new_queue(Object *, Selector) { return new Queue; }
Object *new_library(Object *, Selector, String *source, Object *, Object **error) {
    std::string message;
    Library *library = compile(source->text.c_str(), message);  // up to its NUL
    if (!library) *error = autorelease(new String(message, Kind::error));
    return library;
}
Object *new_function(Library *library, Selector, String *name) {
    void *launch = dlsym(library->handle, ("launch_" + name->text).c_str());
    return launch ? new Function(name->text, (Launch)launch, library) : nullptr;
}
Object *new_pipeline(Object *, Selector, Function *function, Object **) { return new Pipeline(function); }
unsigned long max_threads(Object *, Selector) { return 1024; }
void *buffer_contents(Buffer *buffer, Selector) { return buffer->memory.data(); }
int storage_mode(Object *, Selector) { return 0; }  // MTLStorageModeShared

Object *command_buffer(Queue *queue, Selector) { return autorelease(new CommandBuffer(queue)); }
void set_label(Object *, Selector, Object *) {}
void add_handler(CommandBuffer *c, Selector, Block *block) {
    c->handlers.emplace_back((char *)block, (char *)block + block->descriptor->size);
}
Object *command_error(Object *, Selector) { return nullptr; }
Object *compute_encoder(CommandBuffer *c, Selector) { return autorelease(new Encoder(Kind::encoder, c)); }
Object *blit_encoder(CommandBuffer *c, Selector) { return autorelease(new Encoder(Kind::blit, c)); }
void commit(CommandBuffer *c, Selector) {
    if (c->committed) die("a command buffer is committed twice");
    std::lock_guard<std::recursive_mutex> lock(running);
    c->committed = true;
    c->queue->pending.push_back(c);
}
void wait_until_completed(CommandBuffer *c, Selector) {
    if (!c->committed) die("wait for a command buffer that is not committed");
    run_until(c);
}

void set_pipeline(Encoder *e, Selector, Pipeline *pipeline) { e->dispatch.pipeline = pipeline; }
Argument &argument(Encoder *e, size_t index) {
    if (index > 30) die("buffer index %zu; expected at most 30", index);
    return e->dispatch.arguments[index] = Argument();
}
void set_buffer(Encoder *e, Selector, Buffer *buffer, size_t offset, size_t index) {
    Argument &a = argument(e, index);
    a.buffer = buffer, a.offset = offset;
}
void set_bytes(Encoder *e, Selector, const char *bytes, size_t count, size_t index) {
    if (count > 4096) die("setBytes of %zu bytes; expected at most 4096", count);
    argument(e, index).bytes.assign(bytes, bytes + count);
}
void set_shared(Encoder *e, Selector, size_t bytes, size_t) {
    if (bytes % 16) die("threadgroup memory of %zu bytes; expected a multiple of 16", bytes);
    e->dispatch.shared_bytes = bytes;
}
struct MTLSize {
    unsigned long width, height, depth;
};
void dispatch(Encoder *e, const MTLSize &groups, const MTLSize &threads) {
    Dispatch d = e->dispatch;
    d.groups = {(unsigned)groups.width, (unsigned)groups.height, (unsigned)groups.depth};
    d.threads = {(unsigned)threads.width, (unsigned)threads.height, (unsigned)threads.depth};
    e->commands->commands.push_back([d]() mutable { run(d); });
}
// Where the processor's calling convention puts a struct of three words: on the stack, or behind a pointer.
#if defined(__x86_64__)
void dispatch_groups(Encoder *e, Selector, MTLSize groups, MTLSize threads) { dispatch(e, groups, threads); }
#else
void dispatch_groups(Encoder *e, Selector, MTLSize *groups, MTLSize *threads) { dispatch(e, *groups, *threads); }
#endif
void end_encoding(Object *, Selector) {}
void copy(Encoder *e, Selector, Buffer *source, size_t from, Buffer *destination, size_t to, size_t bytes) {
    if (from + bytes > source->memory.size() || to + bytes > destination->memory.size()) die("a copy leaves its buffer");
    Reference<Buffer> s = source, d = destination;
    e->commands->commands.push_back([=] { std::memcpy(d->memory.data() + to, s->memory.data() + from, bytes); });
}

void *find(Object *object, Selector selector) {
    static const auto &methods = *new std::map<std::pair<Kind, std::string>, void *>{
        {{Kind::any, "retain"}, (void *)retain_},
        {{Kind::any, "release"}, (void *)release_},
        {{Kind::any, "retainCount"}, (void *)retain_count},
        {{Kind::any, "respondsToSelector:"}, (void *)responds},
        {{Kind::class_, "alloc"}, (void *)alloc},
        {{Kind::pool, "init"}, (void *)itself},
        {{Kind::pool, "drain"}, (void *)drain},
        {{Kind::options, "init"}, (void *)itself},
        {{Kind::options, "setFastMathEnabled:"}, (void *)set_fast_math},
        {{Kind::string, "initWithBytesNoCopy:length:encoding:freeWhenDone:"}, (void *)string_init},
        {{Kind::string, "UTF8String"}, (void *)utf8},
        {{Kind::error, "localizedDescription"}, (void *)itself},
        {{Kind::error, "UTF8String"}, (void *)utf8},
        {{Kind::device, "newBufferWithLength:options:"}, (void *)new_buffer},
        {{Kind::device, "newCommandQueue"}, (void *)new_queue},
        {{Kind::device, "newLibraryWithSource:options:error:"}, (void *)new_library},
        {{Kind::device, "newComputePipelineStateWithFunction:error:"}, (void *)new_pipeline},
        {{Kind::library, "newFunctionWithName:"}, (void *)new_function},
        {{Kind::pipeline, "maxTotalThreadsPerThreadgroup"}, (void *)max_threads},
        {{Kind::queue, "commandBuffer"}, (void *)command_buffer},
        {{Kind::command_buffer, "setLabel:"}, (void *)set_label},
        {{Kind::command_buffer, "addCompletedHandler:"}, (void *)add_handler},
        {{Kind::command_buffer, "error"}, (void *)command_error},
        {{Kind::command_buffer, "computeCommandEncoder"}, (void *)compute_encoder},
        {{Kind::command_buffer, "blitCommandEncoder"}, (void *)blit_encoder},
        {{Kind::command_buffer, "commit"}, (void *)commit},
        {{Kind::command_buffer, "waitUntilCompleted"}, (void *)wait_until_completed},
        {{Kind::encoder, "setComputePipelineState:"}, (void *)set_pipeline},
        {{Kind::encoder, "setBuffer:offset:atIndex:"}, (void *)set_buffer},
        {{Kind::encoder, "setBytes:length:atIndex:"}, (void *)set_bytes},
        {{Kind::encoder, "setThreadgroupMemoryLength:atIndex:"}, (void *)set_shared},
        {{Kind::encoder, "dispatchThreadgroups:threadsPerThreadgroup:"}, (void *)dispatch_groups},
        {{Kind::encoder, "endEncoding"}, (void *)end_encoding},
        {{Kind::blit, "endEncoding"}, (void *)end_encoding},
        {{Kind::blit, "copyFromBuffer:sourceOffset:toBuffer:destinationOffset:size:"}, (void *)copy},
        {{Kind::buffer, "contents"}, (void *)buffer_contents},
        {{Kind::buffer, "storageMode"}, (void *)storage_mode},
    };
    auto method = methods.find({object->kind, selector});
    if (method == methods.end()) method = methods.find({Kind::any, selector});
    return method == methods.end() ? nullptr : method->second;
}

long nothing() { return 0; }  // what a message to nil does

}  // namespace
}  // namespace fakemetal

// ---- The C functions that Halide's runtime refers to ------------------------------------------------------------------

using namespace fakemetal;

extern "C" {

void *_NSConcreteStackBlock[32];

const char *sel_getUid(const char *name) {
    static auto &names = *new std::set<std::string>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    return names.insert(name).first->c_str();
}
void *objc_getClass(const char *name) {
    static auto &classes = *new std::map<std::string, Class *>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    Class *&c = classes[name];
    return c ? c : c = new Class(name);
}
void *MTLCreateSystemDefaultDevice() { return new Object(Kind::device); }
void NSLog(Object *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    String *text = va_arg(arguments, String *);
    va_end(arguments);
    std::fprintf(stderr, "NSLog: %s\n", text ? text->text.c_str() : "(nil)");
}

void *fakemetal_method(Object *object, const char *selector) {
    if (!object) return (void *)nothing;
    void *method = find(object, selector);
    if (!method) die("an object of kind %d does not respond to %s", (int)object->kind, selector);
    return method;
}

// objc_msgSend(self, selector, ...): find the method, then jump to it with all argument registers as they came.
#if defined(__x86_64__)
__asm__(".text\n"
        ".globl objc_msgSend\n"
        ".type objc_msgSend, @function\n"
        "objc_msgSend:\n"
        "push %rbp\n mov %rsp, %rbp\n"
        "push %rdi\n push %rsi\n push %rdx\n push %rcx\n push %r8\n push %r9\n"
        "sub $128, %rsp\n"
        "movups %xmm0, (%rsp)\n movups %xmm1, 16(%rsp)\n movups %xmm2, 32(%rsp)\n movups %xmm3, 48(%rsp)\n"
        "movups %xmm4, 64(%rsp)\n movups %xmm5, 80(%rsp)\n movups %xmm6, 96(%rsp)\n movups %xmm7, 112(%rsp)\n"
        "call fakemetal_method@PLT\n"
        "mov %rax, %r11\n"
        "movups (%rsp), %xmm0\n movups 16(%rsp), %xmm1\n movups 32(%rsp), %xmm2\n movups 48(%rsp), %xmm3\n"
        "movups 64(%rsp), %xmm4\n movups 80(%rsp), %xmm5\n movups 96(%rsp), %xmm6\n movups 112(%rsp), %xmm7\n"
        "add $128, %rsp\n"
        "pop %r9\n pop %r8\n pop %rcx\n pop %rdx\n pop %rsi\n pop %rdi\n pop %rbp\n"
        "jmp *%r11\n"
        ".size objc_msgSend, .-objc_msgSend\n");
#elif defined(__aarch64__)
__asm__(".text\n"
        ".globl objc_msgSend\n"
        ".type objc_msgSend, %function\n"
        "objc_msgSend:\n"
        "stp x29, x30, [sp, #-224]!\n mov x29, sp\n"
        "stp x0, x1, [sp, #16]\n stp x2, x3, [sp, #32]\n stp x4, x5, [sp, #48]\n stp x6, x7, [sp, #64]\n str x8, [sp, #80]\n"
        "stp q0, q1, [sp, #96]\n stp q2, q3, [sp, #128]\n stp q4, q5, [sp, #160]\n stp q6, q7, [sp, #192]\n"
        "bl fakemetal_method\n"
        "mov x16, x0\n"
        "ldp q0, q1, [sp, #96]\n ldp q2, q3, [sp, #128]\n ldp q4, q5, [sp, #160]\n ldp q6, q7, [sp, #192]\n"
        "ldp x0, x1, [sp, #16]\n ldp x2, x3, [sp, #32]\n ldp x4, x5, [sp, #48]\n ldp x6, x7, [sp, #64]\n ldr x8, [sp, #80]\n"
        "ldp x29, x30, [sp], #224\n"
        "br x16\n"
        ".size objc_msgSend, .-objc_msgSend\n");
#else
#error "objc_msgSend for this processor"
#endif
}

// Kernels as machine code. Halide embeds PTX, which the driver would compile at the first call, within 64 registers a thread
// (Halide's runtime asks for that). Here each kernel is compiled now, by ptxas, for the architectures of the CMake option
// HOLDFAST_CUDA_ARCHITECTURES; a fat binary with those and the PTX, for architectures to come, takes the place of the PTX.
//
// By public means: a custom pass is the last thing that runs before Halide splits off GPU kernels, so this one splits them off
// itself and exchanges the two arguments that hold the PTX. No class of Halide's is wrapped, no symbol taken over.
#include "lowering.h"

#include <unistd.h>  // mkdtemp, on a Mac

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

// Set by CMake; without ptxas or fatbinary the PTX stays.
#ifndef HOLDFAST_PTXAS
#define HOLDFAST_PTXAS ""
#define HOLDFAST_FATBINARY ""
#endif
#ifndef HOLDFAST_CUDA_ARCHITECTURES
#define HOLDFAST_CUDA_ARCHITECTURES "80 90"
#endif

namespace holdfast::cuda {
namespace {

/// A folder for one compilation.
class WorkFolder {
public:
    WorkFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "holdfast-XXXXXX").string();
        if (!mkdtemp(name.data())) fail("machine code", text("cannot make the folder ", name));
        path = name;
    }
    ~WorkFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    std::filesystem::path path;
};

void run(const std::string &command) {
    if (std::system(command.c_str())) fail("machine code", text("this failed: ", command));
}

std::string fat_binary(const char *ptx, const std::string &ptxas, const std::string &fatbinary) {
    const WorkFolder work;
    const std::string source = (work.path / "kernels.ptx").string(), result = (work.path / "kernels.fatbin").string();
    std::ofstream(source) << ptx;
    std::string images;
    std::istringstream architectures(HOLDFAST_CUDA_ARCHITECTURES);
    for (std::string sm; architectures >> sm;) {
        const std::string code = (work.path / ("sm_" + sm)).string();
        run(text("'", ptxas, "' -O3 -arch=sm_", sm, " '", source, "' -o '", code, "'"));
        images += text(" '--image3=kind=elf,sm=", sm, ",file=", code, "'");
    }
    run(text("'", fatbinary, "' -64 '--create=", result, "'", images, " '--image3=kind=ptx,sm=80,file=", source, "'"));
    std::ifstream file(result, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

class MachineCode : public IRMutator {
public:
    explicit MachineCode(const Target &target) : target(target) {}
    using IRMutator::mutate;
    Stmt mutate(const Stmt &s) override {
        if (inside) return IRMutator::mutate(s);
        Stmt offloaded = inject_gpu_offload(s, target);
        inside = true;
        offloaded = IRMutator::mutate(offloaded);
        inside = false;
        return offloaded;
    }

private:
    using IRMutator::visit;
    const Target target;
    bool inside = false;

    Expr visit(const Call *op) override {
        // halide_cuda_initialize_kernels(user context, &state, code, size of the code)
        if (op->name != "halide_cuda_initialize_kernels") return IRMutator::visit(op);
        const size_t code = op->args.size() - 2;
        struct Find : IRGraphVisitor {
            Buffer<> image;
            std::string name;
            using IRGraphVisitor::visit;
            void visit(const Variable *v) override {
                if (v->image.defined()) image = v->image, name = v->name;
            }
        } find;
        op->args[code].accept(&find);
        if (!find.image.defined()) fail("machine code", "Halide embeds its PTX in an unknown way");
        const char *ptx = (const char *)find.image.data();
        if (std::strstr(ptx, ".extern .func")) fail("machine code", "the PTX calls functions that no device library has");
        const std::string ptxas = HOLDFAST_PTXAS, fatbinary = HOLDFAST_FATBINARY;
        if (ptxas.empty() || fatbinary.empty()) return op;
        const std::string binary = fat_binary(ptx, ptxas, fatbinary);
        Buffer<uint8_t> image((int)binary.size(), find.image.name());
        std::memcpy(image.data(), binary.data(), binary.size());
        std::vector<Expr> args = op->args;
        args[code] = Call::make(Handle(), Call::buffer_get_host,
                                {Variable::make(type_of<halide_buffer_t *>(), find.name, image)}, Call::Extern);
        args[code + 1] = (int)binary.size();
        return Call::make(op->type, op->name, args, op->call_type);
    }
};

}  // namespace

Pass machine_code(const Target &target) { return std::make_unique<MachineCode>(target); }

}  // namespace holdfast::cuda

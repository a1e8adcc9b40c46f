// Fills a chunk table (chunks.h) for calls whose batch entries are one sequence each. What follows the table in the buffer is
// zero: kernels read it where a call gives no decay or no initial state.
#include "../schedules/schedule.h"
#include "chunks.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ChunkTableGenerator : public Generator<ChunkTableGenerator> {
public:
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    Input<int> tokens{"tokens"}, chunk{"chunk"};  // of a sequence; of a chunk, at most
    Input<int> count{"count"};                    // chunks, at least 1
    Output<Buffer<int32_t, 1>> table{"table"};    // of any length

    void generate() {
        Var n("n");
        const Expr field = n % chunk_fields, c = n / chunk_fields, start = c * chunk;
        Expr entry = mux(field, {start, min(chunk, tokens - start), c + 1, 0});
        table(n) = select(c < count, entry, 0);
        table.dim(0).set_min(0);
        f.entries = table;
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, ChunkTableSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ChunkTableFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ChunkTableGenerator, chunk_table)

// Fills a chunk table (chunks.h) on the device, of sequences that lie one after the other: as many as the kernel has arguments
// for, which a graph that is captured keeps, and in as many calls as it takes. What follows the table in the buffer is zero:
// kernels read it where a call gives no decay or no initial state.
#include "../schedules/schedule.h"
#include "chunks.h"

#include <string>
#include <vector>

namespace {
using namespace Halide;
using namespace holdfast;

class ChunkTableGenerator : public Generator<ChunkTableGenerator> {
public:
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h
    GeneratorParam<int> sequences{"sequences", 1};                       // of a call, at most: more are empty

    Input<int> chunk{"chunk"};                                          // tokens, at most
    Input<int> count{"count"}, slots{"slots"};                          // of the whole table: chunks; they and the sequences
    Input<int> before{"before"};                                        // sequences of earlier calls, whose entries stay
    Input<int> first_token{"first_token"}, first_chunk{"first_chunk"};  // of this call
    std::vector<Input<int> *> token_ends, chunk_ends;                   // of each sequence
    Output<Buffer<int32_t, 1>> table{"table"};                          // of any length

    void configure() {
        for (int s = 0; s < sequences; s++) token_ends.push_back(add_input<int>("token_end_" + std::to_string(s)));
        for (int s = 0; s < sequences; s++) chunk_ends.push_back(add_input<int>("chunk_end_" + std::to_string(s)));
    }

    void generate() {
        Var n("n");
        const Expr field = n % chunk_fields, slot = n / chunk_fields, s = slot - count - before, of_chunk = slot < count;
        // The sequence of the chunk, or whose final slot it is: where it begins and ends, its first chunk, its number.
        Expr begin = first_token, end = *token_ends[0], first = first_chunk, number = before;
        for (int next = 1; next < sequences; next++) {
            const Expr token = *token_ends[next - 1], c = *chunk_ends[next - 1];
            const Expr past = select(of_chunk, slot >= c, s >= next);
            begin = select(past, token, begin), end = select(past, *token_ends[next], end);
            first = select(past, c, first), number = select(past, before + next, number);
        }
        const Expr start = begin + (slot - first) * chunk;
        const Expr next = select(start + chunk < end, slot + 1, count + number);
        const Expr chunk_entry = mux(field, {start, min(chunk, end - start), next, 0});
        const Expr final_entry = select(field == chunk_first, select(begin < end, first, slot), 0);
        const Expr here =
            select(of_chunk, slot >= first_chunk && slot < *chunk_ends.back(), s >= 0 && s < sequences && slot < slots);
        RDom written(0, 1);
        written.where(here || before == 0);
        table(n) = undef<int32_t>();
        table(n) = select(here, select(of_chunk, chunk_entry, final_entry), 0) + written;
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
HALIDE_REGISTER_GENERATOR_ALIAS(packed_chunk_table, chunk_table, {{"sequences", "64"}})

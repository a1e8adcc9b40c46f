// The only machinery of schedules: a file per kernel and kind of hardware defines one `Schedule` and registers it. A kind of
// hardware that needs lowering passes of its own registers a `Lowering` as well.
#pragma once
#include "Halide.h"
#include <algorithm>
#include <string>
#include <vector>

namespace holdfast {

template<class Funcs, class Sizes>
struct Schedule {
    const char *name;  // e.g. "x86"; a generator parameter can force it
    int rank;          // the highest that matches wins
    bool (*matches)(const Halide::Target &, const Sizes &);
    void (*apply)(Funcs &, const Sizes &, const Halide::Target &);

    static std::vector<Schedule> &all() {
        static std::vector<Schedule> list;
        return list;
    }
    static bool add(const Schedule &s) {
        all().push_back(s);
        return true;
    }

    /// The best match, or the one named `forced`. No match, a tie, or an unknown name fails the build.
    static const Schedule &best(const Sizes &sizes, const Halide::Target &target, const std::string &forced = "") {
        const Schedule *best = nullptr;
        bool tie = false;
        for (const Schedule &s : all()) {
            if (forced.empty() ? !s.matches(target, sizes) : forced != s.name) continue;
            if (!best || s.rank >= best->rank) tie = best && s.rank == best->rank, best = &s;
        }
        _halide_user_assert(best) << "no schedule '" << forced << "' for " << target.to_string() << "\n";
        _halide_user_assert(!tie) << "two schedules of rank " << best->rank << " match " << target.to_string() << "\n";
        return *best;
    }
};

/// Passes that Halide runs on every pipeline for some targets, whichever schedule it has. Halide keeps them with the Pipeline,
/// not with its Funcs. A lowering of a lower rank comes before those of a higher one, in whichever order their files are linked.
struct Lowering {
    int rank;
    bool (*matches)(const Halide::Target &);
    void (*add_passes)(Halide::Pipeline, const Halide::Target &);

    static std::vector<Lowering> &all() {
        static std::vector<Lowering> list;
        return list;
    }
    static bool add(const Lowering &l) {
        std::vector<Lowering> &list = all();
        list.insert(std::upper_bound(list.begin(), list.end(), l, [](auto &a, auto &b) { return a.rank < b.rank; }), l);
        return true;
    }
    /// Adds those of the target to a pipeline.
    static void apply(const Halide::Pipeline &pipeline, const Halide::Target &target) {
        for (const Lowering &l : all())
            if (l.matches(target)) l.add_passes(pipeline, target);
    }
};

/// Schedule `f` with the best match, or with the schedule named `forced`; "none" leaves the algorithm as it is. `pipeline` is
/// the kernel's whole one, a Generator's get_pipeline(): it gets the target's passes.
template<class Funcs, class Sizes>
void apply_schedule(Funcs &f, const Sizes &sizes, const Halide::Pipeline &pipeline, const Halide::Target &target,
                    const std::string &forced) {
    if (forced != "none") Schedule<Funcs, Sizes>::best(sizes, target, forced).apply(f, sizes, target);
    Lowering::apply(pipeline, target);
}

}  // namespace holdfast

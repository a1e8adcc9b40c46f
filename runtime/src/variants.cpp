#include "variants.h"

#include "cpu_features.h"
#include "failure.h"
#include "tensor.h"

#include <cstdlib>
#include <cstring>
#include <sstream>

#include "kernels.h"

namespace holdfast {

const std::vector<Target> &targets() {
    static const std::vector<Target> list = {
#define HOLDFAST_TARGET(name, backend, needs, chunk_table, packed_chunk_table, convert_state, sum_decays, clear_16) \
    {#name, \
     Backend::backend, \
     missing_cpu_features(needs), \
     std::strstr(needs, "amx_tile") != nullptr, \
     chunk_table, \
     packed_chunk_table, \
     convert_state, \
     sum_decays, \
     clear_16},
#include "targets.inc"
#undef HOLDFAST_TARGET
    };
    return list;
}

const std::string &missing_for(const Target &target) {
    const std::string &driver = availability(target.backend).missing;
    if (!driver.empty()) return driver;
    return target.tiles && target.missing_features.empty() ? missing_permission_for_tiles() : target.missing_features;
}

Backend require_backend(const std::string &name) {
    std::string known;
    for (Backend backend : all_backends) {
        if (name == name_of(backend)) {
            const std::string &missing = availability(backend).missing;
            if (!missing.empty())
                fail(HOLDFAST_TARGET_UNAVAILABLE, "backend is '", name, "', which cannot run here: ", missing);
            return backend;
        }
        known += (known.empty() ? "" : ", ") + std::string(name_of(backend));
    }
    fail(HOLDFAST_TARGET_UNAVAILABLE, "backend is '", name, "'; expected one of ", known);
}

static const Target *find_target(const std::string &name) {
    for (const Target &target : targets())
        if (name == target.name) return &target;
    return nullptr;
}

const std::vector<Variant> &variants() {
    static const std::vector<Variant> list = {
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, degree) \
    {#kernel, \
     #name, \
     #dtype, \
     chunk, \
     key_size, \
     value_size, \
     row_alignment * (int)dtype.bytes(), \
     round_operands, \
     degree, \
     find_target(#target), \
     name},
#include "variants.inc"
#undef HOLDFAST_VARIANT
    };
    return list;
}

const Target *require_target(const std::string &name, const char *prefix) {
    const Target *target = find_target(name);
    if (target && missing_for(*target).empty()) return target;
    std::string known;
    for (const Target &t : targets()) known += (known.empty() ? "" : ", ") + std::string(t.name);
    if (!target) fail(HOLDFAST_TARGET_UNAVAILABLE, prefix, "target is '", name, "'; expected one of ", known);
    if (!target->missing_features.empty())
        fail(HOLDFAST_TARGET_UNAVAILABLE, prefix, "target is '", name,
             "', which needs CPU features that this machine lacks: ", target->missing_features);
    fail(HOLDFAST_TARGET_UNAVAILABLE, prefix, "target is '", name,
         target->tiles ? "', which needs " : "', whose backend cannot run here: ", missing_for(*target));
}

const Target *environment_target() {
    static const std::string name = [] {
        const char *value = std::getenv("HOLDFAST_TARGET");
        return std::string(value ? value : "");
    }();
    return name.empty() ? nullptr : require_target(name, "HOLDFAST_TARGET: ");
}

/// What select_variant returns, null when there is none.
static const Variant *find_variant(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size,
                                   int64_t chunk_size, Backend backend, const Target *forced, int64_t row_alignment,
                                   int degree) {
    const Variant *best = nullptr;
    for (const Variant &v : variants()) {
        // Names last: they are the slowest to compare, and a call for one token has no time to lose.
        if (forced ? v.target != forced : v.target->backend != backend || !v.target->missing_features.empty()) continue;
        if ((v.key_size && v.key_size != key_size) || (v.value_size && v.value_size != value_size)) continue;
        if (v.row_alignment > row_alignment || (v.degree && v.degree != degree)) continue;
        if (std::strcmp(v.kernel, kernel) || std::strcmp(v.dtype, dtype)) continue;
        if (!forced && v.target->tiles && !missing_for(*v.target).empty()) continue;
        // The list is best first: a later row replaces the first only for its chunk, all else being equal.
        if (!best) {
            best = &v;
        } else if (chunk_size && v.target == best->target && v.key_size == best->key_size && v.value_size == best->value_size) {
            const bool better =
                best->chunk < chunk_size ? v.chunk > best->chunk : v.chunk >= chunk_size && v.chunk < best->chunk;
            if (better) best = &v;
        }
    }
    return best;
}

const Variant &select_variant(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size, int64_t chunk_size,
                              Backend backend, const Target *forced, const RowAlignment &rows, int degree) {
    auto find = [&](int64_t bytes) {
        return find_variant(kernel, dtype, key_size, value_size, chunk_size, backend, forced, bytes, degree);
    };
    if (const Variant *best = find(rows.bytes)) return *best;
    std::ostringstream wanted;
    wanted << kernel << " for " << dtype << ", K = " << key_size << ", V = " << value_size
           << (forced ? " and target " : " and backend ") << (forced ? forced->name : name_of(backend));
    if (const Variant *aligned = find(RowAlignment::most))
        fail(HOLDFAST_UNSUPPORTED, rows.tensor, " has rows that start at multiples of ", rows.bytes, " bytes only; expected ",
             aligned->row_alignment, ", as all variants of ", wanted.str(), " in this build want");
    fail(HOLDFAST_UNSUPPORTED, "no variant of ", wanted.str(), " in this build");
}

std::vector<const Variant *> selectable_variants(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size,
                                                 int64_t chunk_size, Backend backend, const Target *forced) {
    std::vector<const Variant *> list;
    for (int64_t bytes = 1; bytes <= RowAlignment::most; bytes *= 2) {
        const Variant *v = find_variant(kernel, dtype, key_size, value_size, chunk_size, backend, forced, bytes, 0);
        if (v && (list.empty() || list.back() != v)) list.push_back(v);
    }
    return list;
}

}  // namespace holdfast

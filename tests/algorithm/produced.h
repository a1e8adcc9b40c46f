// What a kernel computes of its stages, when it is called.
#pragma once
#include "Halide.h"

#include <regex>
#include <set>
#include <string>

namespace test {

/// Of a kernel for a target with TraceStores, called with context() as its first argument.
struct Produced : private Halide::JITUserContext {
    std::set<std::string> stages;  // by name, without what Halide adds to it; "derived of x" of a hole in x's place

    Produced() {
        handlers.custom_trace = [](Halide::JITUserContext *context, const halide_trace_event_t *event) -> int32_t {
            if (event->event == halide_trace_store) {
                static const std::regex added(R"([_$]\d+)"), of_hole(R"((.*)_hole_.*)");
                std::string name = std::regex_replace(event->func, of_hole, "derived of $1");
                static_cast<Produced *>(context)->stages.insert(std::regex_replace(name, added, ""));
            }
            return 1;
        };
    }
    Halide::JITUserContext *context() { return this; }
};

}  // namespace test

// What a kernel computes of its stages, when it is called.
#pragma once
#include "Halide.h"

#include <set>
#include <string>

namespace test {

/// Of a kernel for a target with TraceStores, called with context() as its first argument.
struct Produced : private Halide::JITUserContext {
    std::set<std::string> stages;  // by name, without what Halide adds to it

    Produced() {
        handlers.custom_trace = [](Halide::JITUserContext *context, const halide_trace_event_t *event) -> int32_t {
            if (event->event == halide_trace_store) {
                const std::string name = event->func;
                static_cast<Produced *>(context)->stages.insert(name.substr(0, name.find('$')));
            }
            return 1;
        };
    }
    Halide::JITUserContext *context() { return this; }
};

}  // namespace test

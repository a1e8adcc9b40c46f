// What a kernel computes of its stages, when it is called.
#pragma once
#include "Halide.h"

#include <set>
#include <string>

namespace test {

/// Of a kernel for a target with TraceRealizations, called with this as its first argument.
struct Produced : Halide::JITUserContext {
    std::set<std::string> stages;  // by name, without what Halide adds to it

    Produced() {
        custom_trace = [](Halide::JITUserContext *context, const halide_trace_event_t *event) -> int32_t {
            if (event->event == halide_trace_produce) {
                const std::string name = event->func;
                static_cast<Produced *>(context)->stages.insert(name.substr(0, name.find('$')));
            }
            return 1;
        };
    }
};

}  // namespace test

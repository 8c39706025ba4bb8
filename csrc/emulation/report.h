// Faults of a kernel, one entry for each kind and place.
#pragma once
#include <string>
#include <vector>

#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

__attribute__((cold, format(printf, 3, 4))) void report(const char* kind, Site site, const char* format, ...);
int report_count();
std::string report_text();  // "kind: message, N times, at file:line < its caller < ...", a line each
void clear_reports();

// "file:line < ...", the innermost inlined function first, without those of emulator.h.  One call of addr2line for all.
std::vector<std::string> source_lines(const std::vector<Site>& sites);
// The compiler may have copied an instruction: two places are one if their lines are.
bool same_place(Site a, Site b);

#pragma GCC visibility pop
}  // namespace attn_ext::emulation

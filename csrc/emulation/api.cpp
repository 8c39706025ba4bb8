// The emulator from outside, in C: for Python.
#include <string>

#include "emulation/emulator.h"
#include "emulation/global_memory.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/statistics.h"

using namespace attn_ext::emulation;

extern "C" {

void attn_ext_emulation_config(int seed, int access_sites, int64_t steps_per_block) {
  configuration = {seed, access_sites != 0, steps_per_block};
}

void attn_ext_emulation_register_memory(const void* pointer, size_t bytes, int access) {
  register_memory(pointer, bytes, static_cast<Access>(access));
}
void attn_ext_emulation_forget_memory() { forget_memory(); }

int attn_ext_emulation_memory(size_t index, uintptr_t* start, size_t* bytes) { return memory_range(index, start, bytes); }
// From now on; null: the emulator.
void attn_ext_emulation_launch_by(Launcher function) { launcher = function; }

const char* attn_ext_emulation_report() {  // valid until the next call
  static std::string text;
  return (text = report_text()).c_str();
}
const char* attn_ext_emulation_stats() {  // JSON, valid until the next call
  static std::string text;
  return (text = statistics_json()).c_str();
}
void attn_ext_emulation_clear() {  // errors and statistics
  clear_reports();
  clear_statistics();
}
}

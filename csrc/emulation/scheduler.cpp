#include "emulation/scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <random>
#include <string>

#include "emulation/async_copy.h"
#include "emulation/emulator.h"
#include "emulation/global_memory.h"
#include "emulation/report.h"
#include "emulation/shared_memory.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {

Configuration configuration;
Block block;
Thread* current = nullptr;
int64_t steps_left;
uintptr_t private_base = 0, private_bytes = kEverything;

namespace {

constexpr size_t kStackBytes = size_t{128} << 10, kGuardBytes = 4096, kStackStride = kStackBytes + kGuardBytes;

struct Kernel {
  void (*run)(const void*);
  const void* body;
} kernel;
void* launching_stack;
int running_warp;
std::mt19937 random_numbers;

// Pushes what a function preserves, moves to the other stack, pops it there.
extern "C" __attribute__((visibility("hidden"))) void attn_ext_emulation_switch_stack(void** from, void* to);
#ifdef __x86_64__
asm(R"(.text
.type attn_ext_emulation_switch_stack,@function
.hidden attn_ext_emulation_switch_stack
.globl attn_ext_emulation_switch_stack
attn_ext_emulation_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size attn_ext_emulation_switch_stack,.-attn_ext_emulation_switch_stack
)");
constexpr int kSavedRegisters = 6;
#else
#error "the emulator switches stacks on x86-64 only"
#endif

void switch_to(void** from, Thread* to) {
  current = to;
  private_base = to ? to->stack : 0;
  private_bytes = to ? kStackBytes : kEverything;
  attn_ext_emulation_switch_stack(from, to ? to->stack_pointer : launching_stack);
}

// The first at or, going round, after `start` that is set.
int next_bit(uint32_t bits, int start) {
  return static_cast<int>(
      (static_cast<unsigned>(std::countr_zero(std::rotr(bits, start))) + static_cast<unsigned>(start)) % 32);
}

void choose_warp() {
  uint32_t ready = 0;
  for (int w = 0; w < block.warps; w++) ready |= static_cast<uint32_t>(block.warp[w].ready != 0) << w;
  if (!ready) {
    running_warp = -1;
    return;
  }
  const int start = configuration.seed ? static_cast<int>(random_numbers() % kMaxWarps) : running_warp + 1;
  running_warp = next_bit(ready, start);
  if (configuration.seed) block.warp[running_warp].first_lane = static_cast<int>(random_numbers() % kLanes);
}

// Null: no thread can run.
Thread* next_thread() {
  if (running_warp < 0 || !block.warp[running_warp].ready) choose_warp();
  if (running_warp < 0) return nullptr;
  Warp& warp = block.warp[running_warp];
  const int lane = next_bit(warp.ready, warp.first_lane);
  warp.ready &= ~(1u << lane);
  return &block.thread[running_warp * kLanes + lane];
}

void leave() {
  Thread* const next = next_thread();
  if (next != current) switch_to(&current->stack_pointer, next);
}

void report_deadlock() {
  std::map<Site, int> sites;
  int at_barriers = 0;
  for (int t = 0; t < block.threads; t++) {
    const Thread& thread = block.thread[t];
    if (thread.state == State::finished) continue;
    sites[thread.waits_at]++;
    at_barriers += thread.state == State::at_barrier;
  }
  std::vector<Site> keys;
  for (const auto& [site, count] : sites) keys.push_back(site);
  const std::vector<std::string> lines = source_lines(keys);
  std::string where;
  for (size_t i = 0; i < keys.size(); i++) where += " " + std::to_string(sites[keys[i]]) + " at " + lines[i] + ";";
  report("deadlock", keys[0], "block (%u,%u,%u): of %d threads %d wait at barriers, %d in collective operations:%s",
         block.index.x, block.index.y, block.index.z, block.threads, at_barriers, block.alive - at_barriers,
         where.c_str());
}

// The warps that meet learn all that any of them knows.
void join_clocks(const Barrier& barrier) {
  uint32_t latest[kMaxWarps] = {};
  for (int w = 0; w < block.warps; w++) {
    if (!barrier.waiting[w]) continue;
    for (int v = 0; v < block.warps; v++) latest[v] = std::max(latest[v], block.warp[w].clock[v]);
  }
  for (int w = 0; w < block.warps; w++) {
    if (!barrier.waiting[w]) continue;
    std::copy(latest, latest + block.warps, block.warp[w].clock);
    advance_clock(w, barrier.site);
  }
}

void release_if_complete(Barrier& barrier) {
  if (!barrier.arrived || barrier.arrived < (barrier.expected ? barrier.expected : block.alive)) return;
  counters.barriers++;
  join_clocks(barrier);
  for (int w = 0; w < block.warps; w++) {
    block.warp[w].ready |= barrier.waiting[w];
    if (barrier.waiting[w]) accesses_complete(w);
    barrier.waiting[w] = 0;
  }
  barrier.threads_last = barrier.arrived;
  barrier.agreeing_last = barrier.agreeing;
  barrier.arrived = barrier.agreeing = 0;
}

void thread_main() {
  kernel.run(kernel.body);
  finish_copies(*current);
  current->state = State::finished;
  Warp& warp = warp_of(*current);
  warp.alive &= ~(1u << current->lane);
  if (!warp.alive) accesses_complete(current->warp);
  block.alive--;
  for (Barrier& barrier : block.barrier) {
    if (!barrier.expected) release_if_complete(barrier);
  }
  leave();
}

void start_thread(int id, uintptr_t stacks) {
  Thread& thread = block.thread[id];
  const dim3 dim = block.dim;
  const auto i = static_cast<unsigned>(id);
  thread.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
  thread.id = id;
  thread.warp = id / kLanes;
  thread.lane = id % kLanes;
  thread.copies.clear();
  thread.first_copy = 0;
  thread.copy_group = 0;
  thread.stack = stacks + static_cast<size_t>(id) * kStackStride + kGuardBytes;
  // Frames of the same function in all threads must not lie in the same sets of the caches.
  const size_t colour = static_cast<size_t>(id) * 17 * 64 % (kStackBytes / 4);
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - 64 - colour);
  *--top = nullptr;  // aligns the stack as a call does
  *--top = reinterpret_cast<void*>(thread_main);
  thread.stack_pointer = std::fill_n(top - kSavedRegisters, kSavedRegisters, nullptr) - kSavedRegisters;
}

uintptr_t stacks() {
  static const uintptr_t memory = [] {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, kMaxThreads * kStackStride, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMaxThreads; i++) mprotect(static_cast<char*>(p) + i * kStackStride, kGuardBytes, PROT_NONE);
    return reinterpret_cast<uintptr_t>(p);
  }();
  return memory;
}

void run_block(uint3 index) {
  static uint32_t time = 0;  // goes on from block to block: what bears an earlier stamp is of an earlier block
  block.serial++;
  block.index = index;
  block.alive = block.threads;
  block.fenced = block.acquired = false;
  time = start_shared_memory(time);
  for (Barrier& barrier : block.barrier) barrier = {};
  for (int w = 0; w < block.warps; w++) {
    Warp& warp = block.warp[w];
    const int lanes = std::min(kLanes, block.threads - w * kLanes);
    warp.present = warp.alive = warp.ready = ~0u >> (kLanes - lanes);
    warp.first_lane = warp.collectives = 0;
    std::fill_n(warp.clock, kMaxWarps, time);
    warp.clock[w]++;
  }
  for (int t = 0; t < block.threads; t++) start_thread(t, stacks());
  steps_left = configuration.steps_per_block;
  running_warp = -1;
  switch_to(&launching_stack, next_thread());
  if (current) {  // stop_block
    current = nullptr;
  } else if (block.alive) {
    report_deadlock();
  }
  for (int w = 0; w < block.warps; w++) {
    accesses_complete(w);
    time = std::max(time, block.warp[w].clock[w]);
  }
}

// A permutation of [0, count).
std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; i++) order[i] = i;
  random_numbers.seed(static_cast<unsigned>(configuration.seed));
  if (configuration.seed) std::shuffle(order.begin(), order.end(), random_numbers);
  return order;
}

}  // namespace

void wait(State state, Site site) {
  current->state = state;
  current->waits_at = site;
  leave();
}

void reschedule() {
  warp_of(*current).ready |= 1u << current->lane;
  choose_warp();
  leave();
}

void stop_block() {
  Thread* const stopped = current;
  private_base = 0;
  private_bytes = kEverything;
  attn_ext_emulation_switch_stack(&stopped->stack_pointer, launching_stack);
  __builtin_unreachable();
}

void stop_after_too_many_steps(Site site) {
  report("step limit", site, "block (%u,%u,%u) thread %d: the block does not end", block.index.x, block.index.y,
         block.index.z, current->id);
  stop_block();
}

BarrierVotes syncthreads(int id, int count, bool predicate) {
  const Site site = ATTN_EXT_SITE;
  count_step(site);
  Barrier& barrier = block.barrier[id];
  if (!barrier.arrived) {
    barrier.site = site;
    barrier.expected = count;
  } else if (!same_place(barrier.site, site)) {
    report("divergent barrier", site, "threads of a block meet here and at %s",
           source_lines({barrier.site})[0].c_str());
  }
  barrier.arrived++;
  barrier.agreeing += predicate;
  barrier.waiting[current->warp] |= 1u << current->lane;
  release_if_complete(barrier);
  wait(State::at_barrier, site);
  return {barrier.threads_last, barrier.agreeing_last};
}

void advance_clock(int warp, Site site) {
  if (++block.warp[warp].clock[warp] > Stamp::kMaxTime) stop_after_too_many_steps(site);
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return block.index; }
dim3 block_dim() { return block.dim; }
dim3 grid_dim() { return block.grid; }

Launcher launcher = nullptr;

int launch(const char* name, dim3 grid, dim3 dim, size_t smem, void (*run)(const void*), const void* body,
           size_t bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{dim.x} * dim.y * dim.z;
  if (!blocks || !threads || threads > kMaxThreads || grid.y > 65535 || grid.z > 65535 || smem > kMaxDynamicBytes) {
    report("launch", 0, "%s: a grid of (%u,%u,%u) blocks of (%u,%u,%u) threads with %zu bytes of shared memory", name,
           grid.x, grid.y, grid.z, dim.x, dim.y, dim.z, smem);
    return report_count();
  }
  if (launcher) {
    if (!launcher(name, static_cast<int64_t>(blocks), static_cast<int64_t>(threads), static_cast<int64_t>(smem), body,
                  static_cast<int64_t>(bytes))) {
      report("launch", 0, "%s did not run", name);
    }
    return report_count();
  }
  kernel = {run, body};
  block.grid = grid;
  block.dim = dim;
  block.threads = static_cast<int>(threads);
  block.warps = (block.threads + kLanes - 1) / kLanes;
  block.dynamic_bytes = smem;
  start_statistics(name);
  start_global_memory(body, bytes);
  locate_shared_memory();
  for (const uint64_t i : block_order(blocks)) {
    run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))});
  }
  return report_count();
}

}  // namespace attn_ext::emulation

// The machine that translated kernels run on: one operating-system thread, one fiber per CUDA thread, memory that knows
// what was allocated, and (CHECKED) who touched which byte after what. See README.md for the rules it checks.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>

#if !defined(__x86_64__) && !defined(PORTABLE_FIBERS)
#define PORTABLE_FIBERS
#endif
#ifdef PORTABLE_FIBERS
#include <ucontext.h>
#endif

typedef void (*Entry)(uint8_t* params);

// A warp needs no more than this: who is there, who has arrived at a collective.
struct Warp {
    Thread* lanes[32];
    uint32_t present, arrived;
};

struct BlockBarrier {
    uint32_t arrived, count, line;
    uint32_t votes, all, any;
    std::vector<Thread*> waiting, participants;
};

struct Cluster {
    std::vector<Block*> blocks;
    uint32_t live;  // threads
    uint32_t phase, arrived;
    Clock published[2];  // by parity of the phase: what the arrivals released
    std::vector<Thread*> waiting;
};

struct BlockState : Block {
    std::vector<Thread*> threads;
    std::vector<Warp*> warps;
    BlockBarrier barriers[16];
};

extern "C" {
Thread* current;
Launch launch;
uint8_t* arena;
}

// ---- the end of a launch by an error: the first one counts, all fibers are left where they are

static char error_text[2048];
static bool failed;
static void to_scheduler();

static void describe(std::string& text, const Thread* t) {
    char buffer[256];
    snprintf(buffer, sizeof buffer, " in block (%u, %u, %u), thread (%u, %u, %u)", t->block->index[0], t->block->index[1],
             t->block->index[2], t->tid[0], t->tid[1], t->tid[2]);
    text += buffer;
}

// Lines go out as @number@; Python knows the files' names.
[[noreturn]] static void stop(const char* format, ...) {
    if (!failed) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error_text, sizeof error_text, format, arguments);
        va_end(arguments);
        failed = true;
    }
    to_scheduler();
    abort();  // not reached: the scheduler resumes nobody after a failure
}

static std::string whom() {
    std::string text;
    if (current) describe(text, current);
    return text;
}

extern "C" [[noreturn]] void fail(const char* what, uint32_t line) { stop("%s at @%u@%s", what, line, whom().c_str()); }

// ---- memory: regions of the arena, 256 bytes apart

struct Access {
    uint32_t clock, thread, line;
    uint8_t atomic, scope, initialised;  // initialised of Cell::write: 0, 1, or GAP: between two variables
    uint8_t async;                       // by an asynchronous store of the thread
};
static const uint8_t GAP = 2;
struct Cell {  // the history of `granule` bytes
    Access write, read[2];
};
struct Region {
    uint64_t address, bytes;
    std::string name;
    bool alive, constant;
    uint32_t granule;
    Cell* cells;
};

static const uint64_t ARENA = 1ull << 31, PAGE = 256, STACK = 64 << 10;
static std::vector<Region> regions(1);
static uint32_t* page_region;
static uint64_t arena_used = PAGE;
static std::map<uint64_t, std::vector<uint32_t>> free_regions;  // by size in pages
static std::vector<uint8_t*> free_stacks;
static uint32_t clock_base = 1;

// A dependent launch may begin before the one before it has ended. Here it never does; but until a thread has waited for that, it
// may touch nothing that the launch before writes, and write nothing that it reads. Where a launch lets the next one begin
// before it has waited itself, the one before it may still run, too.
static uint32_t concurrent_base = 1;  // clocks from here to clock_base are of launches that may still run
static bool chained;

extern "C" void wait_for_launch_before() { current->waited = true; }
extern "C" void let_next_launch_begin() { chained |= launch.dependent && !current->waited; }

static Region* region_of(uint64_t address) {
    const uint64_t offset = address - (uint64_t)arena;
    return offset < ARENA && page_region[offset / PAGE] ? &regions[page_region[offset / PAGE]] : nullptr;
}

static void forget(Region& region, bool initialised) {
    if (!CHECKED) return;
    free(region.cells);
    region.granule = 4;
    const uint64_t count = (region.bytes + 3) / 4;
    region.cells = (Cell*)calloc(count, sizeof(Cell));
    if (initialised)
        for (uint64_t k = 0; k < count; k++) region.cells[k].write.initialised = 1;
}

// Narrower accesses than a cell split all cells of the region, so that neighbours do not share a history.
static void refine(Region& region, uint32_t granule) {
    const uint64_t count = (region.bytes + granule - 1) / granule;
    Cell* cells = (Cell*)malloc(count * sizeof(Cell));
    for (uint64_t k = 0; k < count; k++) cells[k] = region.cells[k * granule / region.granule];
    free(region.cells);
    region.cells = cells;
    region.granule = granule;
}

extern "C" int emulator_start() {
    if (arena) return 0;
    void* got = mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void* pages = mmap(nullptr, ARENA / PAGE * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED || pages == MAP_FAILED) return 1;
    page_region = (uint32_t*)pages;
    arena = (uint8_t*)got;
    return 0;
}

// Bytes in checked memory, filled with 0xff: a NaN in every floating type. Returns 0 where the arena is full.
extern "C" uint64_t emulator_allocate(uint64_t bytes, const char* name, int initialised) {
    const uint64_t pages = (bytes + PAGE - 1) / PAGE + 1;  // one page of gap
    auto& waiting = free_regions[pages];
    uint32_t number;
    if (!waiting.empty()) {
        number = waiting.back();
        waiting.pop_back();
    } else {
        if (arena_used + pages * PAGE > ARENA) return 0;
        number = regions.size();
        regions.push_back(Region{(uint64_t)arena + arena_used, 0, "", false, false, 4, nullptr});
        arena_used += pages * PAGE;
    }
    Region& region = regions[number];
    region.bytes = bytes;
    region.name = name;
    region.alive = true;
    for (uint64_t k = 0; k < pages; k++) page_region[(region.address - (uint64_t)arena) / PAGE + k] = number;
    memset((void*)region.address, 0xff, pages * PAGE);
    forget(region, initialised);
    return region.address;
}

extern "C" void emulator_free(uint64_t address) {
    Region* region = region_of(address);
    if (!region) return;
    region->alive = false;
    free(region->cells);
    region->cells = nullptr;
    free_regions[(region->bytes + PAGE - 1) / PAGE + 1].push_back(region - regions.data());
}

// The host has written rows of bytes each, at these addresses: they hold values from now on.
extern "C" void emulator_written(const uint64_t* addresses, uint64_t count, uint64_t bytes) {
    if (!CHECKED || !bytes) return;
    for (uint64_t row = 0; row < count; row++) {
        Region* region = region_of(addresses[row]);
        if (!region || !region->alive) continue;
        const uint64_t start = addresses[row] - region->address, stop = std::min(start + bytes, region->bytes);
        for (uint32_t granule : {4u, 2u, 1u}) {  // cells end where the row does
            if (granule < region->granule && (start % region->granule || (stop % region->granule && stop < region->bytes)))
                refine(*region, granule);
        }
        for (uint64_t k = start / region->granule; k * region->granule < stop; k++)
            region->cells[k].write.initialised = 1;
    }
}

extern "C" int emulator_knows(uint64_t address, uint64_t bytes) {
    Region* region = region_of(address);
    return region && region->alive && address >= region->address && address + bytes <= region->address + region->bytes;
}

// ---- vector clocks
//
// A kernel without asynchronous stores has one number for each thread: what it had done. With them there are four:
//
//     DONE          what it had done, as seen by whoever is ordered after it
//     ARRIVED       which of its asynchronous stores have arrived, likewise
//     READ          which of its reads came before, as nothing can be written that depends on what was not read yet
//     OVERWRITABLE  which of its asynchronous stores had been waited for, likewise

static uint32_t grid_threads, stride;  // stride: numbers for each thread
enum { DONE, ARRIVED, READ, OVERWRITABLE, KINDS_OF_TIME };

static void widen(Clock& clock, uint32_t low, uint32_t high) {
    if (!clock.at) clock.at = (uint32_t*)calloc(grid_threads * stride, 4);
    if (clock.low == clock.high) {
        clock.low = low, clock.high = high;
    } else {
        clock.low = std::min(clock.low, low), clock.high = std::max(clock.high, high);
    }
}
static void join(Clock& into, const Clock& other) {
    if (other.low == other.high || &into == &other) return;
    widen(into, other.low, other.high);
    for (uint32_t k = other.low; k < other.high; k++) into.at[k] = std::max(into.at[k], other.at[k]);
}
static void clear(Clock& clock) {
    if (clock.at) memset(clock.at + clock.low, 0, 4ull * (clock.high - clock.low));
    clock.low = clock.high = 0;
}
static void drop(Clock& clock) {
    free(clock.at);
    clock = Clock();
}
static uint32_t now(const Thread* t) { return t->clock.at[t->index * stride]; }
static uint32_t highest_clock;
static void tick(Thread* t) {  // after a release: what comes later is not covered by it
    highest_clock = std::max(highest_clock, ++t->clock.at[t->index * stride]);
}

// ---- fibers

static void* scheduler_pointer;
static std::deque<Thread*> ready;
static uint64_t random_state, idle_spins, steps_left;
static Entry entry;
static uint8_t* parameters;

static uint64_t random_bits() {  // splitmix64
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static void thread_ends();

static void fiber_main() {
    entry(parameters);
    thread_ends();
    to_scheduler();
    abort();
}

#ifdef PORTABLE_FIBERS
static void switch_context(void** save, void* to) { swapcontext((ucontext_t*)*save, (ucontext_t*)to); }
static void prepare(Thread* t, uint64_t) {
    ucontext_t* context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = t->stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, fiber_main, 0);
    t->stack_pointer = context;
}
static void release_context(Thread* t) { delete (ucontext_t*)t->stack_pointer; }
static ucontext_t scheduler_context;
#else
// Saves what the ABI makes the callee save, swaps stacks, jumps. `ret` would mislead the return predictor.
extern "C" void switch_context(void** save, void* to);
asm(R"(
.text
.type switch_context, @function
switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size switch_context, .-switch_context
)");
static void prepare(Thread* t, uint64_t shift) {
    uint64_t* top = (uint64_t*)(t->stack + STACK - shift);  // a multiple of 16
    *--top = 0;                                             // where a return address would be: rsp is 8 mod 16 at entry
    *--top = (uint64_t)fiber_main;
    for (int k = 0; k < 6; k++) *--top = 0;
    t->stack_pointer = top;
}
static void release_context(Thread*) {}
#endif

static void to_scheduler() { switch_context(&current->stack_pointer, scheduler_pointer); }

static uint8_t* new_stack() {
    if (!free_stacks.empty()) {
        uint8_t* stack = free_stacks.back();
        free_stacks.pop_back();
        return stack;
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t* stack = (uint8_t*)mmap(nullptr, 64 * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    for (int k = 1; k < 64; k++) free_stacks.push_back(stack + k * STACK);
    return stack;
}

static void yield_now() {
    ready.push_back(current);
    to_scheduler();
}
static void wait_for(const char* what, uint32_t line) {
    current->waits_for = what;
    current->line = line;
    to_scheduler();
}
static void wake(std::vector<Thread*>& threads) {
    if (launch.policy == 1) std::reverse(threads.begin(), threads.end());
    for (Thread* t : threads) {
        t->waits_for = nullptr;
        ready.push_back(t);
    }
    threads.clear();
}
static void progress() { idle_spins = 0; }

static bool in_collective;  // one fiber acts for all lanes: no moment to leave it

static void maybe_preempt() {
    if (launch.preemption > 0 && !in_collective && (random_bits() >> 11) * 0x1p-53 < launch.preemption) yield_now();
}

extern "C" void spin_yield(uint32_t line) {
    if (++idle_spins > 2000ull * (ready.size() + 1)) {
        stop("livelock: every thread that can run only waits in a loop, for what a waiting or not yet started thread should do; "
             "spinning at @%u@%s", line, whom().c_str());
    }
    current->line = line;
    yield_now();
}

extern "C" void loop_step(uint32_t line) {
    if (steps_left-- == 0) stop("livelock: a loop that does not end at @%u@%s", line, whom().c_str());
}

// ---- the checker

static const char* KINDS[] = {"read", "write", "atomic read", "atomic write"};

static bool covers(uint8_t scope, const Thread* a, uint32_t other_index) {
    if (scope >= gpu) return true;
    const uint32_t per_block = launch.block[0] * launch.block[1] * launch.block[2];
    const uint32_t block = other_index / per_block;
    if (scope == cta) return block == a->block->number;
    for (Block* b : ((BlockState*)a->block)->in->blocks)
        if (b->number == block) return true;
    return false;
}

// Whether the current thread comes after an access. overwrites: it does where it only writes.
static bool ordered(const Access& before, bool overwrites = false, bool was_read = false) {
    if (before.clock < clock_base || (before.thread == current->index && !before.async)) return true;
    const uint32_t* known = current->clock.at + before.thread * stride;
    const uint32_t clock = before.clock - clock_base;
    if (clock <= known[before.async ? ARRIVED : DONE]) return true;
    if (!overwrites || stride == 1) return false;
    return before.async ? clock <= known[OVERWRITABLE] : was_read && clock <= known[READ];
}

[[noreturn]] static void race(const Region& region, uint64_t offset, const Access& before, bool wrote, bool writes, bool atomic,
                              uint32_t line) {
    const uint32_t per_block = launch.block[0] * launch.block[1] * launch.block[2];
    const char* narrow = before.atomic && atomic ? " (the scope of one of them does not reach the other's block)" : "";
    stop("race: %s of %s at byte %llu at @%u@%s is not ordered after the %s at @%u@ by block %u, thread %u%s",
         KINDS[writes + 2 * atomic], region.name.c_str(), (unsigned long long)offset, line, whom().c_str(),
         KINDS[wrote + 2 * before.atomic], before.line, before.thread / per_block, before.thread % per_block, narrow);
}

static bool issuing;  // an asynchronous store is checked: nobody may read its target until it has arrived

// The history of one access: checks it against what came before and enters it.
static void enter(Region& region, uint64_t offset, uint32_t bytes, bool reads, bool writes, bool atomic, Scope scope,
                  uint32_t line) {
    uint32_t granule = region.granule;
    while (offset % granule || bytes % granule) granule /= 2;
    if (granule < region.granule) refine(region, granule);
    const Access here = {clock_base + now(current), current->index, line, atomic, (uint8_t)scope, !issuing, issuing};
    for (uint64_t k = offset / granule; k < (offset + bytes) / granule; k++) {
        Cell& cell = region.cells[k];
        const auto clashes = [&](const Access& before, bool was_read) {
            if (ordered(before, !reads, was_read)) return false;
            if (!before.atomic || !atomic) return true;
            const uint32_t per_block = launch.block[0] * launch.block[1] * launch.block[2];
            return !covers(scope, current, before.thread) ||
                   !(before.scope >= gpu || before.thread / per_block == current->block->number ||
                     (before.scope == cluster && covers(cluster, current, before.thread)));
        };
        if (cell.write.initialised == GAP)
            stop("out of bounds: %s between two variables of %s, at byte %llu, at @%u@%s", KINDS[writes + 2 * atomic],
                 region.name.c_str(), (unsigned long long)(k * granule), line, whom().c_str());
        if (reads && !cell.write.initialised)
            stop("uninitialised: read of %s at byte %llu of %llu at @%u@%s", region.name.c_str(), (unsigned long long)(k * granule),
                 (unsigned long long)region.bytes, line, whom().c_str());
        if (launch.dependent && !current->waited) {
            const auto concurrent = [](const Access& before) { return before.clock >= concurrent_base && before.clock < clock_base; };
            const bool read = writes && (concurrent(cell.read[0]) || concurrent(cell.read[1]));
            if (concurrent(cell.write) || read)
                stop("race: %s of %s at byte %llu at @%u@%s is not ordered after the launch before, which %s it", KINDS[writes],
                     region.name.c_str(), (unsigned long long)(k * granule), line, whom().c_str(), read ? "reads" : "writes");
        }
        if (clashes(cell.write, false)) race(region, k * granule, cell.write, true, writes, atomic, line);
        if (writes) {
            for (Access& read : cell.read)
                if (clashes(read, true)) race(region, k * granule, read, false, true, atomic, line);
            cell.write = here;
            cell.read[0] = cell.read[1] = Access();
        } else {
            Access& slot = ordered(cell.read[0]) ? cell.read[0] : ordered(cell.read[1]) ? cell.read[1] : cell.read[random_bits() & 1];
            slot = here;
        }
    }
}

static uint8_t* resolve(uint64_t address, uint32_t bytes, bool reads, bool writes, bool atomic, Scope scope, uint32_t line) {
    const uint64_t stack = (uint64_t)current->stack;
    if (address >= stack && address + bytes <= stack + STACK) return (uint8_t*)address;  // local memory
    Region* region = region_of(address);
    const char* kind = KINDS[writes + 2 * atomic];
    if (!region)
        stop("out of bounds: %s of %u bytes at address 0x%llx, which is no memory of the device, at @%u@%s", kind, bytes,
             (unsigned long long)address, line, whom().c_str());
    if (!region->alive && region->name.compare(0, 6, "shared") == 0)
        stop("dead shared memory: %s of the %s, which has exited, at @%u@%s", kind, region->name.c_str(), line, whom().c_str());
    if (!region->alive || address < region->address || address + bytes > region->address + region->bytes)
        stop("out of bounds: %s of %u bytes at byte %lld of %s (%llu bytes%s) at @%u@%s", kind, bytes,
             (long long)(address - region->address), region->name.c_str(), (unsigned long long)region->bytes,
             region->alive ? "" : ", freed", line, whom().c_str());
    if (address % bytes)
        stop("misaligned: %s of %u bytes at byte %llu of %s at @%u@%s", kind, bytes,
             (unsigned long long)(address - region->address), region->name.c_str(), line, whom().c_str());
    if (writes && region->constant) stop("out of bounds: write to constant %s at @%u@%s", region->name.c_str(), line, whom().c_str());
    if (CHECKED) enter(*region, address - region->address, bytes, reads, writes, atomic, scope, line);
    return (uint8_t*)address;
}

extern "C" uint8_t* touch(uint64_t address, uint32_t bytes, bool write, uint32_t line) {
    if (CHECKED) {
        maybe_preempt();
        if (write) progress();
        return resolve(address, bytes, !write, write, false, cta, line);
    }
    const uint64_t offset = address - (uint64_t)arena, stack = (uint64_t)current->stack;
    if (offset >= ARENA && (address < stack || address >= stack + STACK)) resolve(address, bytes, !write, write, false, cta, line);
    return (uint8_t*)address;
}

// ---- shared memory: an offset in the block's window; in a cluster (rank + 1) << 24 | offset is a peer's

static Block* owner(uint64_t& offset, uint32_t line) {
    if (offset >> 24 == 0) return current->block;
    const uint64_t rank = (offset >> 24) - 1;
    if (rank >= ((BlockState*)current->block)->in->blocks.size())
        stop("out of bounds: shared address 0x%llx is neither in the block's shared memory nor in its cluster, at @%u@%s",
             (unsigned long long)offset, line, whom().c_str());
    offset &= 0xffffff;
    Block* peer = ((BlockState*)current->block)->in->blocks[rank];
    if (peer->finished)
        stop("dead shared memory: access to block %llu of the cluster, which has exited, at @%u@%s", (unsigned long long)rank, line,
             whom().c_str());
    return peer;
}

static uint64_t window_address(uint64_t address, uint32_t line) {
    Block* block = owner(address, line);
    return (uint64_t)block->window + address;
}

extern "C" uint8_t* touch_shared(uint64_t address, uint32_t bytes, bool write, uint32_t line) {
    if (address >> 24 == 0 && address + bytes > launch.window)
        stop("out of bounds: %s of %u bytes at byte %llu of shared memory (%u bytes) at @%u@%s", KINDS[write], bytes,
             (unsigned long long)address, launch.window, line, whom().c_str());
    return touch(window_address(address, line), bytes, write, line);
}

extern "C" uint64_t shared_to_generic(uint64_t address, uint32_t line) { return window_address(address, line); }

extern "C" uint64_t generic_to_shared(uint64_t address, uint32_t line) {
    const auto& blocks = ((BlockState*)current->block)->in->blocks;
    const uint64_t size = launch.window + PAGE;
    const uint64_t own = address - (uint64_t)current->block->window;
    if (own < size) return own;
    for (Block* block : blocks) {
        const uint64_t offset = address - (uint64_t)block->window;
        if (offset < size) return (uint64_t)(block->rank + 1) << 24 | offset;
    }
    stop("out of bounds: address 0x%llx is not in shared memory at @%u@%s", (unsigned long long)address, line, whom().c_str());
}

extern "C" uint64_t map_shared(uint64_t address, uint32_t rank, uint32_t line) {
    if (rank >= ((BlockState*)current->block)->in->blocks.size())
        stop("out of bounds: mapa to block %u of a cluster of %zu at @%u@%s", rank,
             ((BlockState*)current->block)->in->blocks.size(), line, whom().c_str());
    return (uint64_t)(rank + 1) << 24 | (address & 0xffffff);
}
extern "C" uint64_t map_generic(uint64_t address, uint32_t rank, uint32_t line) {
    return window_address(map_shared(generic_to_shared(address, line), rank, line), line);
}

extern "C" bool is_local(uint64_t address) { return address - (uint64_t)current->stack < STACK; }
extern "C" bool is_shared(uint64_t address) {
    for (Block* block : ((BlockState*)current->block)->in->blocks)
        if (address - (uint64_t)block->window < launch.window) return true;
    return false;
}
extern "C" bool is_global(uint64_t address) { return !is_local(address) && !is_shared(address); }

// ---- atomics and the memory model: release and acquire through a location, fences around relaxed accesses

struct Publication {  // what the threads of one block have released to a location, for readers within a scope
    uint32_t block;
    uint8_t scope;
    Clock clock;
};
static std::unordered_map<uint64_t, std::vector<Publication>> locations;

static void forget_publications(std::vector<Publication>& all) {
    for (auto& each : all) drop(each.clock);
    all.clear();
}

static void publish(uint64_t address, const Clock& clock, Scope scope) {
    if (clock.low == clock.high) return;
    auto& all = locations[address];
    for (auto& each : all)
        if (each.block == current->block->number && each.scope == scope) return join(each.clock, clock);
    all.push_back(Publication{current->block->number, (uint8_t)scope, Clock()});
    join(all.back().clock, clock);
}

static int distance(uint32_t block) {  // 0 the same block, 1 the same cluster, 2 elsewhere
    if (block == current->block->number) return 0;
    for (Block* b : ((BlockState*)current->block)->in->blocks)
        if (b->number == block) return 1;
    return 2;
}

static void subscribe(uint64_t address, Semantics semantics, Scope scope) {
    const auto found = locations.find(address);
    if (found == locations.end()) return;
    for (auto& each : found->second) {
        const int far = distance(each.block);
        if (far > std::min<int>(each.scope, gpu) || far > std::min<int>(scope, gpu)) continue;
        join(semantics == acquire || semantics == acq_rel ? current->clock : current->pending[far], each.clock);
    }
}

static void release_to(uint64_t address, Semantics semantics, Scope scope) {
    if (semantics == release || semantics == acq_rel) {
        publish(address, current->clock, scope);
        tick(current);
    } else {
        for (int s = cta; s <= std::min<int>(scope, gpu); s++) publish(address, current->fenced[s], (Scope)s);
    }
}

extern "C" void fence(Scope scope) {
    if (!CHECKED) return;
    for (int s = cta; s <= std::min<int>(scope, gpu); s++) {
        join(current->clock, current->pending[s]);
        clear(current->pending[s]);
    }
    for (int s = cta; s <= std::min<int>(scope, gpu); s++) join(current->fenced[s], current->clock);
    tick(current);
}

static uint64_t atomic_address(Space space, uint64_t address, uint32_t line) {
    return space == shared_space ? window_address(address, line) : address;
}

extern "C" uint8_t* atomic_load(Space space, uint64_t address, uint32_t bytes, Semantics semantics, Scope scope, uint32_t line) {
    spin_yield(line);
    address = atomic_address(space, address, line);
    uint8_t* p = resolve(address, bytes, true, false, true, scope, line);
    if (CHECKED) subscribe(address, semantics, scope);
    return p;
}

extern "C" uint8_t* atomic_store(Space space, uint64_t address, uint32_t bytes, Semantics semantics, Scope scope, uint32_t line) {
    maybe_preempt();
    progress();
    address = atomic_address(space, address, line);
    uint8_t* p = resolve(address, bytes, false, true, true, scope, line);
    if (CHECKED) {
        const auto found = locations.find(address);
        if (found != locations.end()) forget_publications(found->second);  // a store ends a release sequence
        release_to(address, semantics, scope);
    }
    return p;
}

extern "C" uint8_t* atomic_begin(Space space, uint64_t address, uint32_t bytes, Semantics semantics, Scope scope, uint32_t line) {
    spin_yield(line);
    address = atomic_address(space, address, line);
    uint8_t* p = resolve(address, bytes, true, true, true, scope, line);
    if (CHECKED) subscribe(address, semantics, scope);
    return p;
}
extern "C" void atomic_end(uint8_t* p, Semantics semantics, Scope scope, bool changed) {
    if (!changed) return;
    progress();
    if (CHECKED) release_to((uint64_t)p, semantics, scope);
}

// ---- barriers

static Clock all;  // scratch of synchronise

static void synchronise(std::vector<Thread*>& threads) {
    if (!CHECKED || threads.empty()) return;
    for (Thread* t : threads) join(all, t->clock);
    for (Thread* t : threads) {
        join(t->clock, all);
        tick(t);
    }
    clear(all);
}

static void try_block_barrier(BlockState* block, BlockBarrier& barrier) {
    const uint32_t expected = barrier.count ? barrier.count : block->live;
    if (!barrier.arrived || barrier.arrived < expected) return;
    synchronise(barrier.participants);
    for (Thread* t : barrier.waiting)
        t->barrier_result = t->barrier_result == 1 ? barrier.votes : t->barrier_result == 2 ? barrier.all : barrier.any;
    wake(barrier.waiting);
    barrier.participants.clear();
    barrier.arrived = barrier.count = barrier.votes = barrier.any = 0;
    barrier.all = 1;
    progress();
}

extern "C" uint32_t block_barrier(uint32_t number, uint32_t count, bool arrive_only, int how, bool vote, uint32_t line) {
    if (CHECKED) maybe_preempt();
    BlockState* block = (BlockState*)current->block;
    if (number >= 16) stop("bad barrier: number %u at @%u@%s", number, line, whom().c_str());
    BlockBarrier& barrier = block->barriers[number];
    if (barrier.arrived && (barrier.count != count || (!count && barrier.line != line)))
        stop("divergent barrier: threads of one block wait at @%u@ and at @%u@%s", barrier.line, line, whom().c_str());
    barrier.line = line;
    barrier.count = count;
    barrier.arrived++;
    barrier.votes += vote;
    barrier.all &= vote;
    barrier.any |= vote;
    barrier.participants.push_back(current);
    progress();
    if (arrive_only) {
        try_block_barrier(block, barrier);
        return 0;
    }
    current->barrier_result = how;
    barrier.waiting.push_back(current);
    current->waits_for = "a barrier of its block";
    current->line = line;
    try_block_barrier(block, barrier);
    to_scheduler();
    return current->barrier_result;
}

static void try_cluster_barrier(Cluster* cluster) {
    if (!cluster->arrived || cluster->arrived < cluster->live) return;
    cluster->arrived = 0;
    cluster->phase++;
    wake(cluster->waiting);
    progress();
}

extern "C" void cluster_arrive(bool releases, uint32_t line) {
    if (CHECKED) maybe_preempt();
    Cluster* cluster = ((BlockState*)current->block)->in;
    if (current->cluster_arrived) stop("divergent barrier: barrier.cluster.arrive twice without wait at @%u@%s", line, whom().c_str());
    current->cluster_arrived = true;
    current->cluster_phase = cluster->phase;
    if (CHECKED) {
        if (cluster->arrived == 0) clear(cluster->published[cluster->phase & 1]);
        if (releases) {
            join(cluster->published[cluster->phase & 1], current->clock);
            tick(current);
        }
    }
    cluster->arrived++;
    progress();
    try_cluster_barrier(cluster);
}

extern "C" void cluster_wait(uint32_t line) {
    Cluster* cluster = ((BlockState*)current->block)->in;
    if (!current->cluster_arrived) stop("divergent barrier: barrier.cluster.wait without arrive at @%u@%s", line, whom().c_str());
    if (cluster->phase == current->cluster_phase) {
        cluster->waiting.push_back(current);
        wait_for("its cluster's barrier", line);
    }
    current->cluster_arrived = false;
    if (CHECKED) join(current->clock, cluster->published[current->cluster_phase & 1]);
}

// ---- warp collectives: the last lane to arrive computes for all

static void try_collective(Warp* warp, uint32_t mask) {
    const uint32_t members = mask & warp->present;  // exited lanes take no part
    if ((warp->arrived & members) != members || !members) return;
    Thread* lanes[32] = {};
    std::vector<Thread*> woken;
    for (int k = 0; k < 32; k++)
        if (members >> k & 1) {
            lanes[k] = warp->lanes[k];
            if (lanes[k]->mask != mask) return;
            woken.push_back(lanes[k]);
        }
    Thread* before = current;
    current = woken.back();
    if (woken.back()->collective == warp_sync) synchronise(woken);
    warp->arrived &= ~members;
    in_collective = true;
    woken.back()->collective(lanes, members);
    in_collective = false;
    current = before;
    wake(woken);
    progress();
}

extern "C" void warp_collective(Collective collective, const char* name, uint32_t mask, uint32_t line) {
    if (CHECKED) maybe_preempt();
    Warp* warp = current->warp;
    if (!(mask >> current->lane & 1))
        stop("warp: %s at @%u@ by lane %u, which is not in its own mask 0x%08x,%s", name, line, current->lane, mask, whom().c_str());
    const bool whole = strncmp(name, "mma", 3) == 0 || strncmp(name, "ldm", 3) == 0;
    if (whole && warp->present != ~0u)
        stop("warp: %s at @%u@ needs all 32 lanes, present are 0x%08x,%s", name, line, warp->present, whom().c_str());
    current->collective = collective;
    current->collective_name = name;
    current->mask = mask;
    for (int k = 0; k < 32; k++)
        if (mask >> k & 1 && warp->arrived >> k & 1) {
            Thread* other = warp->lanes[k];
            if (other->mask != mask || other->collective != collective)
                stop("warp: lanes disagree: %s with mask 0x%08x at @%u@, %s with mask 0x%08x at @%u@%s", name, mask, line,
                     other->collective_name, other->mask, other->line, whom().c_str());
        }
    warp->arrived |= 1u << current->lane;
    current->waits_for = "the other lanes of its warp";
    current->line = line;
    try_collective(warp, mask);
    to_scheduler();
}

extern "C" void warp_sync(Thread**, uint32_t) {}

// Source lane by PTX's pseudo code: c holds the clamp in bits 0-4 and the segment mask in bits 8-12.
static void shuffle(Thread** lanes, uint32_t mask, int how) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        const uint32_t b = lanes[lane]->in[1] & 31, c = lanes[lane]->in[2];
        const uint32_t segment = c >> 8 & 31, clamp = c & 31;
        const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        int source;
        bool inside;
        switch (how) {
            case 0: source = lowest | (b & ~segment), inside = source <= highest; break;
            case 1: source = lane - (int)b, inside = source >= highest; break;
            case 2: source = lane + (int)b, inside = source <= highest; break;
            default: source = lane ^ (int)b, inside = source <= highest; break;
        }
        if (!inside) source = lane;
        if (!(mask >> source & 1)) {
            current = lanes[lane];
            stop("warp: %s at @%u@ reads lane %d, which takes no part,%s", lanes[lane]->collective_name, lanes[lane]->line, source,
                 whom().c_str());
        }
        lanes[lane]->out[0] = lanes[source]->in[0];
        lanes[lane]->out[1] = inside;
    }
}
extern "C" void shuffle_idx(Thread** lanes, uint32_t mask) { shuffle(lanes, mask, 0); }
extern "C" void shuffle_up(Thread** lanes, uint32_t mask) { shuffle(lanes, mask, 1); }
extern "C" void shuffle_down(Thread** lanes, uint32_t mask) { shuffle(lanes, mask, 2); }
extern "C" void shuffle_bfly(Thread** lanes, uint32_t mask) { shuffle(lanes, mask, 3); }

#define REDUCE(name, type, expression)                          \
    extern "C" void name(Thread** lanes, uint32_t mask) {       \
        type a = 0;                                             \
        bool first = true;                                      \
        for (int k = 0; k < 32; k++)                            \
            if (mask >> k & 1) {                                \
                const type b = (type)(uint32_t)lanes[k]->in[0]; \
                a = first ? b : (type)(expression);             \
                first = false;                                  \
            }                                                   \
        for (int k = 0; k < 32; k++)                            \
            if (mask >> k & 1) lanes[k]->out[0] = (uint32_t)a;  \
    }
REDUCE(reduce_add, uint32_t, a + b)
REDUCE(reduce_and, uint32_t, a& b)
REDUCE(reduce_or, uint32_t, a | b)
REDUCE(reduce_xor, uint32_t, a ^ b)
REDUCE(reduce_min_u32, uint32_t, a < b ? a : b)
REDUCE(reduce_max_u32, uint32_t, a > b ? a : b)
REDUCE(reduce_min_s32, int32_t, a < b ? a : b)
REDUCE(reduce_max_s32, int32_t, a > b ? a : b)

#define VOTE(name, expression)                          \
    extern "C" void name(Thread** lanes, uint32_t mask) { \
        uint32_t yes = 0;                               \
        for (int k = 0; k < 32; k++)                    \
            if (mask >> k & 1 && lanes[k]->in[0]) yes |= 1u << k; \
        for (int k = 0; k < 32; k++)                    \
            if (mask >> k & 1) lanes[k]->out[0] = (expression);   \
    }
VOTE(vote_all, yes == mask)
VOTE(vote_any, yes != 0)
VOTE(vote_uni, yes == mask || yes == 0)
VOTE(vote_ballot, yes)

extern "C" void match_any(Thread** lanes, uint32_t mask) {
    for (int k = 0; k < 32; k++)
        if (mask >> k & 1) {
            lanes[k]->out[0] = 0;
            for (int j = 0; j < 32; j++)
                if (mask >> j & 1 && lanes[j]->in[0] == lanes[k]->in[0]) lanes[k]->out[0] |= 1u << j;
        }
}
extern "C" void match_all(Thread** lanes, uint32_t mask) {
    bool same = true;
    for (int k = 0; k < 32; k++)
        if (mask >> k & 1) same &= lanes[k]->in[0] == lanes[__builtin_ctz(mask)]->in[0];
    for (int k = 0; k < 32; k++)
        if (mask >> k & 1) lanes[k]->out[0] = same ? mask : 0, lanes[k]->out[1] = same;
}

// Lane l of ldmatrix gives the address of row l % 8 of matrix l / 8 and receives elements 2 (l % 4) and the next of row
// l / 4 of every matrix; .trans: of column l / 4. (PTX ISA, warp-level matrix load)
template <int count, bool trans>
void load_matrix(Thread** lanes, uint32_t) {
    uint16_t matrix[count][8][8];
    Thread* before = current;
    for (int row = 0; row < 8 * count; row++) {
        current = lanes[row];
        memcpy(matrix[row / 8][row % 8], touch_shared(current->in[0], 16, false, (uint32_t)current->in[1]), 16);
    }
    current = before;
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < count; m++) {
            const int a = lane / 4, b = lane % 4 * 2;
            const uint16_t low = trans ? matrix[m][b][a] : matrix[m][a][b];
            const uint16_t high = trans ? matrix[m][b + 1][a] : matrix[m][a][b + 1];
            lanes[lane]->out[m] = (uint32_t)high << 16 | low;
        }
}

// D = A B + C, A [16, K] row, B [K, 8] column. Fragments (PTX ISA, mma.m16n8k*), g = lane / 4, t = lane % 4:
// 16-bit: a register r holds row g + 8 (r % 2), columns 8 (r / 2) + 2t, 2t + 1; b register r holds rows 8r + 2t, 2t + 1
// of column g. tf32: a register r is row g + 8 (r % 2), column t + 4 (r / 2); b register r is row t + 4r, column g.
// float C: rows g, g, g + 8, g + 8, columns 2t, 2t + 1. half C: register r holds row g + 8r, columns 2t, 2t + 1.
// c plus products of a and b as tensor cores are known to add them: `tensor_block` at once, each cut off below the largest
// one's last place and `tensor_bits` more, and the sum cut off to a float. Products are aligned as they come, not normalised.
// Published: blocks of 8 and 1 bit more on an A100, of 16 and 2 on an H100 (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior
// of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021; Khattak, Mikaitis: Accurate models of NVIDIA tensor cores,
// arXiv 2512.07004, 2025).
static float add_products(float c, const double* a, const double* b, int b_stride, int K) {
    double terms[17], exact = c, sum = 0;
    int highest = -10000, exponent, other;
    terms[0] = c;
    if (c != 0) frexp(c, &highest);
    for (int k = 0; k < K; k++) {
        terms[k + 1] = a[k] * b[k * b_stride];
        exact += terms[k + 1];
        if (terms[k + 1] == 0) continue;
        frexp(a[k], &exponent), frexp(b[k * b_stride], &other);
        highest = std::max(highest, exponent + other - 1);
    }
    if (!std::isfinite(exact) || highest == -10000) return (float)exact;
    const int last = highest - 24 - launch.tensor_bits;
    for (int k = 0; k <= K; k++) sum += ldexp(trunc(ldexp(terms[k], -last)), last);
    const float rounded = (float)sum;
    if (fabs(sum) >= 0x1p128) return rounded;
    return fabs((double)rounded) > fabs(sum) ? nextafterf(rounded, 0.0f) : rounded;
}

template <class Kind, class Result, int K>
void multiply_matrices(Thread** lanes, uint32_t) {
    constexpr bool wide = std::is_same<Kind, tf32>::value;
    constexpr int as_ = wide ? K / 2 : K / 4, bs = as_ / 2, cs = sizeof(Result) == 4 ? 4 : 2;
    double a[16][K], b[K][8];
    float d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        const uint64_t* in = lanes[lane]->in;
        if constexpr (wide) {  // the lowest 13 bits do not count
            for (int r = 0; r < as_; r++) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = as<float>((uint32_t)in[r] & 0xffffe000);
            for (int r = 0; r < bs; r++) b[t + 4 * r][g] = as<float>((uint32_t)in[as_ + r] & 0xffffe000);
        } else {
            for (int r = 0; r < as_; r++)
                for (int e = 0; e < 2; e++)
                    a[g + 8 * (r % 2)][8 * (r / 2) + 2 * t + e] = as<Kind>((uint16_t)(in[r] >> 16 * e));
            for (int r = 0; r < bs; r++)
                for (int e = 0; e < 2; e++) b[8 * r + 2 * t + e][g] = as<Kind>((uint16_t)(in[as_ + r] >> 16 * e));
        }
        for (int e = 0; e < 4; e++) {
            float& c = d[g + 8 * (e / 2)][2 * t + e % 2];
            if constexpr (sizeof(Result) == 4)
                c = as<float>((uint32_t)in[as_ + bs + e]);
            else
                c = (float)(double)as<half>((uint16_t)(in[as_ + bs + e / 2] >> 16 * (e % 2)));
        }
    }
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            float& sum = d[row][column];
            const int block = std::min(launch.tensor_block, K);
            for (int k = 0; k < K && !block; k++) sum += (float)(a[row][k] * b[k][column]);
            for (int k = 0; k < K && block; k += block) sum = add_products(sum, a[row] + k, &b[k][column], 8, block);
        }
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < cs; r++) {
            if constexpr (sizeof(Result) == 4)
                lanes[lane]->out[r] = as<uint32_t>(d[g + 8 * (r / 2)][2 * t + r % 2]);
            else
                lanes[lane]->out[r] =
                    half(d[g + 8 * r][2 * t]).bits | (uint32_t)half(d[g + 8 * r][2 * t + 1]).bits << 16;
        }
    }
}

// All that translate.py may ask for.
template void load_matrix<1, false>(Thread**, uint32_t);
template void load_matrix<2, false>(Thread**, uint32_t);
template void load_matrix<4, false>(Thread**, uint32_t);
template void load_matrix<1, true>(Thread**, uint32_t);
template void load_matrix<2, true>(Thread**, uint32_t);
template void load_matrix<4, true>(Thread**, uint32_t);
template void multiply_matrices<bfloat, float, 16>(Thread**, uint32_t);
template void multiply_matrices<bfloat, float, 8>(Thread**, uint32_t);
template void multiply_matrices<half, float, 16>(Thread**, uint32_t);
template void multiply_matrices<half, float, 8>(Thread**, uint32_t);
template void multiply_matrices<half, half, 16>(Thread**, uint32_t);
template void multiply_matrices<half, half, 8>(Thread**, uint32_t);
template void multiply_matrices<tf32, float, 8>(Thread**, uint32_t);
template void multiply_matrices<tf32, float, 4>(Thread**, uint32_t);

// ---- cp.async: from its issue until the thread waits for it the target holds nothing that may be read; the bytes move when
// the thread waits. Both ends count as writes, so what others do to the target must come before the issue or after the wait.

extern "C" void copy_async(uint64_t to, uint64_t from, uint32_t bytes, uint32_t used, uint32_t line) {
    used = std::min(bytes, used);
    for (uint32_t k = 0; k < used; k += 4) touch(from + k, std::min(4u, used - k), false, line);
    uint8_t* target = touch_shared(to, bytes, true, line);
    if (CHECKED) {
        Region& region = *region_of((uint64_t)target);
        const uint64_t first = (uint64_t)target - region.address;
        for (uint64_t k = first / region.granule; k < (first + bytes) / region.granule; k++)
            region.cells[k].write.initialised = 0;
    }
    current->copies.push_back(Copy{to, from, bytes, used, line, current->copy_group});
}
extern "C" void copy_commit() { current->copy_group++; }

// Waits for all groups but the `newest` latest; -1: for all, committed or not.
extern "C" void copy_wait(int newest, uint32_t) {
    auto& copies = current->copies;
    size_t done = 0;
    for (; done < copies.size(); done++) {
        const Copy copy = copies[done];
        if (newest >= 0 && copy.group + newest >= current->copy_group) break;
        uint8_t data[16] = {};
        for (uint32_t k = 0; k < copy.used; k += 4) {
            const uint32_t bytes = std::min(4u, copy.used - k);
            memcpy(data + k, touch(copy.from + k, bytes, false, copy.line), bytes);
        }
        memcpy(touch_shared(copy.to, copy.bytes, true, copy.line), data, copy.bytes);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

// ---- mbarriers and asynchronous stores (PTX ISA, mbarrier and st.async)
//
// A phase of an mbarrier ends when nobody is missing and as many bytes have arrived as were expected; bytes may arrive
// before they are expected. Waiting for a parity is waiting for the latest phase of this parity to be over, so nobody may
// fall behind by two phases.

struct Mbarrier {
    uint32_t expected, missing, phase;
    int64_t bytes;
    Block* block;
    Clock gathering[2], done[2];  // of this phase and the one before: by this block's threads, by others
};
static std::unordered_map<uint64_t, Mbarrier> mbarriers;
static const int64_t MOST = (1 << 20) - 1;  // arrivals, and bytes under way

static void forget_mbarrier(Mbarrier& barrier) {
    for (int k = 0; k < 2; k++) drop(barrier.gathering[k]), drop(barrier.done[k]);
}

static Mbarrier& mbarrier_at(uint64_t& address, uint32_t line) {
    Block* block = owner(address, line);
    address += (uint64_t)block->window;
    resolve(address, 8, true, false, true, cluster, line);
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end()) stop("mbarrier: there is none, it was not initialised or is invalid, at @%u@%s", line, whom().c_str());
    return found->second;
}

static void end_phase(Mbarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.missing = barrier.expected;
    barrier.phase++;
    for (int k = 0; k < 2; k++) {
        drop(barrier.done[k]);
        barrier.done[k] = barrier.gathering[k];
        barrier.gathering[k] = Clock();
    }
    progress();
}

extern "C" void mbarrier_init(uint64_t address, uint32_t count, uint32_t line) {
    uint8_t* p = touch_shared(address, 8, true, line);
    if (count < 1 || count > MOST) stop("mbarrier: initialised for %u arrivals at @%u@%s", count, line, whom().c_str());
    if (mbarriers.count((uint64_t)p)) stop("mbarrier: initialised twice at @%u@%s", line, whom().c_str());
    mbarriers[(uint64_t)p] = Mbarrier{count, count, 0, 0, owner(address, line), {}, {}};
}

extern "C" void mbarrier_invalidate(uint64_t address, uint32_t line) {
    Mbarrier& barrier = mbarrier_at(address, line);
    touch(address, 8, true, line);
    forget_mbarrier(barrier);
    mbarriers.erase(address);
}

static void add_bytes(Mbarrier& barrier, int64_t more, uint32_t line) {
    barrier.bytes += more;
    if (barrier.bytes > MOST || barrier.bytes < -MOST)
        stop("mbarrier: %lld bytes under way, more than it can count, at @%u@%s", (long long)barrier.bytes, line, whom().c_str());
}

extern "C" void mbarrier_arrive(uint64_t address, uint32_t count, uint32_t bytes, bool releases, Scope scope, uint32_t line) {
    if (CHECKED) maybe_preempt();
    Mbarrier& barrier = mbarrier_at(address, line);
    if (count > barrier.missing)
        stop("mbarrier: %u arrivals where %u are missing at @%u@%s", count, barrier.missing, line, whom().c_str());
    add_bytes(barrier, bytes, line);
    const bool other = current->block != barrier.block;
    if (CHECKED && releases && (!other || scope != cta)) {
        join(barrier.gathering[other], current->clock);
        tick(current);
    }
    barrier.missing -= count;
    progress();
    end_phase(barrier);
}

extern "C" void mbarrier_bytes(uint64_t address, int64_t more, uint32_t line) {
    if (CHECKED) maybe_preempt();
    Mbarrier& barrier = mbarrier_at(address, line);
    add_bytes(barrier, more, line);
    progress();
    end_phase(barrier);
}

extern "C" bool mbarrier_wait(uint64_t address, uint32_t parity, bool acquires, Scope scope, uint32_t line) {
    spin_yield(line);
    Mbarrier& barrier = mbarrier_at(address, line);
    if (barrier.block != current->block) stop("mbarrier: a wait for that of another block at @%u@%s", line, whom().c_str());
    if ((barrier.phase & 1) == (parity & 1)) return false;
    if (CHECKED) {
        join(acquires ? current->clock : current->pending[cta], barrier.done[0]);
        if (scope != cta) join(acquires ? current->clock : current->pending[cluster], barrier.done[1]);
    }
    return true;
}

// fence.acquire.sync_restrict::shared::cluster.cluster, behind a wait that does not acquire. It orders accesses to shared
// memory alone; here those of asynchronous stores, which go nowhere else.
extern "C" void fence_shared() {
    if (!CHECKED) return;
    for (int s = cta; s <= cluster; s++) {
        const Clock& known = current->pending[s];
        if (known.low == known.high) continue;
        widen(current->clock, known.low, known.high);
        for (uint32_t k = known.low; k < known.high; k++)
            if (stride > 1 && k % stride != DONE) current->clock.at[k] = std::max(current->clock.at[k], known.at[k]);
    }
}

// An asynchronous store is checked when it is issued and arrives later, between any two steps of the threads. Its arrival
// releases its own bytes and nothing that its thread did before (PTX ISA, asynchronous operations). But what the thread
// had read by then was read before: the store could not depend on it otherwise.
struct Store {
    uint64_t to, barrier;
    uint32_t bytes, line, thread, clock;
    bool other;  // by another block than the barrier's
    uint8_t data[16];
};
static std::deque<Store> in_flight;

extern "C" void store_async(uint64_t to, uint32_t bytes, const uint8_t* data, uint64_t barrier_address, uint32_t line) {
    if (CHECKED) maybe_preempt();
    Block* target = owner(to, line);
    to += (uint64_t)target->window;
    if (to + bytes > (uint64_t)target->window + launch.window)
        stop("out of bounds: %u bytes behind the shared memory of its target at @%u@%s", bytes, line, whom().c_str());
    Mbarrier& barrier = mbarrier_at(barrier_address, line);
    if (barrier.block != target) stop("mbarrier: that of another block than the target's at @%u@%s", line, whom().c_str());
    issuing = true;
    resolve(to, bytes, false, true, false, cta, line);
    issuing = false;
    Store store = {to, barrier_address, bytes, line, current->index, 0, current->block != target, {}};
    memcpy(store.data, data, bytes);
    if (CHECKED) {
        store.clock = now(current);
        const Clock& known = current->clock;
        Clock& gathering = barrier.gathering[store.other];
        widen(gathering, known.low, known.high);
        for (uint32_t k = known.low; k < known.high; k += stride) {
            uint32_t* into = gathering.at + k;
            into[READ] = std::max({into[READ], known.at[k + DONE], known.at[k + READ]});
            into[OVERWRITABLE] = std::max({into[OVERWRITABLE], known.at[k + ARRIVED], known.at[k + OVERWRITABLE]});
        }
        tick(current);
    }
    in_flight.push_back(store);
    progress();
}

// One of them arrives. The scheduler calls this, so there is no thread to leave: an error ends the launch.
static void arrive(size_t number) {
    const Store store = in_flight[number];
    in_flight.erase(in_flight.begin() + number);
    progress();
    const Region* region = region_of(store.to);
    const auto found = mbarriers.find(store.barrier);
    const uint32_t per_block = launch.block[0] * launch.block[1] * launch.block[2];
    const char* wrong = !region || !region->alive ? "dead shared memory: it arrives in a block that has exited"
                        : found == mbarriers.end() ? "mbarrier: it arrives at one that is invalid"
                                                   : nullptr;
    if (!wrong && (found->second.bytes -= store.bytes) < -MOST) wrong = "mbarrier: more bytes than it can count";
    if (wrong) {
        snprintf(error_text, sizeof error_text, "%s: the asynchronous store at @%u@ by block %u, thread %u", wrong, store.line,
                 store.thread / per_block, store.thread % per_block);
        failed = true;
        return;
    }
    memcpy((void*)store.to, store.data, store.bytes);
    Mbarrier& barrier = found->second;
    if (CHECKED) {
        const uint64_t first = store.to - region->address;
        for (uint64_t k = first / region->granule; k * region->granule < first + store.bytes; k++) {
            Access& write = region->cells[k].write;
            if (write.async && write.thread == store.thread && write.clock == clock_base + store.clock) write.initialised = 1;
        }
        Clock& gathering = barrier.gathering[store.other];
        widen(gathering, store.thread * stride, (store.thread + 1) * stride);
        uint32_t& arrived = gathering.at[store.thread * stride + ARRIVED];
        arrived = std::max(arrived, store.clock);
    }
    end_phase(barrier);
}

// Between two steps: in ascending order all of them, the oldest first; in descending order the newest; in random order
// perhaps one. Where no thread can run, one must.
static void some_arrive() {
    if (in_flight.empty()) return;
    if (launch.policy == 0)
        while (!in_flight.empty() && !failed) arrive(0);
    else if (launch.policy == 1)
        arrive(in_flight.size() - 1);
    else if (ready.empty() || random_bits() % 4 == 0)
        arrive(random_bits() % in_flight.size());
}

// ---- printf and assert

static std::string printed;

extern "C" void print(uint8_t* format, uint8_t* arguments, uint8_t* result) {
    const char* text = (const char*)get<uint64_t>(format);
    const uint8_t* next = (const uint8_t*)get<uint64_t>(arguments);
    char buffer[512];
    while (*text) {
        if (*text != '%' || text[1] == '%') {
            printed += *text;
            text += *text == '%' ? 2 : 1;
            continue;
        }
        const size_t length = strcspn(text + 1, "diouxXeEfFgGcsp") + 2;
        const std::string one(text, length);
        const char kind = one.back();
        const bool wide = one.find('l') != std::string::npos || kind == 's' || kind == 'p' || strchr("eEfFgG", kind);
        if (wide) next = (const uint8_t*)(((uint64_t)next + 7) & ~7ull);
        if (strchr("eEfFgG", kind))
            snprintf(buffer, sizeof buffer, one.c_str(), get<double>(next));
        else if (wide)
            snprintf(buffer, sizeof buffer, one.c_str(), get<uint64_t>(next));
        else
            snprintf(buffer, sizeof buffer, one.c_str(), get<uint32_t>(next));
        printed += buffer;
        next += wide ? 8 : 4;
        text += length;
    }
    set(result, 0);
}
extern "C" const char* emulator_printed() { return printed.c_str(); }

extern "C" [[noreturn]] void assert_fail(uint8_t* message, uint8_t*, uint8_t*, uint8_t*, uint8_t*, uint32_t line) {
    stop("assert: %s at @%u@%s", (const char*)get<uint64_t>(message), line, whom().c_str());
}

// ---- launching

static std::vector<Cluster*> live_clusters;
static std::vector<Thread*> all_threads;  // of the live clusters and the finished ones, until the launch ends
static std::vector<BlockState*> all_blocks;
static std::vector<Cluster*> all_clusters;
static uint32_t clusters_alive;

static void thread_ends() {
    Thread* t = current;
    BlockState* block = (BlockState*)t->block;
    t->done = true;
    t->warp->present &= ~(1u << t->lane);
    progress();
    block->live--;
    block->in->live--;
    if (block->live == 0) {
        block->finished = true;
        region_of((uint64_t)block->window)->alive = false;
        for (auto at = mbarriers.begin(); at != mbarriers.end();)
            if (at->second.block == block) {
                forget_mbarrier(at->second);
                at = mbarriers.erase(at);
            } else {
                ++at;
            }
        bool left = false;
        for (Block* peer : block->in->blocks) left |= !peer->finished;
        if (!left) clusters_alive--;
    }
    // Whoever waits for this thread need not any longer: exited threads count as arrived.
    for (int k = 0; k < 32; k++)
        if (t->warp->arrived >> k & 1) try_collective(t->warp, t->warp->lanes[k]->mask);
    for (BlockBarrier& barrier : block->barriers)
        if (barrier.arrived && !barrier.count && block->live) try_block_barrier(block, barrier);
    if (block->in->live) try_cluster_barrier(block->in);
}

extern "C" [[noreturn]] void leave() {
    thread_ends();
    to_scheduler();
    abort();
}

static void free_thread(Thread* t) {
    for (Clock* clock : {&t->clock, &t->fenced[0], &t->fenced[1], &t->fenced[2], &t->pending[0], &t->pending[1], &t->pending[2]})
        drop(*clock);
    free_stacks.push_back(t->stack);
    release_context(t);
    delete t;
}

static uint32_t start_cluster(uint32_t number) {  // returns 1 where memory ran out
    uint32_t clusters[3];
    for (int k = 0; k < 3; k++) clusters[k] = launch.grid[k] / launch.cluster[k];
    const uint32_t where[3] = {number % clusters[0], number / clusters[0] % clusters[1], number / clusters[0] / clusters[1]};
    Cluster* cluster = new Cluster();
    all_clusters.push_back(cluster);
    clusters_alive++;
    const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
    const uint32_t size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
    std::vector<Thread*> created;
    for (uint32_t rank = 0; rank < size; rank++) {
        BlockState* block = new BlockState();
        all_blocks.push_back(block);
        cluster->blocks.push_back(block);
        block->index[0] = where[0] * launch.cluster[0] + rank % launch.cluster[0];
        block->index[1] = where[1] * launch.cluster[1] + rank / launch.cluster[0] % launch.cluster[1];
        block->index[2] = where[2] * launch.cluster[2] + rank / launch.cluster[0] / launch.cluster[1];
        block->number = (block->index[2] * launch.grid[1] + block->index[1]) * launch.grid[0] + block->index[0];
        block->rank = rank;
        block->in = cluster;
        block->live = threads;
        char name[64];
        snprintf(name, sizeof name, "shared memory of block (%u, %u, %u)", block->index[0], block->index[1], block->index[2]);
        block->window = (uint8_t*)emulator_allocate(launch.window, name, 0);
        if (!block->window) return 1;
        if (CHECKED)
            for (uint32_t g = 0; g < launch.gap_count; g++)
                for (uint32_t k = (launch.gaps[2 * g] + 3) / 4; k < launch.gaps[2 * g + 1] / 4; k++)
                    region_of((uint64_t)block->window)->cells[k].write.initialised = GAP;
        for (BlockBarrier& barrier : block->barriers) barrier.all = 1;
        for (uint32_t n = 0; n < threads; n++) {
            Thread* t = new Thread();
            all_threads.push_back(t);
            t->block = block;
            t->number = n;
            t->index = block->number * threads + n;
            t->lane = n % 32;
            t->tid[0] = n % launch.block[0];
            t->tid[1] = n / launch.block[0] % launch.block[1];
            t->tid[2] = n / launch.block[0] / launch.block[1];
            if (n % 32 == 0) block->warps.push_back(new Warp());
            t->warp = block->warps.back();
            t->warp->lanes[t->lane] = t;
            t->warp->present |= 1u << t->lane;
            t->stack = new_stack();
            prepare(t, n % 16 * 256);  // else all stacks meet in the same lines of the cache
            block->threads.push_back(t);
            created.push_back(t);
            if (CHECKED) {
                widen(t->clock, t->index * stride, (t->index + 1) * stride);
                tick(t);
            }
        }
        cluster->live += threads;
    }
    wake(created);
    return 0;
}

static void end_launch() {
    for (Thread* t : all_threads) free_thread(t);
    for (BlockState* block : all_blocks) {
        for (Warp* warp : block->warps) delete warp;
        if (block->window) emulator_free((uint64_t)block->window);
        delete block;
    }
    for (Cluster* cluster : all_clusters) {
        for (Clock& clock : cluster->published) drop(clock);
        delete cluster;
    }
    for (auto& barrier : mbarriers) forget_mbarrier(barrier.second);
    mbarriers.clear();
    in_flight.clear();
    for (auto& location : locations) forget_publications(location.second);
    locations.clear();
    drop(all);  // its size is the grid's
    all_threads.clear();
    all_blocks.clear();
    all_clusters.clear();
    ready.clear();
    current = nullptr;
    if (!chained) concurrent_base = clock_base;
    chained = false;
    clock_base += highest_clock + 1;  // older entries in the histories are from earlier launches: ordered
}

static void report_deadlock() {
    std::string text = "deadlock: nobody can run;";
    int shown = 0;
    for (Thread* t : all_threads)
        if (!t->done && shown++ < 4) {
            describe(text, t);
            text += std::string(" waits for ") + (t->waits_for ? t->waits_for : "?") + " at @" + std::to_string(t->line) + "@;";
        }
    snprintf(error_text, sizeof error_text, "%s", text.c_str());
    failed = true;
}

// Frees the windows and fibers of finished clusters while a large grid runs.
static void reap() {
    if (all_threads.size() < 8192) return;
    std::vector<Thread*> kept;
    for (Thread* t : all_threads) {
        bool over = true;
        for (Block* peer : ((BlockState*)t->block)->in->blocks) over &= peer->finished;
        if (over)
            free_thread(t);
        else
            kept.push_back(t);
    }
    all_threads.swap(kept);
    for (BlockState* block : all_blocks) {
        bool over = true;
        for (Block* peer : block->in->blocks) over &= peer->finished;
        if (over && block->window) {
            for (auto at = locations.begin(); at != locations.end();)
                if (at->first - (uint64_t)block->window < launch.window) {
                    forget_publications(at->second);
                    at = locations.erase(at);
                } else {
                    ++at;
                }
            emulator_free((uint64_t)block->window);
            block->window = nullptr;
        }
    }
}

extern "C" int emulator_launch(Entry function, uint8_t* params, const Launch* how, char* error, uint64_t error_bytes) {
    launch = *how;
    entry = function;
    parameters = params;
    failed = in_collective = issuing = false;
    printed.clear();
    idle_spins = 0;
    steps_left = launch.steps;
    random_state = launch.seed;
    highest_clock = 0;
    clusters_alive = 0;
    const uint32_t blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    grid_threads = blocks * launch.block[0] * launch.block[1] * launch.block[2];
    stride = launch.asynchronous ? KINDS_OF_TIME : 1;
    std::vector<uint32_t> order(blocks / (launch.cluster[0] * launch.cluster[1] * launch.cluster[2]));
    for (uint32_t k = 0; k < order.size(); k++) order[k] = k;
    if (launch.policy == 1) std::reverse(order.begin(), order.end());
    if (launch.policy == 2)
        for (uint32_t k = order.size(); k > 1; k--) std::swap(order[k - 1], order[random_bits() % k]);
    const uint32_t residency = launch.cooperative ? ~0u : launch.residency;
#ifdef PORTABLE_FIBERS
    scheduler_pointer = &scheduler_context;
#endif
    size_t next = 0;
    while (!failed) {
        while (next < order.size() && clusters_alive < residency) {
            reap();
            if (start_cluster(order[next++])) {
                snprintf(error_text, sizeof error_text, "bad launch: the emulator's memory is full");
                failed = true;
                break;
            }
        }
        if (!failed) some_arrive();
        if (failed) break;
        if (ready.empty()) {
            if (!in_flight.empty()) continue;
            if (next == order.size() && clusters_alive == 0) break;
            if (clusters_alive < residency && next < order.size()) continue;
            report_deadlock();
            break;
        }
        if (launch.policy == 2) std::swap(ready[0], ready[random_bits() % ready.size()]);
        current = ready.front();
        ready.pop_front();
#ifdef PORTABLE_FIBERS
        void* here = &scheduler_context;
        switch_context(&here, current->stack_pointer);
#else
        switch_context(&scheduler_pointer, current->stack_pointer);
#endif
    }
    end_launch();
    if (failed) snprintf(error, error_bytes, "%s", error_text);
    return failed;
}

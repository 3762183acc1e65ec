// Threads of the CPU code: aligned memory, a spin barrier, and a pool of sleeping threads for each caller.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

namespace {

constexpr size_t CACHE_LINE = 64;  // bytes, on x86-64 and most ARM processors

// Uninitialized memory that starts on a cache line. Nothing touches it here, so that the system places each page near the
// thread that writes it first.
template <typename T>
class AlignedBuffer {
    std::unique_ptr<T[]> memory;

public:
    explicit AlignedBuffer(size_t size = 0) : memory(new T[size + CACHE_LINE / sizeof(T)]) {}
    T* begin() const { return (T*)(((uintptr_t)memory.get() + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE); }
};

// Tells the processor that this thread waits in a loop.
inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until done(), which other threads make true. It spins for some microseconds, which is longer than the others take where each
// has a processor of its own, and then lets others run.
template <typename Done>
void wait_until(const Done& done) {
    for (int spins = 0; !done(); ++spins) spins < 2000 ? pause() : std::this_thread::yield();
}

// Each of `threads` threads waits here, once, until all of them have arrived.
class Barrier {
    std::atomic<int> missing;

public:
    explicit Barrier(int threads) : missing(threads) {}
    void wait() {
        missing.fetch_sub(1, std::memory_order_acq_rel);
        wait_until([this] { return missing.load(std::memory_order_acquire) <= 0; });
    }
};

// Each of `threads` threads waits here again and again: in every round until all of them have arrived.
class alignas(CACHE_LINE) Meeting {
    const int threads;
    std::atomic<int> arrived{0};
    alignas(CACHE_LINE) std::atomic<int> round{0};
    std::atomic<bool> abandoned{false};

public:
    explicit Meeting(int threads) : threads(threads) {}
    // Throws if a thread will not come.
    void wait() {
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        wait_until([&] {
            if (abandoned.load(std::memory_order_relaxed)) throw std::runtime_error("another thread has failed");
            return round.load(std::memory_order_acquire) != now;
        });
    }
    // Called by a thread that fails, so that no other waits for it.
    void abandon() { abandoned.store(true, std::memory_order_relaxed); }
};

// The system often starts a thread on its parent's processor, and may leave it there for longer than a whole time loop takes.
// These functions tell a thread where it runs, and move it off a processor.
#ifdef __linux__
int current_processor() { return sched_getcpu(); }
int current_process() { return (int)getpid(); }

void leave_processor(int processor) {
    cpu_set_t allowed;
    if (processor < 0 || sched_getaffinity(current_process(), sizeof allowed, &allowed) || CPU_COUNT(&allowed) < 2) return;
    CPU_CLR(processor, &allowed);
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_processor() { return -1; }
#ifdef _WIN32
int current_process() { return 0; }
#else
int current_process() { return (int)getpid(); }
#endif
void leave_processor(int) {}
#endif

// A thread that waits until it is given a task. It spins first, as the system takes about as long to wake a thread as a short time
// loop takes, and one call often follows another; then it sleeps.
class Worker {
    static constexpr std::chrono::microseconds SPIN{100};
    std::mutex mutex;
    std::condition_variable changed;
    void (*call)(const void* task, int number) = nullptr;
    const void* task = nullptr;
    std::atomic<int>* unfinished = nullptr;  // tasks of the same call
    int number, caller_processor = -1;
    std::atomic<bool> posted{false};         // whether there is a task, or `stopping`
    bool stopping = false;                   // set before it is posted
    bool asleep = false;                     // guarded by the mutex
    const bool spins;
    std::thread thread;  // must come last: it starts when the other members exist

    void wait() {
        const auto start = std::chrono::steady_clock::now();
        for (int round = 0; spins && !posted.load(std::memory_order_acquire); ++round) {
            pause();
            if (round % 64 == 63 && std::chrono::steady_clock::now() - start > SPIN) break;
        }
        std::unique_lock<std::mutex> lock(mutex);
        asleep = true;
        changed.wait(lock, [this] { return posted.load(std::memory_order_relaxed); });
        asleep = false;
    }
    void run() {
        for (;;) {
            wait();
            if (stopping) return;
            if (current_processor() == caller_processor) leave_processor(caller_processor);
            call(task, number);
            posted.store(false, std::memory_order_relaxed);
            unfinished->fetch_sub(1, std::memory_order_release);
        }
    }
    void post() {
        bool wake;
        {
            std::lock_guard<std::mutex> lock(mutex);
            posted.store(true, std::memory_order_release);
            wake = asleep;
        }
        if (wake) changed.notify_one();
    }

public:
    // spins: whether there is a processor for it.
    Worker(int number, bool spins) : number(number), spins(spins), thread([this] { run(); }) {}
    ~Worker() {
        wait_until([this] { return !posted.load(std::memory_order_acquire); });
        stopping = true;
        post();
        thread.join();
    }
    void start(void (*new_call)(const void*, int), const void* new_task, std::atomic<int>* counter, int processor) {
        call = new_call, task = new_task, unfinished = counter, caller_processor = processor;
        post();
    }
};

// The workers of one calling thread. They live from its first call that needs them until the thread ends. A fork does not copy
// them: the child starts its own, and never touches what it inherited of the parent's.
struct WorkerPool {
    std::vector<std::unique_ptr<Worker>>* workers = nullptr;
    int owner = 0;  // process

    // At least `count` workers. Throws if the system refuses memory or threads.
    std::vector<std::unique_ptr<Worker>>& reserve(int count) {
        if (!workers || owner != current_process())
            workers = new std::vector<std::unique_ptr<Worker>>, owner = current_process();
        workers->reserve(count);
        const int processors = (int)std::thread::hardware_concurrency();
        while ((int)workers->size() < count)
            workers->emplace_back(new Worker((int)workers->size() + 1, (int)workers->size() + 1 < processors));
        return *workers;
    }
    ~WorkerPool() {
        if (owner == current_process()) delete workers;
    }
};
thread_local WorkerPool worker_pool;

// While an object of this class lives, its thread flushes subnormal numbers to zero (below 2^-126, in double 2^-1022), as GPUs
// do in float. Arithmetic on subnormal numbers takes a processor up to a hundred times as long.
class FlushToZero {
#if defined(__x86_64__) || defined(_M_X64)
    unsigned before = _mm_getcsr();

public:
    FlushToZero() { _mm_setcsr(before | 0x8040); }  // FTZ for results, DAZ for operands
    ~FlushToZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

public:
    FlushToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
public:
    FlushToZero() {}
    ~FlushToZero() {}
#endif
};

// Keeps the first exception that any of several threads throws.
class FirstException {
    std::atomic<bool> caught{false};
    std::exception_ptr first;

public:
    void catch_current() {
        if (!caught.exchange(true)) first = std::current_exception();
    }
    // Call this when all the threads have finished.
    void rethrow() const {
        if (first) std::rethrow_exception(first);
    }
};

// Runs work(0) ... work(threads - 1) at once, work(0) on the calling thread. Rethrows the first exception. Work that waits at a
// Barrier must not throw before it.
template <typename Work>
void on_threads(int threads, const Work& work) {
    std::atomic<int> unfinished(threads - 1);
    FirstException exception;
    const auto run = [&](int number) {
        const FlushToZero flush;
        try {
            work(number);
        } catch (...) {
            exception.catch_current();
        }
    };
    if (threads > 1) {
        const int processor = current_processor();
        typedef decltype(run) Run;
        const auto call = [](const void* run, int number) { (*(Run*)run)(number); };
        // reserve all before any starts: they wait for one another at barriers
        auto& workers = worker_pool.reserve(threads - 1);
        for (int i = 0; i < threads - 1; ++i) workers[i]->start(call, &run, &unfinished, processor);
    }
    run(0);
    wait_until([&] { return unfinished.load(std::memory_order_acquire) == 0; });
    exception.rethrow();
}

}  // namespace

// Threads of the CPU code: aligned memory, a spin barrier, and a pool of sleeping threads for each caller.

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
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

// Room for numbers that begins where a cache line does. Not touched before it is used: its pages go to whoever fills it.
template <typename T>
class Lines {
    std::unique_ptr<T[]> memory;

public:
    explicit Lines(size_t size = 0) : memory(new T[size + 64 / sizeof(T)]) {}
    T* begin() const { return (T*)(((uintptr_t)memory.get() + 63) / 64 * 64); }
};

// Where threads wait for one another, once.
class Meeting {
    std::atomic<int> missing;

public:
    explicit Meeting(int threads) : missing(threads) {}
    void wait() {
        missing.fetch_sub(1, std::memory_order_acq_rel);
        while (missing.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }
};

// Which processor this thread is on, and how it leaves that one where another thread of the process works on it, too. The system
// often begins a new thread beside its parent, and may leave it there for longer than a whole walk takes.
#ifdef __linux__
int processor() { return sched_getcpu(); }
int process() { return (int)getpid(); }

void leave(int processor) {
    cpu_set_t some;
    if (processor < 0 || sched_getaffinity(process(), sizeof some, &some) || CPU_COUNT(&some) < 2) return;
    CPU_CLR(processor, &some);
    sched_setaffinity(0, sizeof some, &some);
}
#else
int processor() { return -1; }
#ifdef _WIN32
int process() { return 0; }
#else
int process() { return (int)getpid(); }
#endif
void leave(int) {}
#endif

// A thread that sleeps until there is work for it.
class Helper {
    std::mutex mutex;
    std::condition_variable changed;
    void (*call)(const void* work, int number) = nullptr;
    const void* work = nullptr;
    std::atomic<int>* missing = nullptr;
    int number, caller = -1;
    bool over = false;
    std::thread thread;  // the last: it begins when the rest is there

    void run() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return call || over; });
            if (over) return;
            if (processor() == caller) leave(caller);
            call(work, number);
            call = nullptr;
            missing->fetch_sub(1, std::memory_order_release);
        }
    }

public:
    explicit Helper(int number) : number(number), thread([this] { run(); }) {}
    ~Helper() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            over = true;
        }
        changed.notify_one();
        thread.join();
    }
    void start(void (*what)(const void*, int), const void* with, std::atomic<int>* count, int from) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            call = what, work = with, missing = count, caller = from;
        }
        changed.notify_one();
    }
};

// The helpers of one calling thread, from its first call for them until it ends. A fork leaves them behind: the child's are new,
// and what it has of the parent's is not touched.
struct Helpers {
    std::vector<std::unique_ptr<Helper>>* all = nullptr;
    int owner = 0;

    // So many helpers; throws where memory or threads are refused.
    std::vector<std::unique_ptr<Helper>>& reserve(int count) {
        if (!all || owner != process()) all = new std::vector<std::unique_ptr<Helper>>, owner = process();
        all->reserve(count);
        while ((int)all->size() < count) all->emplace_back(new Helper((int)all->size() + 1));
        return *all;
    }
    ~Helpers() {
        if (owner == process()) delete all;
    }
};
thread_local Helpers helpers;

// While one lives, this thread counts numbers below the smallest normal one (2^-126, in double 2^-1022) as zero, as GPUs do in
// float: with them a processor takes up to a hundred times as long.
class FlushToZero {
#if defined(__x86_64__) || defined(_M_X64)
    unsigned before = _mm_getcsr();

public:
    FlushToZero() { _mm_setcsr(before | 0x8040); }  // FTZ, of results, and DAZ, of operands
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

// What the first of several threads has thrown.
class Failure {
    std::atomic<bool> any{false};
    std::exception_ptr first;

public:
    void note() {
        if (!any.exchange(true)) first = std::current_exception();
    }
    // When all of them have ended.
    void rethrow() const {
        if (first) std::rethrow_exception(first);
    }
};

// work(0) ... work(threads - 1) at once. Throws what one of them has thrown; those that meet must not throw before.
template <typename Work>
void on_threads(int threads, const Work& work) {
    std::atomic<int> missing(threads - 1);
    Failure failure;
    const auto run = [&](int number) {
        const FlushToZero flush;
        try {
            work(number);
        } catch (...) {
            failure.note();
        }
    };
    if (threads > 1) {
        const int mine = processor();
        typedef decltype(run) Run;
        const auto call = [](const void* run, int number) { (*(Run*)run)(number); };
        auto& all = helpers.reserve(threads - 1);  // before anybody begins: they wait for one another
        for (int i = 0; i < threads - 1; ++i) all[i]->start(call, &run, &missing, mine);
    }
    run(0);
    while (missing.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    failure.rethrow();
}

}  // namespace

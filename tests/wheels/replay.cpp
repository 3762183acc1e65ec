// Runs the calls that recorded.py has written, and compares what they compute: replay LIBRARY FILE. It says how many calls gave
// the recorded results, with every instruction set of this processor, on one thread and on three.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef _WIN32
#include <windows.h>
static void* open_library(const char* path) { return (void*)LoadLibraryA(path); }
static void* function_of(void* library, const char* name) { return (void*)GetProcAddress((HMODULE)library, name); }
#else
#include <dlfcn.h>
static void* open_library(const char* path) { return dlopen(path, RTLD_NOW); }
static void* function_of(void* library, const char* name) { return dlsym(library, name); }
#endif

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, EXACT };

struct Pointer {
    uint32_t offset, array;
    uint64_t inside;
};

struct Array {
    uint64_t dtype;
    double tolerance;  // as a share of the largest value
    std::vector<char> before, after;
};

struct Record {
    uint32_t kind, backward, count;
    std::vector<char> structs;
    std::vector<Pointer> pointers;
    std::vector<Array> arrays;
};

static void* library;
static FILE* file;

template <typename T>
static T take() {
    T value;
    if (std::fread(&value, sizeof value, 1, file) != 1) std::puts("the file ends too early"), std::exit(2);
    return value;
}

static std::vector<char> take_bytes(size_t count) {
    std::vector<char> bytes(count);
    if (count && std::fread(bytes.data(), count, 1, file) != 1) std::puts("the file ends too early"), std::exit(2);
    return bytes;
}

static Record take_record() {
    Record record;
    record.kind = take<uint32_t>(), record.backward = take<uint32_t>(), record.count = take<uint32_t>();
    const uint32_t bytes = take<uint32_t>(), pointers = take<uint32_t>(), arrays = take<uint32_t>();
    record.structs = take_bytes(bytes);
    for (uint32_t i = 0; i < pointers; ++i) record.pointers.push_back(take<Pointer>());
    for (uint32_t i = 0; i < arrays; ++i) {
        Array array;
        const uint64_t size = take<uint64_t>();
        array.dtype = take<uint64_t>(), array.tolerance = take<double>();
        array.before = take_bytes(size), array.after = take_bytes(size);
        record.arrays.push_back(array);
    }
    return record;
}

static double half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(mantissa, -24)
                                        : std::ldexp(1024 + mantissa, exponent - 25);
    return bits >> 15 ? -size : size;
}

static double number(const char* bytes, uint64_t dtype) {
    if (dtype == FLOAT64) {
        double x;
        std::memcpy(&x, bytes, 8);
        return x;
    }
    uint32_t word = 0;
    std::memcpy(&word, bytes, dtype == FLOAT32 ? 4 : 2);
    if (dtype == FLOAT16) return half((uint16_t)word);
    if (dtype == BFLOAT16) word <<= 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// The largest difference of `got` from what was recorded, as a share of what is allowed.
static double error(const Array& array, const std::vector<char>& got) {
    if (got == array.after) return 0;
    if (array.dtype == EXACT) return INFINITY;
    const size_t step = array.dtype == FLOAT64 ? 8 : array.dtype == FLOAT32 ? 4 : 2;
    double largest = 0, worst = 0;
    for (size_t i = 0; i + step <= got.size(); i += step) {
        const double x = std::fabs(number(&array.after[i], array.dtype));
        if (std::isfinite(x)) largest = std::max(largest, x);
    }
    for (size_t i = 0; i + step <= got.size(); i += step) {
        if (!std::memcmp(&got[i], &array.after[i], step)) continue;
        const double difference = std::fabs(number(&got[i], array.dtype) - number(&array.after[i], array.dtype));
        worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    }
    return worst / (array.tolerance * std::max(largest, 1.0));
}

template <typename... Arguments>
static int call(const char* name, Arguments... arguments) {
    const auto function = (int (*)(Arguments...))function_of(library, name);
    if (!function) std::printf("no function %s\n", name), std::exit(2);
    return function(arguments...);
}

// Runs one call and returns its largest error, as a share of what is allowed.
static double run(const Record& record, int threads, int level) {
    std::vector<std::vector<char>> arrays;
    for (const Array& array : record.arrays) arrays.push_back(array.before);
    std::vector<char> structs = record.structs;
    for (const Pointer& pointer : record.pointers) {
        char* place = arrays[pointer.array].data() + pointer.inside;
        std::memcpy(&structs[pointer.offset], &place, sizeof place);
    }
    void* jobs = structs.data();
    int problem = 0;
    switch (record.kind) {
        case 0: problem = call("gpurnn_native_time_loop", jobs, (int)record.count, threads, (int)record.backward, level); break;
        case 1: problem = call("gpurnn_native_multiply", jobs, threads, level); break;
        case 2: problem = call("gpurnn_native_update", jobs, threads, level); break;
        case 3: problem = call("gpurnn_native_cross_entropy", jobs, threads, (int)record.backward, level); break;
        case 4: {
            struct {
                ptrdiff_t N;
                uint64_t seed;
                unsigned layer, call;
                uint64_t threshold;
                bool* mask;
            } m;
            std::memcpy(&m, jobs, sizeof m);
            problem = call("gpurnn_native_dropout_mask", m.N, m.seed, m.layer, m.call, m.threshold, m.mask, threads, level);
            break;
        }
    }
    if (problem) return INFINITY;
    double worst = 0;
    for (size_t i = 0; i < arrays.size(); ++i) worst = std::max(worst, error(record.arrays[i], arrays[i]));
    return worst;
}

int main(int count, char** words) {
    std::setvbuf(stdout, nullptr, _IONBF, 0);
    if (count != 3) return std::puts("expected: replay LIBRARY FILE"), 2;
    library = open_library(words[1]);
    if (!library) return std::printf("%s cannot be loaded\n", words[1]), 2;
    file = std::fopen(words[2], "rb");
    char name[8];
    if (!file || std::fread(name, 8, 1, file) != 1 || std::memcmp(name, "gpurnn 1", 8)) return std::puts("not a recorded file"), 2;
    std::vector<Record> records;
    for (uint64_t left = take<uint64_t>(); left > 0; --left) records.push_back(take_record());
    int passed = 0, failed = 0;
    const int best = call("gpurnn_native_level");
    for (int level = 0; level <= best; ++level)
        for (int threads = 1; threads <= 3; threads += 2) {
            double worst = 0;
            // on a thread of its own: when it ends, so do the threads that the library has started for it
            std::thread([&] {
                for (size_t i = 0; i < records.size(); ++i) {
                    const double found = run(records[i], threads, level);
                    worst = std::max(worst, found);
                    if (found <= 1)
                        ++passed;
                    else
                        ++failed, std::printf("call %d of kind %u: %g of what is allowed\n", (int)i, records[i].kind, found);
                }
            }).join();
            std::printf("instruction set %d, threads %d: largest error %.2g of what is allowed\n", level, threads, worst);
        }
    std::printf("%d passed, %d failed\n", passed, failed);
    std::fflush(stdout);
    return failed > 0;
}

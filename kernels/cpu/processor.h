// Which instruction sets this processor and its system can use. A part of interface.h.
//
// __builtin_cpu_supports would say the same, but not with every compiler: in the library that Zig links it always says no.

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

namespace {

struct Processor {
    bool avx2 = false, avx512 = false, vnni = false;  // with all of what api.cpp compiles for

    Processor() {
        unsigned a, b, c, d, basic = 0;
        if (!__get_cpuid(1, &a, &b, &basic, &d) || !(basic & bit_OSXSAVE)) return;
        unsigned saved, upper;  // which registers the system saves: 2 and 4 of AVX, 0xE0 of AVX-512
        asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        if ((saved & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = basic & bit_FMA && basic & bit_F16C && b & bit_AVX2;
#ifdef __APPLE__
        saved |= 0xE0;  // macOS saves them from their first use on
#endif
        avx512 = avx2 && (saved & 0xE0) == 0xE0 && b & bit_AVX512F && b & bit_AVX512BW && b & bit_AVX512DQ;
        vnni = avx512 && c & bit_AVX512VNNI;
    }
};

inline const Processor& processor() {
    static const Processor found;
    return found;
}

}  // namespace
#endif

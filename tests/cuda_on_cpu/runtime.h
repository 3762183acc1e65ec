// What translated PTX is written in: types, arithmetic, memory accesses, and the calls into the runtime (runtime.cpp).
// CHECKED is 1 in the flavour that watches every access, 0 in the fast one.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

// ---- threads, blocks, launch

struct Block;
struct Warp;
struct Thread;

// All lanes of a warp that take part, by lane; nullptr where a lane does not. Reads in[], writes out[].
typedef void (*Collective)(Thread** lanes, uint32_t mask);

struct Clock {  // a vector clock: what each thread of the grid had done; zero outside [low, high)
    uint32_t* at = nullptr;
    uint32_t low = 0, high = 0;
};

struct Copy {  // one cp.async under way
    uint64_t to, from;
    uint32_t bytes, used, line, group;
};

enum Scope { cta, cluster, gpu, sys };
enum Semantics { relaxed, acquire, release, acq_rel };
enum Space { generic_space, global_space, shared_space, const_space };

struct Thread {
    void* stack_pointer;
    uint8_t* stack;
    uint32_t tid[3];
    uint32_t lane, number, index;  // in the warp, in the block, in the grid
    Block* block;
    Warp* warp;
    const char* waits_for;  // nullptr: can run
    uint32_t line;          // where it waits
    bool done;
    // warp collectives
    Collective collective;
    const char* collective_name;
    uint32_t mask;
    uint64_t in[12], out[4];
    // block and cluster barriers
    uint32_t barrier;
    uint32_t barrier_result;
    bool cluster_arrived;
    uint32_t cluster_phase;
    // cp.async
    std::vector<Copy> copies;
    uint32_t copy_group;
    bool waited;  // for the launch before, by griddepcontrol.wait
    // happens-before
    Clock clock, fenced[3], pending[3];  // at the last fence of each scope; read by relaxed loads since
};

struct Block {
    uint32_t index[3];
    uint32_t rank, number;  // in the cluster, in the grid
    uint8_t* window;        // shared memory
    struct Cluster* in;
    uint32_t live;
    bool finished;
};

struct Launch {
    uint32_t grid[3], block[3], cluster[3];
    uint32_t dynamic_shared, shared, window;  // window: bytes of the whole window, gaps included
    int32_t cooperative, policy;              // 0 ascending, 1 descending, 2 random
    uint32_t residency;                       // clusters alive at once
    uint64_t seed, steps;                     // steps: backward jumps before a launch counts as endless
    double preemption;
    int32_t tensor_block, tensor_bits;  // how mma adds, see add_products
    uint32_t asynchronous;  // whether the kernel has asynchronous stores
    uint32_t dependent;     // whether it may begin before the launch before has ended
    const uint32_t* gaps;  // (from, to) offsets in the window between its variables
    uint32_t gap_count;
};

extern "C" {
extern Thread* current;
extern Launch launch;
extern uint8_t* arena;
[[noreturn]] void fail(const char* what, uint32_t line);
uint8_t* touch(uint64_t address, uint32_t bytes, bool write, uint32_t line);
uint8_t* touch_shared(uint64_t address, uint32_t bytes, bool write, uint32_t line);
uint8_t* atomic_load(Space, uint64_t address, uint32_t bytes, Semantics, Scope, uint32_t line);
uint8_t* atomic_store(Space, uint64_t address, uint32_t bytes, Semantics, Scope, uint32_t line);
uint8_t* atomic_begin(Space, uint64_t address, uint32_t bytes, Semantics, Scope, uint32_t line);
void atomic_end(uint8_t* p, Semantics, Scope, bool changed);
void fence(Scope);
void wait_for_launch_before();
void let_next_launch_begin();
uint64_t shared_to_generic(uint64_t address, uint32_t line);
uint64_t generic_to_shared(uint64_t address, uint32_t line);
uint64_t map_shared(uint64_t address, uint32_t rank, uint32_t line);
uint64_t map_generic(uint64_t address, uint32_t rank, uint32_t line);
bool is_shared(uint64_t address);
bool is_local(uint64_t address);
bool is_global(uint64_t address);
void spin_yield(uint32_t line);
void loop_step(uint32_t line);
uint32_t block_barrier(uint32_t number, uint32_t count, bool arrive_only, int how, bool vote, uint32_t line);
void cluster_arrive(bool releases, uint32_t line);
void cluster_wait(uint32_t line);
void warp_collective(Collective, const char* name, uint32_t mask, uint32_t line);
void copy_async(uint64_t to, uint64_t from, uint32_t bytes, uint32_t used, uint32_t line);
void copy_commit();
void copy_wait(int newest, uint32_t line);
void mbarrier_init(uint64_t address, uint32_t count, uint32_t line);
void mbarrier_invalidate(uint64_t address, uint32_t line);
void mbarrier_arrive(uint64_t address, uint32_t count, uint32_t expected_bytes, bool releases, Scope, uint32_t line);
void mbarrier_bytes(uint64_t address, int64_t more, uint32_t line);
void fence_shared();
bool mbarrier_wait(uint64_t address, uint32_t parity, bool acquires, Scope, uint32_t line);
void store_async(uint64_t to, uint32_t bytes, const uint8_t* data, uint64_t barrier, uint32_t line);
void print(uint8_t* format, uint8_t* arguments, uint8_t* result);
[[noreturn]] void assert_fail(uint8_t* message, uint8_t* file, uint8_t* line, uint8_t* function, uint8_t* size, uint32_t at);
[[noreturn]] void leave();
}

// ---- memory

// Macros, as they stand in thousands of lines: inline functions would take the compiler longer.
#define read_generic(address, bytes, line) touch(address, bytes, false, line)
#define write_generic(address, bytes, line) touch(address, bytes, true, line)
#define read_global read_generic
#define write_global write_generic
#define read_const read_generic
#if CHECKED
#define read_shared(address, bytes, line) touch_shared(address, bytes, false, line)
#define write_shared(address, bytes, line) touch_shared(address, bytes, true, line)
#else
inline uint8_t* read_shared(uint64_t address, uint32_t bytes, uint32_t line) {
    if (address + bytes <= launch.window) return current->block->window + address;
    return touch_shared(address, bytes, false, line);
}
inline uint8_t* write_shared(uint64_t address, uint32_t bytes, uint32_t line) {
    if (address + bytes <= launch.window) return current->block->window + address;
    return touch_shared(address, bytes, true, line);
}
#endif
// Local memory is an array on the fiber's stack.
inline uint8_t* read_local(uint64_t address, uint32_t, uint32_t) { return (uint8_t*)address; }
inline uint8_t* write_local(uint64_t address, uint32_t, uint32_t) { return (uint8_t*)address; }

// Integers in memory, anywhere and of any type.
#define STORED(type) typedef type __attribute__((may_alias, aligned(1))) stored_##type;
STORED(uint8_t) STORED(uint16_t) STORED(uint32_t) STORED(uint64_t)
STORED(int8_t) STORED(int16_t) STORED(int32_t) STORED(int64_t)

template <class T>
inline T get(const uint8_t* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}
template <class T>
inline void set(uint8_t* p, T value) {
    memcpy(p, &value, sizeof value);
}

// ---- half and bfloat16: storage of 16 bits, arithmetic in double rounded once, to nearest even

template <int EXPONENT, int MANTISSA>
struct Small {
    uint16_t bits;
    Small() = default;
    static constexpr int bias = (1 << (EXPONENT - 1)) - 1;

    // Rounding of a double: scale so that the last place is 1, round there.
    static uint16_t encode(double x, bool nearest) {
        const uint16_t sign = std::signbit(x) ? 1 << 15 : 0;
        const uint16_t infinity = ((1 << EXPONENT) - 1) << MANTISSA;
        if (x != x) return EXPONENT == 5 ? 0x7fff : 0x7fff;
        x = std::fabs(x);
        if (std::isinf(x)) return sign | infinity;
        if (x == 0) return sign;
        int exponent = std::ilogb(x);
        if (exponent < 1 - bias) exponent = 1 - bias;  // subnormal
        const double places = std::ldexp(x, MANTISSA - exponent);
        uint64_t whole = (uint64_t)(nearest ? std::nearbyint(places) : std::trunc(places));
        uint64_t code = whole + ((uint64_t)(exponent + bias - 1) << MANTISSA);  // a carry moves into the exponent
        if (code >= infinity) return sign | (nearest ? infinity : infinity - 1);
        return sign | (uint16_t)code;
    }
    explicit Small(double x) : bits(encode(x, true)) {}
    static Small towards_zero(double x) {
        Small result;
        result.bits = encode(x, false);
        return result;
    }
    operator double() const {
        const int exponent = bits >> MANTISSA & ((1 << EXPONENT) - 1);
        const int mantissa = bits & ((1 << MANTISSA) - 1);
        double x;
        if (exponent == (1 << EXPONENT) - 1)
            x = mantissa ? NAN : INFINITY;
        else if (exponent == 0)
            x = std::ldexp((double)mantissa, 1 - bias - MANTISSA);
        else
            x = std::ldexp((double)(mantissa | 1 << MANTISSA), exponent - bias - MANTISSA);
        return bits >> 15 ? -x : x;
    }
    Small operator-() const {
        Small result;
        result.bits = bits ^ 0x8000;
        return result;
    }
};
typedef Small<5, 10> half;
typedef Small<8, 7> bfloat;

template <class S>
struct Pair {
    S low, high;
    Pair operator-() const { return {-low, -high}; }
};
typedef Pair<half> half2;
typedef Pair<bfloat> bfloat2;

#define ARITHMETIC(symbol)                                                                              \
    template <int E, int M>                                                                             \
    inline Small<E, M> operator symbol(Small<E, M> a, Small<E, M> b) {                                  \
        return Small<E, M>((double)a symbol(double) b);                                                 \
    }                                                                                                   \
    template <class S>                                                                                  \
    inline Pair<S> operator symbol(Pair<S> a, Pair<S> b) {                                              \
        return {a.low symbol b.low, a.high symbol b.high};                                              \
    }
ARITHMETIC(+)
ARITHMETIC(-)
ARITHMETIC(*)

template <int E, int M>
inline Small<E, M> fma(Small<E, M> a, Small<E, M> b, Small<E, M> c) {
    // The product is exact in double. The sum, where it is not, goes to the neighbour with an odd last digit, so that
    // rounding it again gives what rounding once would.
    const double product = (double)a * (double)b, sum = product + (double)c, back = sum - product;
    const double lost = (product - (sum - back)) + ((double)c - back);
    uint64_t digits;
    memcpy(&digits, &sum, sizeof digits);
    const bool even = !(digits & 1);
    return Small<E, M>(even && (lost > 0 || lost < 0) ? std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY) : sum);
}
template <int E, int M>
inline Small<E, M> fabs(Small<E, M> a) {
    a.bits &= 0x7fff;
    return a;
}
template <int E, int M>
inline Small<E, M> relu(Small<E, M> a) {
    return (double)a > 0 || (double)a != (double)a ? a : Small<E, M>(0.0);
}
template <class T>
inline T smaller(T a, T b) {  // a number wins over NaN, -0 is smaller than +0
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit((double)a) ? a : b;
    return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit((double)a) ? b : a;
    return a > b ? a : b;
}
template <int E, int M, class F>
inline Small<E, M> apply(Small<E, M> a, F f) {
    return Small<E, M>(f((double)a));
}
template <class S>
inline Pair<S> fma(Pair<S> a, Pair<S> b, Pair<S> c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class S>
inline Pair<S> fabs(Pair<S> a) {
    return {fabs(a.low), fabs(a.high)};
}
template <class S>
inline Pair<S> relu(Pair<S> a) {
    return {relu(a.low), relu(a.high)};
}
template <class S>
inline Pair<S> smaller(Pair<S> a, Pair<S> b) {
    return {smaller(a.low, b.low), smaller(a.high, b.high)};
}
template <class S>
inline Pair<S> larger(Pair<S> a, Pair<S> b) {
    return {larger(a.low, b.low), larger(a.high, b.high)};
}
template <class S, class F>
inline Pair<S> apply(Pair<S> a, F f) {
    return {apply(a.low, f), apply(a.high, f)};
}

// ---- registers: plain unsigned integers; an instruction's type is a view of their low bytes

#define BITS(T, x) __builtin_bit_cast(T, x)  // what the compiler is quickest with

template <class T, class R>
inline T as(R r) {
    static_assert(sizeof(T) <= sizeof(R) || std::is_same<T, bool>::value, "register too narrow");
    T value;
    memcpy(&value, &r, sizeof value);
    return value;
}
template <class R, class T>
inline void put(R& r, T value) {
    static_assert(sizeof(T) <= sizeof(R), "register too narrow");
    r = 0;
    memcpy(&r, &value, sizeof value);
}

// ---- arithmetic that C++ lacks

inline float ftz(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline double ftz(double x) { return std::fabs(x) < std::numeric_limits<double>::min() ? std::copysign(0.0, x) : x; }
template <class T>
inline T saturate(T x) {
    return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);  // NaN becomes 0
}
template <int E, int M>
inline Small<E, M> saturate(Small<E, M> x) {
    return Small<E, M>(saturate((double)x));
}
template <class S>
inline Pair<S> saturate(Pair<S> x) {
    return {saturate(x.low), saturate(x.high)};
}

enum Rounding { rz = FE_TOWARDZERO, rm = FE_DOWNWARD, rp = FE_UPWARD };
template <Rounding mode, class F, class... A>
inline auto rounded(F f, A... arguments) {
    const int before = fegetround();
    fesetround(mode);
    volatile auto result = [&](volatile A... kept) { return f((A)kept...); }(arguments...);  // not to be computed early
    fesetround(before);
    return (std::remove_volatile_t<decltype(result)>)result;
}
inline double rni(double x) { return std::nearbyint(x); }
inline double rzi(double x) { return std::trunc(x); }
inline double rmi(double x) { return std::floor(x); }
inline double rpi(double x) { return std::ceil(x); }

template <class T>
inline T to_integer(double x, T nan) {  // clamps
    if (x != x) return nan;
    const double low = (double)std::numeric_limits<T>::min();
    const double high = std::ldexp(1.0, std::numeric_limits<T>::digits);
    return x <= low ? std::numeric_limits<T>::min() : x >= high ? std::numeric_limits<T>::max() : (T)x;
}
template <class T, class S>
inline T clamp(S x) {
    typedef __int128 wide;
    const wide low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    return (T)((wide)x < low ? low : (wide)x > high ? high : (wide)x);
}
inline uint32_t mul_hi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
inline int32_t mul_hi(int32_t a, int32_t b) { return (int64_t)a * b >> 32; }
inline uint64_t mul_hi(uint64_t a, uint64_t b) { return (unsigned __int128)a * b >> 64; }
inline int64_t mul_hi(int64_t a, int64_t b) { return (__int128)a * b >> 64; }
template <class T>
inline T divide(T a, T b) {  // the smallest number by -1 traps in C++
    return std::is_signed<T>::value && b == (T)-1 ? (T)(0 - a) : (T)(a / b);
}
template <class T>
inline T remainder(T a, T b) {
    return std::is_signed<T>::value && b == (T)-1 ? 0 : (T)(a % b);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
    return n == 0 ? high : n >= 32 ? low : high << n | low >> (32 - n);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
    return n == 0 ? low : n >= 32 ? high : high << (32 - n) | low >> n;
}
template <class T>
inline T reverse_bits(T a) {
    T result = 0;
    for (unsigned k = 0; k < 8 * sizeof a; k++) result = result << 1 | (a >> k & 1);
    return result;
}
template <class T>
inline uint32_t find_leading(T a) {
    typedef typename std::make_unsigned<T>::type U;
    const U bits = std::is_signed<T>::value && a < 0 ? ~(U)a : (U)a;
    for (int k = 8 * sizeof a - 1; k >= 0; k--)
        if (bits >> k & 1) return k;
    return ~0u;
}
template <class T>
inline uint32_t shift_leading(T a) {
    const uint32_t at = find_leading(a);
    return at == ~0u ? at : 8 * sizeof a - 1 - at;
}
template <class T>
inline T extract(T a, uint32_t from, uint32_t length) {
    const uint32_t size = 8 * sizeof a;
    const uint32_t last = from + length - 1 < size - 1 ? from + length - 1 : size - 1;
    const bool sign = std::is_signed<T>::value && length && (typename std::make_unsigned<T>::type)a >> last & 1;
    T result = 0;
    for (uint32_t k = 0; k < size; k++) {
        const bool bit = k < length && from + k < size ? a >> (from + k) & 1 : sign;
        result |= (T)bit << k;
    }
    return result;
}
template <class T>
inline T insert(T a, T b, uint32_t at, uint32_t length) {
    for (uint32_t k = 0; k < length && at + k < 8 * sizeof a; k++) {
        const T bit = (T)1 << (at + k);
        b = a >> k & 1 ? b | bit : b & ~bit;
    }
    return b;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
        const uint32_t which = selector >> (4 * k) & 15;
        uint8_t byte = both >> (8 * (which & 7));
        if (which & 8) byte = byte >> 7 ? 0xff : 0;
        result |= (uint32_t)byte << (8 * k);
    }
    return result;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
    uint32_t result = 0;
    for (int k = 0; k < 8; k++)
        if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return result;
}
template <class A, class B>
inline int32_t dot4(uint32_t a, uint32_t b) {
    int32_t sum = 0;
    for (int k = 0; k < 4; k++) sum += (int32_t)(A)(a >> (8 * k)) * (int32_t)(B)(b >> (8 * k));
    return sum;
}
inline uint32_t tf32_even(float x) {  // 10 bits of mantissa, halves to even
    const uint32_t bits = as<uint32_t>(x);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
}
inline uint32_t tf32_away(float x) {  // halves away from zero
    const uint32_t bits = as<uint32_t>(x);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// ---- warp collectives

// Defined in runtime.cpp.

extern "C" {
void warp_sync(Thread** lanes, uint32_t mask);
void shuffle_idx(Thread** lanes, uint32_t mask);
void shuffle_up(Thread** lanes, uint32_t mask);
void shuffle_down(Thread** lanes, uint32_t mask);
void shuffle_bfly(Thread** lanes, uint32_t mask);
void reduce_add(Thread** lanes, uint32_t mask);
void reduce_and(Thread** lanes, uint32_t mask);
void reduce_or(Thread** lanes, uint32_t mask);
void reduce_xor(Thread** lanes, uint32_t mask);
void reduce_min_u32(Thread** lanes, uint32_t mask);
void reduce_max_u32(Thread** lanes, uint32_t mask);
void reduce_min_s32(Thread** lanes, uint32_t mask);
void reduce_max_s32(Thread** lanes, uint32_t mask);
void vote_all(Thread** lanes, uint32_t mask);
void vote_any(Thread** lanes, uint32_t mask);
void vote_uni(Thread** lanes, uint32_t mask);
void vote_ballot(Thread** lanes, uint32_t mask);
void match_any(Thread** lanes, uint32_t mask);
void match_all(Thread** lanes, uint32_t mask);
}
template <int count, bool trans>
void load_matrix(Thread** lanes, uint32_t mask);
struct tf32 {};
template <class Kind, class Result, int K>
void multiply_matrices(Thread** lanes, uint32_t mask);

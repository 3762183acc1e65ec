// Two 16-bit numbers in a word, the first in its lower half; and two neighbours in memory, read or written together.

#if __has_include(<cuda_fp16.h>)
DEVICE unsigned pack(__half a, __half b) { return __half_as_ushort(a) | (unsigned)__half_as_ushort(b) << 16; }
DEVICE float2 unpack(unsigned two, __half) {
    return make_float2(__half2float(__ushort_as_half(two & 0xffff)), __half2float(__ushort_as_half(two >> 16)));
}
#endif

#if __has_include(<cuda_bf16.h>)
DEVICE unsigned pack(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __bfloat16_as_ushort(a) | (unsigned)__bfloat16_as_ushort(b) << 16;
}
DEVICE float2 unpack(unsigned two, __nv_bfloat16) {  // a bfloat16 is the upper half of a float
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
#endif

template <typename T> DEVICE float2 load_pair(const T* from) { return unpack(*(const unsigned*)from, T()); }
DEVICE float2 load_pair(const float* from) { return *(const float2*)from; }
template <typename T> DEVICE void store_pair(T* to, float a, float b) { *(unsigned*)to = pack(T(a), T(b)); }
DEVICE void store_pair(float* to, float a, float b) { *(float2*)to = make_float2(a, b); }

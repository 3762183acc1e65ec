// Two neighbours in memory, read or written together: two 16-bit numbers in a word, the first in its lower half, or two floats.

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

DEVICE float2 pack(float a, float b) { return make_float2(a, b); }
DEVICE float2 unpack(float2 two, float) { return two; }

template <typename T> struct Pair { typedef unsigned stored; };
template <> struct Pair<float> { typedef float2 stored; };

template <typename T>
DEVICE typename Pair<T>::stored load_pair(const T* from) {
    return *(const typename Pair<T>::stored*)from;
}
template <typename T>
DEVICE void store_pair(T* to, typename Pair<T>::stored two) {
    *(typename Pair<T>::stored*)to = two;
}

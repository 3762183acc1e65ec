// How the thread blocks of a group hand numbers to one another: through L2, each number beside its epoch in one 64-bit
// word, so that whoever sees the epoch has the number, without a fence and without a counter.
//
// Two slots are used in turn. A block writes epoch n + 1 only when it has received all of epoch n, whose writers had by
// then received all of n - 1: nobody still reads the slot. Epochs go on from launch to launch and never come back.
// Who waits in vain gives up and says so: *failed becomes 1, and all blocks end early.

struct Exchange {
    unsigned long long* words;  // [2, size] of this group
    int size;
    unsigned epoch;  // of what is there to be received; the slot is its lowest bit
    int patience;    // polls of a word
    int* failed;
    bool lost;       // this thread has given up

    DEVICE Exchange(unsigned long long* all, int group, int size_, unsigned epoch_, int patience_, int* failed_)
        : words(all + (size_t)group * 2 * size_), size(size_), epoch(epoch_), patience(patience_), failed(failed_),
          lost(false) {}

    // Number i of the epoch after this one.
    DEVICE void send(int i, float x) const {
        const unsigned long long both = (unsigned long long)(epoch + 1) << 32 | __float_as_uint(x);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at(epoch + 1, i)), "l"(both) : "memory");
    }

    DEVICE void next() { epoch++; }

    // each(i, number) for all numbers from `from` on, `count` of them, that there are: those for which there(i).
    template <int THREADS, typename There, typename Each>
    DEVICE void receive(int from, int count, There there, Each each) {
        for (int first = threadIdx.x; first < count; first += 4 * THREADS) {
            unsigned long long both[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {  // four on their way at once
                const int i = first + k * THREADS;
                if (i < count && there(i)) both[k] = load(from + i);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int i = first + k * THREADS;
                if (i >= count || !there(i)) continue;
                for (int polls = 0; (unsigned)(both[k] >> 32) != epoch && !lost; polls++) {
                    if (polls == patience || (polls % 1024 == 1023 && *(volatile int*)failed)) lost = true;
                    both[k] = load(from + i);
                }
                each(i, __uint_as_float((unsigned)both[k]));
            }
        }
        if (lost) *(volatile int*)failed = 1;
    }

    DEVICE unsigned long long load(int i) const {
        unsigned long long both;
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(at(epoch, i)) : "memory");
        return both;
    }

    DEVICE unsigned long long at(unsigned when, int i) const {
        return (unsigned long long)__cvta_generic_to_global(words + (size_t)(when & 1) * size + i);
    }
};

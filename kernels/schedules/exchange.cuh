// How the thread blocks of a group hand numbers to one another through L2, without a counter: whoever sees a number knows
// that it is the one he waits for. Who waits in vain gives up and says so: *failed becomes 1, and all blocks end early.

struct Poller {
    int poll_limit;  // polls
    int* failed;
    bool timed_out;     // this thread has given up

    DEVICE Poller(int poll_limit_, int* failed_) : poll_limit(poll_limit_), failed(failed_), timed_out(false) {}

    // Asks for all that is missing at once, again and again: load(k), then arrived(k), for the bits k of `missing`.
    template <int COUNT, typename Load, typename Arrived>
    DEVICE void wait(unsigned missing, Load load, Arrived arrived) {
        for (int polls = 0; missing; polls++) {
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                if (missing >> k & 1) load(k);
            }
            if (timed_out) return;
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                if ((missing >> k & 1) && arrived(k)) missing &= ~(1u << k);
            }
            if (polls == poll_limit || (polls % 1024 == 1023 && *(volatile int*)failed)) {
                timed_out = true;
                *(volatile int*)failed = 1;
            }
        }
    }
};

// ---- each number beside its epoch, in one word of 64 bits
//
// Two slots are used in turn. A block sends epoch n + 1 only when it has received all of epoch n, whose senders had by
// then received all of n - 1: nobody still reads the slot. Epochs go on from launch to launch and never come back.

struct Exchange : Poller {
    unsigned long long* words;  // [2, size] of this group
    int size;
    unsigned epoch;  // of what is there to be received; the slot is its lowest bit

    DEVICE Exchange(unsigned long long* all, int group, int size_, unsigned epoch_, int poll_limit_, int* failed_)
        : Poller(poll_limit_, failed_), words(all + (size_t)group * 2 * size_), size(size_), epoch(epoch_) {}

    // Number i of the epoch after this one.
    DEVICE void send(int i, float x) const {
        const unsigned long long word = (unsigned long long)(epoch + 1) << 32 | __float_as_uint(x);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address(epoch + 1, i)), "l"(word) : "memory");
    }

    DEVICE void next() { epoch++; }

    // take(i, number) for all numbers from `from` on, `count` of them, that there are: those for which exists(i).
    template <int THREADS, typename Exists, typename Take>
    DEVICE void receive(int from, int count, Exists exists, Take take) {
        for (int first = threadIdx.x; first < count; first += 4 * THREADS) {
            unsigned long long received[4];
            unsigned missing = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int i = first + k * THREADS;
                if (i < count && exists(i)) missing |= 1u << k;
            }
            const unsigned all = missing;
            wait<4>(
                missing, [&](int k) { received[k] = load(from + first + k * THREADS); },
                [&](int k) { return (unsigned)(received[k] >> 32) == epoch; });
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (all >> k & 1) take(first + k * THREADS, __uint_as_float((unsigned)received[k]));
            }
        }
    }

    DEVICE unsigned long long load(int i) const {
        unsigned long long word;
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(address(epoch, i)) : "memory");
        return word;
    }

    DEVICE unsigned long long address(unsigned when, int i) const {
        return (unsigned long long)__cvta_generic_to_global(words + (size_t)(when & 1) * size + i);
    }
};

// ---- half the bytes: words of 32 bits that are nothing but numbers, in slots that were EMPTY
//
// 2 TURNS slots are used in turn, all EMPTY when a launch begins. Who has sent the second of TURNS turns has received the
// first, whose senders had received all that arrived before: nobody still reads the other half of the slots, and he empties
// his words there. His fence before he sends again, and a receiver's before he comes to that half, having seen what was
// sent after the fence, see to it that nobody finds there what was in it before.

template <int SENT>
struct Ring : Poller {
    static constexpr unsigned EMPTY = 0xffffffffu;  // as a number NaN; another NaN is sent in its place
    static constexpr int TURNS = 16;
    unsigned* words;  // [2 TURNS, size] of this group
    int size;
    unsigned turn;    // of what is there to be received
    int sent[SENT];   // words that this thread has sent last, or -1

    DEVICE Ring(unsigned* all, int group, int size_, int poll_limit_, int* failed_)
        : Poller(poll_limit_, failed_), words(all + (size_t)group * 2 * TURNS * size_), size(size_), turn(0) {
#pragma unroll
        for (int k = 0; k < SENT; k++) sent[k] = -1;
    }

    DEVICE unsigned* address(unsigned when, int i) const { return words + (size_t)(when % (2 * TURNS)) * size + i; }

    // Word i of the turn after this one, this thread's k-th.
    DEVICE void send(int k, int i, unsigned word) {
        if (turn % TURNS == 1) fence();
        store(address(turn + 1, i), word == EMPTY ? EMPTY >> 1 : word);
        sent[k] = i;
    }

    DEVICE void next() {
        turn++;
        if (turn % TURNS != 1) return;
#pragma unroll
        for (int k = 0; k < SENT; k++) {
            for (int n = TURNS - 1; n < 2 * TURNS - 1 && sent[k] >= 0; n++) store(address(turn + n, sent[k]), EMPTY);
        }
    }

    // Before this thread's first look at a turn.
    DEVICE void acquire() const {
        if (turn % TURNS == 0) fence();
    }

    // Words i and on of the turn that is there to be received; each is whole, they need not be of one moment.
    DEVICE void load(unsigned (&to)[2], int i) const {
        asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1]) : "l"(__cvta_generic_to_global(address(turn, i))) : "memory");
    }
    DEVICE void load(unsigned (&to)[4], int i) const {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "l"(__cvta_generic_to_global(address(turn, i))) : "memory");
    }

    DEVICE static void store(unsigned* to, unsigned word) {
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(word) : "memory");
    }
    DEVICE static void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
};

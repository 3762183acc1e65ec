// How the thread blocks of a group exchange numbers through L2. There is no counter: a reader recognises a fresh number by
// itself, by its epoch or by a slot that is no longer empty. A reader that polls too long sets *failed to 1, and all blocks
// end early.

struct Poller {
    static constexpr bool waits = true;  // a block waits for others in each step
    int poll_limit;  // polls of one wait
    int* failed;
    bool timed_out;  // this thread has given up

    DEVICE Poller(int poll_limit_, int* failed_) : poll_limit(poll_limit_), failed(failed_), timed_out(false) {}

    // Loads everything that is missing, for all bits k of `missing`: the loads are in flight together.
    template <int COUNT, typename Load>
    DEVICE static void load_missing(unsigned missing, Load load) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            if (missing >> k & 1) load(k);
        }
    }

    // Polls until everything that is missing has arrived, which load_missing has loaded once. Each poll is arrived(k) and then
    // load(k).
    template <int COUNT, typename Load, typename Arrived>
    DEVICE void wait(unsigned missing, Load load, Arrived arrived) {
        for (int polls = 0; !timed_out; polls++) {
#pragma unroll
            for (int k = 0; k < COUNT; k++) missing &= ~((unsigned)arrived(k) << k);
            if (!missing) return;
            if (polls == poll_limit || (polls % 1024 == 1023 && *(volatile int*)failed)) {
                timed_out = true;
                *(volatile int*)failed = 1;
            }
            load_missing<COUNT>(missing, load);
        }
    }
};

// ---- words of 64 bits: a number and its epoch
//
// Two slots alternate. A block sends epoch n + 1 only after it has received all of epoch n. The senders of epoch n had
// received all of n - 1 by then, so nobody reads that slot any more. Epochs continue from launch to launch and never
// repeat: the next one lies in device memory, and epochs.cu counts it up.

struct Exchange : Poller {
    unsigned long long* words;  // [2, size] of this group
    int size;
    unsigned epoch;  // to be received next; its lowest bit is the slot

    DEVICE Exchange(unsigned long long* all, int group, int size_, unsigned epoch_, int poll_limit_, int* failed_)
        : Poller(poll_limit_, failed_), words(all + (size_t)group * 2 * size_), size(size_), epoch(epoch_) {}

    // Sends number i of the next epoch.
    DEVICE void send(int i, float x) const {
        const unsigned long long word = (unsigned long long)(epoch + 1) << 32 | __float_as_uint(x);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address(epoch + 1, i)), "l"(word) : "memory");
    }

    DEVICE void next() { epoch++; }

    // Receives the numbers from + i, i < count, for which exists(i), and calls take(i, number) for each.
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
            auto load_one = [&](int k) { received[k] = load(from + first + k * THREADS); };
            load_missing<4>(missing, load_one);
            wait<4>(missing, load_one, [&](int k) { return (unsigned)(received[k] >> 32) == epoch; });
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

// ---- words of 32 bits: numbers alone, half the bytes
//
// A word that has not arrived is EMPTY. There are 2 TURNS slots, used one after another in two halves; all are EMPTY when a
// launch begins. A thread that has sent the second turn of a half has received the first, and the senders of that one had
// received everything before it. So nobody reads the other half any more, and the thread empties its words there.
//
// Nobody finds an old number in an emptied slot: the thread fences after it has emptied its words and before it sends again,
// and a receiver fences before it enters that half, after it has seen a word that was sent after the first fence.

template <int SENT>
struct Ring : Poller {
    static constexpr unsigned EMPTY = 0xffffffffu;  // a NaN; where a number is this NaN, another one is sent
    static constexpr int TURNS = 16;
    unsigned* words;  // [2 TURNS, size] of this group
    int size;
    unsigned turn;    // to be received next
    int sent[SENT];   // the words that this thread sent last, or -1

    DEVICE Ring(unsigned* all, int group, int size_, int poll_limit_, int* failed_)
        : Poller(poll_limit_, failed_), words(all + (size_t)group * 2 * TURNS * size_), size(size_), turn(0) {
#pragma unroll
        for (int k = 0; k < SENT; k++) sent[k] = -1;
    }

    DEVICE unsigned* address(unsigned when, int i) const { return words + (size_t)(when % (2 * TURNS)) * size + i; }

    // Sends word i of the next turn; it is this thread's k-th, and none comes before the 0th.
    DEVICE void send(int k, int i, unsigned word) {
        if (k == 0 && turn % TURNS == 1) fence();
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

    // To be called before this thread loads the first word of a turn.
    DEVICE void acquire() const {
        if (turn % TURNS == 0) fence();
    }

    // Loads the words from i on of the turn to be received next. Each word is loaded whole, but not all at the same moment.
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

// ---- the tiles of a group

// Calls run(positions, channels) with every tile of this group, AT at a time, until one gives up: arrays of AT, or one of each.
// position(tile), channel(k): what they are made of. A tile past the last one has no sequences.
template <int AT, int R, typename Position, typename Channel, typename Run>
DEVICE void run_tiles(int B, Position position, Channel channel, Run run) {
    if constexpr (AT == 1) {
        auto one = channel(0);
        for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
            const auto pos = position(tile);
            if (!run(pos, one)) return;
        }
    } else {
        static_assert(AT == 2, "one tile or two");
        decltype(channel(0)) two[2] = {channel(0), channel(1)};
        for (int tile = blockIdx.z; tile * R < B; tile += 2 * gridDim.z) {
            const decltype(position(0)) pos[2] = {position(tile), position(tile + gridDim.z)};
            if (!run(pos, two)) return;
        }
    }
}

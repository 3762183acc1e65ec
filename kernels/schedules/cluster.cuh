// How the thread blocks of a cluster hand numbers to one another, from sm_90 on (PTX ISA, st.async and mbarrier): a store
// goes into the shared memory of another block and is counted there in bytes, at an mbarrier that the other block waits for.
// Nothing goes through L2, and no block waits for all others to meet.

DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// A shared address of this block, as the same place in block `rank` of the cluster.
DEVICE unsigned address_in(unsigned address, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Stores words at an address of a cluster that is a multiple of their bytes, and counts these at an mbarrier of that block.
DEVICE void store_async(unsigned to, const unsigned (&words)[2], unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(words[0]),
                 "r"(words[1]), "r"(barrier)
                 : "memory");
}
DEVICE void store_async(unsigned to, const unsigned (&words)[4], unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
                 : "memory");
}

// All threads of the cluster wait here; what they wrote before is seen behind it.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// ---- two slots, used in turns
//
// Each block of the cluster receives BYTES in each turn, from all blocks, itself included. Turn n goes into slot n % 2. Shared
// memory: the mbarriers of the slots, then the slots of SLOT bytes.
//
// Nobody overwrites a slot that is still read. A thread sends turn n + 1 when its whole warp (forward) or block (backward) has
// read turn n: they meet in between, and an asynchronous store comes after what its thread did before. All warps of all blocks
// send something in each turn. A block that has received all of turn n + 1 therefore knows that everybody has read turn n,
// and only then it sends turn n + 2 into the same slot.
//
// For the same reason no turn n + 2 ends at an mbarrier where a thread still waits for turn n, so its parity says which of
// both has ended; and bytes of turn n + 2 come after turn n has ended. They may come before thread 0 says how many there
// will be: a turn ends when it has said so and all have come.

template <int C, int SLOT, int BYTES>
struct Cluster {
    static constexpr bool waits = true;
    static constexpr int BARRIERS = 16;  // bytes of both mbarriers, which are in front of the slots
    unsigned base;      // shared address of the mbarriers; the slots [2, SLOT] are behind them
    unsigned turn;      // to be received next, the first is 1
    int poll_limit;     // polls of one wait
    int* failed;
    bool timed_out;     // this thread has given up: it waits no more and sends nothing

    // Clears `size` bytes of memory, the slots and what lies behind them: some of it is read and never written.
    DEVICE Cluster(float4* memory, int size, int poll_limit_, int* failed_)
        : base(shared_address(memory)), turn(0), poll_limit(poll_limit_), failed(failed_), timed_out(false) {
        for (int i = threadIdx.x; i < size / 16; i += blockDim.x) memory[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int k = 0; k < 2; k++) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(base + 8 * k) : "memory");
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            for (int k = 0; k < 2; k++) expect(k);
        }
        asm volatile("" : "+r"(base));  // the compiler would otherwise compute it anew at each use, which takes some cycles
        cluster_barrier();  // all mbarriers are there
    }

    // Says how many bytes the next turn of a slot will have.
    DEVICE void expect(unsigned when) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(base + when % 2 * 8), "r"(BYTES)
                     : "memory");
    }

    // Sends words of the next turn to a place, in bytes, in the slot of block `rank`. (% C: the compiler may compute the
    // address where there is no such block.)
    template <int WORDS>
    DEVICE void send(unsigned rank, int place, const unsigned (&words)[WORDS]) const {
        const unsigned there = address_in(base, rank % C), slot = (turn + 1) % 2;
        if (!timed_out) store_async(there + BARRIERS + slot * SLOT + place, words, there + slot * 8);
    }

    DEVICE void next() { turn++; }

    // Waits until all of this turn is there, or this thread has given up.
    DEVICE void wait() {
        const unsigned barrier = base + turn % 2 * 8, parity = (turn - 1) / 2 % 2;
        for (int polls = 0; !timed_out && !ended(barrier, parity); polls++) {
            if (polls == poll_limit || (polls % 1024 == 1023 && *(volatile int*)failed)) {
                timed_out = true;
                *(volatile int*)failed = 1;
            }
        }
        // An acquire by the wait would throw away all that L1 holds of global memory.
        asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
        if (threadIdx.x == 0 && !timed_out) expect(turn);
    }

    // The shared address of what was received, and of what lies behind the slots.
    DEVICE unsigned slot() const { return base + BARRIERS + turn % 2 * SLOT; }
    DEVICE unsigned behind() const { return base + BARRIERS + 2 * SLOT; }

    // One poll, of a microsecond at most.
    DEVICE static bool ended(unsigned barrier, unsigned parity) {
        unsigned yes;
        asm volatile("{ .reg .pred over; mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 over, [%1], %2, 1000; "
                     "selp.u32 %0, 1, 0, over; }"
                     : "=r"(yes) : "r"(barrier), "r"(parity) : "memory");
        return yes;
    }
};

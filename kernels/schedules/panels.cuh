// A matrix as tensor cores read it from shared memory, stored so that a thread block copies what it needs of it as it is.
//
//     panels  [panels, PARTS, rows, 128 bytes]     a panel is 128 bytes of each row: 64 columns, for tf32 32
//
// Past the last column there are zeros. The 16-byte pieces of a row are permuted, piece p of row r to place p ^ r % 8: eight
// rows that load_matrices reads at the same column then lie in different banks.

template <typename T, int PARTS>
struct Panels {
    typedef typename Multiplied<T, PARTS>::type Operand;
    static constexpr int columns = 128 / sizeof(Operand), piece = 16 / sizeof(Operand);

    // Byte of part 0 of a number; the other parts follow, rows * 128 bytes apart.
    DEVICE static size_t place(int rows, int row, int column) {
        const size_t panel_row = (size_t)(column / columns) * PARTS * rows + row;
        return panel_row * 128 + ((column % columns / piece) ^ row % 8) * 16 + column % piece * sizeof(Operand);
    }

    DEVICE static void store(char* panels, int rows, int row, int column, T x) {
        store_operand((Operand*)(panels + place(rows, row, column)), x, rows * 128 / (int)sizeof(Operand));
    }
};

// Copies 16 bytes to shared memory, in the background, around L1.
DEVICE void copy_async(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
// What this thread has copied since the last call is a group.
DEVICE void copies_are_a_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the latest LEFT groups of this thread are under way.
template <int LEFT> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

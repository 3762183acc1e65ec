// Where the arrays of a layer hold what is not h.

// From where a state would lie if the cell had only this one besides h, to where state s + 1 lies. A direction has all of its
// states besides h one after another, each of `size` numbers.
template <typename Cell>
DEVICE long long other_state(int d, int s, long long size) {
    return (long long)(d * (Cell::states - 2) + s) * size;
}

// The masks of a unit in a timestep, one every H bytes: mask is [D, steps, B, M*H], where `steps` is 1 if a sequence has the
// same masks in all timesteps.
template <typename Cell>
DEVICE const unsigned char* masks_of(const bool* mask, int steps, int d, int t, int b, int B, int H, int j) {
    const long long row = ((long long)d * steps + (steps > 1 ? t : 0)) * B + b;
    return (const unsigned char*)mask + row * Cell::draws * H + j;
}

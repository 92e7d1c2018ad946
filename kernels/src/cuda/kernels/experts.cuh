// What products with chosen experts share.

// Row r of y is choice r; row r / x_div of x.
struct ExpertProduct {
    In x;
    const void* const* w; // of each expert
    const int* experts;
    i64 experts_stride;
    Out y;
    int k, n, round, x_div, choices; // choices of a token
};

// The choices of a batch, sorted by expert and cut into tiles of as many rows as a kernel takes.
struct Sorted {
    int* count;  // tiles there are
    int* order;  // choices, expert by expert
    int* tiles;  // of each tile: expert, first place in `order`, rows
};

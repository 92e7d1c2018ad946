// What the kernels of attention share.

__device__ __forceinline__ i64 page_row(const u32* table, const Span& s, int page_size, int position) {
    return (i64)table[s.pages + position / page_size] * page_size + position % page_size;
}

// Bytes of a head of `dim` elements kept as bytes: codes, zeros up to a multiple of four, and the scale.
__device__ __forceinline__ int bytes_of_head(int dim) { return (dim + 3) / 4 * 4 + 4; }

// What multiplies the codes of head `g` of a row of bytes that begins at `row`.
__device__ __forceinline__ float scale_of_head(const void* pages, i64 row, int g, int dim) {
    const int each = bytes_of_head(dim);
    return *(const float*)((const u8*)pages + row + (i64)(g + 1) * each - 4);
}

struct Attention {
    In q;
    const void *k_pages, *v_pages;
    i64 k_stride, v_stride;
    int k_type, v_type;
    const Span* spans;
    const u32* table;
    const int* tiles; // tiles before each span, and all
    int span_count, page_size;
    int heads, kv_heads, dim, v_dim;
    float scale;
    int window, keep_first; // window 0 is none
    Out y;
    float* parts; // for each row, head and split: v_dim sums, the largest score, the sum of weights
    int splits;
};

// The span that a tile belongs to: the last one that begins at or before it.
__device__ __forceinline__ int span_of_tile(const Attention& p, int tile) {
    int of = 0;
    for (int high = p.span_count - 1; of < high;) {
        int middle = (of + high + 1) / 2;
        if (p.tiles[middle] <= tile) of = middle;
        else high = middle - 1;
    }
    return of;
}

#define NOTHING __int_as_float(0xff800000)

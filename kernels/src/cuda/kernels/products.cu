// Products with weights.

#include "common.cuh"
#include "products.cuh"

struct Product {
    In x;
    const void* w; // (N, K), contiguous
    const float* bias;
    Out y;
    int rows, k, n;
    int round; // x to bf16
};

// A warp an output. K is whole chunks, and x and w are aligned to 16 bytes.
template <int TYPE>
__device__ __forceinline__ void one_row(const Product& p) {
    int n = blockIdx.x * 8 + threadIdx.x / 32;
    if (n >= p.n) return;
    int chunks = p.k / Chunk<TYPE>::SIZE;
    float sum = dot<TYPE>(p.x.row(blockIdx.y), (const uint4*)p.w + (i64)n * chunks, chunks, p.round);
    if (threadIdx.x % 32 == 0) p.y.row(blockIdx.y)[n] = sum + (p.bias ? p.bias[n] : 0.0f);
}

template <int TYPE>
__device__ __forceinline__ void tiles(const Product& p) {
    int first = blockIdx.y * TILE;
    tile<TYPE>(p.x, p.w, p.bias, p.y, nullptr, first, min(TILE, p.rows - first), p.k, p.n, 1, p.round);
}

#define OF_TYPE(TYPE, NAME)                                                            \
    KERNEL __launch_bounds__(256) one_row_##NAME(ARGS(Product) p) { one_row<TYPE>(p); } \
    KERNEL __launch_bounds__(256) tiles_##NAME(ARGS(Product) p) { tiles<TYPE>(p); }
OF_TYPE(F32, f32)
OF_TYPE(F16, f16)
OF_TYPE(BF16, bf16)

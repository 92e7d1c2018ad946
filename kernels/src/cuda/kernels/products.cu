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

// A warp takes R outputs, or W warps share one. K is whole chunks, and x and w are aligned to 16 bytes.
template <int TYPE, int R, int W>
__device__ __forceinline__ void one_row(const Product& p) {
    __shared__ float parts[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Warps beyond the last output do the last ones again.
    const int n = min((int)(blockIdx.x * (8 / W) + warp / W) * R, p.n - R);
    const int chunks = p.k / Chunk<TYPE>::SIZE;
    const uint4* w = (const uint4*)p.w + (i64)n * chunks;
    // On its way while the kernel before this one ends: 2 KB of each of two rows, or 4 KB of one.
    const char* ahead = (const char*)(w + (i64)(lane * R / 32) * chunks) + (warp % W * 32 + lane % (32 / R)) * 128;
    if (ahead < (const char*)(w + (i64)(lane * R / 32 + 1) * chunks)) asm volatile("prefetch.global.L2 [%0];" ::"l"(ahead));
    BEGIN();
    float sum[R];
    dot<TYPE, R>(p.x.row(0), w, chunks, warp % W * 32 + lane, 32 * W, p.round, sum);
    if (W > 1) {
        if (lane == 0) parts[warp] = sum[0];
        __syncthreads();
        if (warp % W != 0) return;
        sum[0] = 0.0f;
#pragma unroll
        for (int i = 0; i < W; i++) sum[0] += parts[warp + i];
    }
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++) p.y.row(0)[n + r] = sum[r] + (p.bias ? p.bias[n + r] : 0.0f);
}

template <int TYPE>
__device__ __forceinline__ void tiles(const Product& p) {
    int first = blockIdx.y * TILE;
    tile<TYPE>(p.x, p.w, p.bias, p.y, nullptr, first, min(TILE, p.rows - first), p.k, p.n, 1, p.round);
}

#define OF_SPLIT(TYPE, NAME, R, W) \
    KERNEL __launch_bounds__(256) one_row_##NAME##_##R##_##W(ARGS(Product) p) { one_row<TYPE, R, W>(p); }
#define OF_TYPE(TYPE, NAME)                                                             \
    OF_SPLIT(TYPE, NAME, 2, 1)                                                          \
    OF_SPLIT(TYPE, NAME, 1, 1)                                                          \
    OF_SPLIT(TYPE, NAME, 1, 2)                                                          \
    OF_SPLIT(TYPE, NAME, 1, 4)                                                          \
    KERNEL __launch_bounds__(256) tiles_##NAME(ARGS(Product) p) { BEGIN(); tiles<TYPE>(p); }
OF_TYPE(F32, f32)
OF_TYPE(F16, f16)
OF_TYPE(BF16, bf16)

// Products with the experts that a router chose.

#include "common.cuh"
#include "products.cuh"
#include "experts.cuh"

template <int TYPE>
__device__ __forceinline__ void expert_row(const ExpertProduct& p) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, r = blockIdx.y;
    if (n >= p.n) return;
    int expert = p.experts[(r / p.choices) * p.experts_stride + r % p.choices];
    int chunks = p.k / Chunk<TYPE>::SIZE;
    const uint4* w = (const uint4*)p.w[expert] + (i64)n * chunks;
    float sum[1];
    dot<TYPE, 1>(p.x.row(r / p.x_div), w, chunks, threadIdx.x % 32, 32, p.round, sum);
    if (threadIdx.x % 32 == 0) p.y.row(r)[n] = sum[0];
}

template <int TYPE>
__device__ __forceinline__ void expert_tiles(const ExpertProduct& p, const Sorted& s) {
    if ((int)blockIdx.y >= *s.count) return;
    const int* t = s.tiles + 3 * blockIdx.y;
    tile<TYPE>(p.x, p.w[t[0]], nullptr, p.y, s.order, t[1], t[2], p.k, p.n, p.x_div, p.round);
}

#define OF_TYPE(TYPE, NAME)                                                                         \
    KERNEL __launch_bounds__(256) expert_row_##NAME(ARGS(ExpertProduct) p) { BEGIN(); expert_row<TYPE>(p); } \
    KERNEL __launch_bounds__(256) expert_tiles_##NAME(ARGS(ExpertProduct) p, ARGS(Sorted) s) { BEGIN(); expert_tiles<TYPE>(p, s); }
OF_TYPE(F32, f32)
OF_TYPE(F16, f16)
OF_TYPE(BF16, bf16)

// Sorts choices by expert, in one block, and cuts them into tiles of `tile` rows. `ends` has room for a number an expert and one more. Which of
// an expert's choices comes first changes nothing: each row of a tile is by itself.
KERNEL __launch_bounds__(1024) sort_choices(const int* experts, i64 stride, int choices, int rows, int count, int tile, int* ends, ARGS(Sorted) s) {
    BEGIN();
    __shared__ int warps[32], warp_tiles[32], base, base_tiles, near[1025];
    // Counting is quicker in shared memory.
    if (count <= 1024) ends = near;
    const int tid = threadIdx.x, lane = tid % 32;
    for (int e = tid; e <= count; e += 1024) ends[e] = 0;
    if (tid == 0) base = base_tiles = 0;
    __syncthreads();
    for (int r = tid; r < rows; r += 1024) atomicAdd(&ends[experts[(r / choices) * stride + r % choices]], 1);
    __syncthreads();
    // Sums of what comes before, of 1,024 experts at a time: choices, and tiles.
    for (int e0 = 0; e0 < count; e0 += 1024) {
        int e = e0 + tid, mine = e < count ? ends[e] : 0, tiles = (mine + tile - 1) / tile;
        int sum = mine, sum_tiles = tiles;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int a = __shfl_up_sync(FULL, sum, o), b = __shfl_up_sync(FULL, sum_tiles, o);
            if (lane >= o) sum += a, sum_tiles += b;
        }
        if (lane == 31) warps[tid / 32] = sum, warp_tiles[tid / 32] = sum_tiles;
        __syncthreads();
        int before = base, before_tiles = base_tiles;
        for (int w = 0; w < tid / 32; w++) before += warps[w], before_tiles += warp_tiles[w];
        int start = before + sum - mine, place = before_tiles + sum_tiles - tiles;
        if (e < count) {
            ends[e] = start;
            for (int i = 0; i < tiles; i++) {
                int* t = s.tiles + 3 * (place + i);
                t[0] = e, t[1] = start + i * tile, t[2] = min(tile, mine - i * tile);
            }
        }
        __syncthreads();
        if (tid == 1023) base = before + sum, base_tiles = before_tiles + sum_tiles;
        __syncthreads();
    }
    if (tid == 0) *s.count = base_tiles;
    for (int r = tid; r < rows; r += 1024) {
        int place = atomicAdd(&ends[experts[(r / choices) * stride + r % choices]], 1);
        s.order[place] = r;
    }
}

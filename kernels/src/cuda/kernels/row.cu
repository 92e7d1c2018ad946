// Products of one row, rounded to BF16, with weights in BF16: the speed is that of memory. What follows a
// product element by element may be done in the same kernel.

#include "common.cuh"
#include "after.cuh"

struct RowProduct {
    In x;
    const void* w; // (N, K), contiguous
    const float* bias;
    Out y;
    int k, n;
    int after;
    // Added to y, in z.
    In other;
    Out z;
    // A second product of x, whose y goes through `act` and times the first, in z.
    const void* gate;
    const float* gate_bias;
    Out gate_y;
    int act;
    Convolution conv;
};

// Weights are read once and never again.
__device__ __forceinline__ uint4 load_once(const uint4* at) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(at));
    return r;
}

__device__ __forceinline__ float add_products(u32 x, u32 w, float sum) {
    sum = fmaf(low_bf16(x), low_bf16(w), sum);
    return fmaf(high_bf16(x), high_bf16(w), sum);
}

// Chunks of sixteen bytes that a lane has on their way, and blocks that a processor holds at least: where
// registers allow, 2,560 outputs by two warps each run at once.
#define HELD 4
// Parts of x that a thread asks for at once.
#define ASKED 4
#if __CUDA_ARCH__ >= 1000
#define BLOCKS 4
#else
#define BLOCKS 5
#endif

// W warps share R rows of w: R neighbours, or one of the gate and one of w. The order of a sum depends on
// W alone. K is whole chunks of eight; x, w and gate are aligned to 16 bytes. Shared memory holds x in BF16.
template <int R, int W, bool GATED>
__device__ __forceinline__ void row(const RowProduct& p) {
    extern __shared__ __align__(16) uint4 xs[];
    __shared__ float parts[8][R];
    const int OUTPUTS = 8 / W * R; // of the block
    __shared__ float windows[WINDOW * OUTPUTS];
    const int AHEAD = HELD / R; // chunks of each row on their way
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = GATED ? 1 : R;
    // Warps beyond the last output do the last ones again.
    const int own = (blockIdx.x * (8 / W) + warp / W) * outputs, n = min(own, p.n - outputs);
    const int chunks = p.k / 8, first = warp % W * 32 + lane, step = 32 * W;
    const uint4* w[R]; // where this lane reads next
#pragma unroll
    for (int r = 0; r < R; r++)
        w[r] = (const uint4*)(GATED && r == 0 ? p.gate : p.w) + (i64)(GATED ? n : n + r) * chunks + first;
    uint4 q[AHEAD][R];
    int left = chunks - first; // chunks from the next one on
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
        for (int r = 0; r < R; r++)
            if (u * step < left) q[u][r] = load_once(w[r] + u * step);
    const int n0 = blockIdx.x * (8 / W) * R;
    if (!GATED && p.after == CONVOLVE) near_windows(p.conv, n0, OUTPUTS);
    BEGIN();
    if (!GATED && p.after == CONVOLVE) ask_windows(p.conv, n0, OUTPUTS, windows);
    const float4* x = (const float4*)p.x.row(0);
    // Several are asked for at once: the first product of all waits for them.
    for (int i0 = threadIdx.x; i0 < 2 * chunks; i0 += 256 * ASKED) {
        float4 v[ASKED];
#pragma unroll
        for (int u = 0; u < ASKED; u++)
            if (i0 + 256 * u < 2 * chunks) v[u] = x[i0 + 256 * u];
#pragma unroll
        for (int u = 0; u < ASKED; u++)
            if (i0 + 256 * u < 2 * chunks)
                ((uint2*)xs)[i0 + 256 * u] = make_uint2(pack_bf16(v[u].x, v[u].y), pack_bf16(v[u].z, v[u].w));
    }
    if (!GATED && p.after == CONVOLVE) wait_copies<0>();
    __syncthreads();
    const uint4* from = xs + first;
    float sum[R] = {};
#pragma unroll 1
    for (; left > 0; left -= AHEAD * step) {
#pragma unroll
        for (int r = 0; r < R; r++) w[r] += AHEAD * step;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (u * step >= left) break;
            const uint4 v = from[u * step];
#pragma unroll
            for (int r = 0; r < R; r++) {
                const uint4 c = q[u][r];
                if ((u + AHEAD) * step < left) q[u][r] = load_once(w[r] + u * step);
                sum[r] = add_products(v.x, c.x, sum[r]);
                sum[r] = add_products(v.y, c.y, sum[r]);
                sum[r] = add_products(v.z, c.z, sum[r]);
                sum[r] = add_products(v.w, c.w, sum[r]);
            }
        }
        from += AHEAD * step;
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
    if (W > 1) {
        if (lane == 0)
#pragma unroll
            for (int r = 0; r < R; r++) parts[warp][r] = sum[r];
        __syncthreads();
        if (warp % W != 0) return;
#pragma unroll
        for (int r = 0; r < R; r++) {
            sum[r] = 0.0f;
#pragma unroll
            for (int i = 0; i < W; i++) sum[r] += parts[warp + i][r];
        }
    }
    if (GATED) {
        if (lane != 0) return;
        float gate = sum[0] + (p.gate_bias ? p.gate_bias[n] : 0.0f), up = sum[R - 1] + (p.bias ? p.bias[n] : 0.0f);
        p.gate_y.row(0)[n] = gate;
        p.y.row(0)[n] = up;
        p.z.row(0)[n] = activation(gate, p.act) * up;
        return;
    }
    if (lane != 0) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int o = n + r;
        const float y = sum[r] + (p.bias ? p.bias[o] : 0.0f);
        p.y.row(0)[o] = y;
        if (p.after == ADD) p.z.row(0)[o] = y + p.other.row(0)[o];
        if (p.after == CONVOLVE && o >= own) convolve(p.conv, windows, o - n0, OUTPUTS, o, y);
    }
}

#define OF_SPLIT(R, W) \
    KERNEL __launch_bounds__(256, BLOCKS) row_##R##_##W(ARGS(RowProduct) p) { row<R, W, false>(p); }
OF_SPLIT(2, 1)
OF_SPLIT(1, 1)
OF_SPLIT(1, 2)
OF_SPLIT(1, 4)
#define OF_GATE(W) \
    KERNEL __launch_bounds__(256, 4) row_gated_##W(ARGS(RowProduct) p) { row<2, W, true>(p); }
OF_GATE(1)
OF_GATE(2)
OF_GATE(4)

// Products of one row, rounded to BF16, with weights in BF16: the speed is that of memory. The norm that makes the
// row may be done in the same kernel, and so may what follows a product element by element.

#include "common.cuh"
#include "row.cuh"
#include "scan.cuh"

// What follows.
enum After { NOTHING = 0, ADD = 1 };

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
    RowNorm norm; // x is its result
    RowConv conv; // of columns of y
};

// A step of the selective scan whose step sizes are the product, and the norms of its b and c.
struct RowScan {
    RowProduct product;
    In x, z, b, c, a;
    const float *dt_bias, *d;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    int inner, states;
    RowNorm norm_b, norm_c;
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
#if __CUDA_ARCH__ >= 1000
#define BLOCKS 4
#else
#define BLOCKS 5
#endif

// The row in shared memory, in BF16; behind it is room for what its norm takes.
__device__ __forceinline__ void bring(const RowProduct& p, int chunks, uint4* xs) {
    if (p.norm.threads) {
        const float* room = (const float*)(xs + chunks);
        const float by = norm_by<256>(p.norm, room);
#pragma unroll 1
        for (int i = threadIdx.x; i < 4 * chunks; i += 256) {
            const float2 v = norm_two(p.norm, room, i, by);
            ((u32*)xs)[i] = pack_bf16(v.x, v.y);
        }
        return;
    }
    const float4* x = (const float4*)p.x.row(0);
    for (int i = threadIdx.x; i < 2 * chunks; i += 256) {
        float4 v = x[i];
        ((uint2*)xs)[i] = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
}

// W warps share R rows of w: R neighbours, or one of the gate and one of w. The order of a sum depends on
// W alone. K is whole chunks of eight; x, w and gate are aligned to 16 bytes. Shared memory holds x in BF16.
// `between` asks for what else is there once all before the kernel is done. False for warps that have no sum.
template <int R, int W, bool GATED, class Between>
__device__ __forceinline__ bool sums(const RowProduct& p, int n, float* sum, Between between) {
    extern __shared__ __align__(16) uint4 xs[];
    __shared__ float parts[8][R];
    const int AHEAD = HELD / R; // chunks of each row on their way
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
    norm_weights<256>(p.norm, (float*)(xs + chunks));
    BEGIN();
    norm_row<256>(p.norm, (float*)(xs + chunks));
    between();
    bring(p, chunks, xs);
    __syncthreads();
    const uint4* from = xs + first;
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0.0f;
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
        if (warp % W != 0) return false;
#pragma unroll
        for (int r = 0; r < R; r++) {
            sum[r] = 0.0f;
#pragma unroll
            for (int i = 0; i < W; i++) sum[r] += parts[warp + i][r];
        }
    }
    return true;
}

template <int R, int W, bool GATED>
__device__ __forceinline__ void row(const RowProduct& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = GATED ? 1 : R;
    // Warps beyond the last output do the last ones again.
    const int mine = (int)(blockIdx.x * (8 / W) + warp / W) * outputs, n = min(mine, p.n - outputs);
    // Lanes bring the eight things that an output's convolution takes.
    auto convolves = [&]() { return mine < p.n && n >= p.conv.first && n - p.conv.first < p.conv.cols; };
    __shared__ float items[R == 1 ? 8 : 1][8];
    float sum[R];
    auto between = [&]() {
        if (R == 1 && p.conv.y.p && lane < 8) {
            const float* at = convolves() ? conv_item(p.conv, lane, n - p.conv.first) : nullptr;
            copy4(&items[warp][lane], at ? at : p.norm.x.p, at);
        }
        copies_done();
    };
    if (!sums<R, W, GATED>(p, n, sum, between)) return;
    if (R == 1 && p.conv.y.p) {
        wait_copies<0>();
        __syncwarp();
        if (lane == 0 && convolves()) conv_step(p.conv, n - p.conv.first, items[warp], sum[0] + (p.bias ? p.bias[n] : 0.0f));
    }
    if (lane != 0) return;
    if (GATED) {
        float gate = sum[0] + (p.gate_bias ? p.gate_bias[n] : 0.0f), up = sum[R - 1] + (p.bias ? p.bias[n] : 0.0f);
        p.gate_y.row(0)[n] = gate;
        p.y.row(0)[n] = up;
        p.z.row(0)[n] = activation(gate, p.act) * up;
        return;
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float y = sum[r] + (p.bias ? p.bias[n + r] : 0.0f);
        p.y.row(0)[n + r] = y;
        if (p.after == ADD) p.z.row(0)[n + r] = y + p.other.row(0)[n + r];
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

// The norm of up to 32 elements, of which a lane has one; the first warp of all writes it.
__device__ __forceinline__ float normed(const RowNorm& n, float v, int count, int lane) {
    if (!n.threads) return v;
    const float by = 1.0f / sqrtf(warp_sum(v * v) / n.width + n.eps);
    const float y = v * by * (n.weight && lane < count ? n.weight[lane] : 1.0f);
    if (blockIdx.x == 0 && threadIdx.x < 32 && lane < count) n.y.row(0)[lane] = y;
    return y;
}

// Eight lanes share the states of a channel, as scan.cuh has them; four others bring what there is one of.
template <int S, int W>
__device__ __forceinline__ void row_scan(const RowScan& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % 8;
    const int mine = blockIdx.x * (8 / W) + warp / W, channel = min(mine, p.inner - 1);
    auto in = [&](int s) { return lane < 8 && mine < p.inner && state_of<S>(part, s) < p.states; };
    auto state = [&](int s) { return p.state + p.spans[0].slot * p.state_stride + (i64)state_of<S>(part, s) * p.inner + channel; };
    float a[S], h[S], b = 0.0f, c = 0.0f, one = 0.0f, sum[1];
#pragma unroll
    for (int s = 0; s < S; s++) a[s] = in(s) ? p.a.row(state_of<S>(part, s))[channel] * LOG2E : 0.0f, h[s] = 0.0f;
    auto between = [&]() {
        copies_done();
        if (warp % W != 0) return;
        const float* from = lane == 8 ? p.x.p : lane == 9 ? p.z.p : lane == 10 ? p.dt_bias : lane == 11 ? p.d : nullptr;
        if (from) one = from[channel];
        if (lane < p.states) b = (p.norm_b.threads ? p.norm_b.x : p.b).row(0)[lane], c = (p.norm_c.threads ? p.norm_c.x : p.c).row(0)[lane];
#pragma unroll
        for (int s = 0; s < S; s++)
            if (in(s)) h[s] = *state(s);
    };
    if (!sums<1, W, false>(p.product, channel, sum, between)) return;
    b = normed(p.norm_b, b, p.states, lane), c = normed(p.norm_c, c, p.states, lane);
    const float dt = sum[0] + (p.product.bias ? p.product.bias[channel] : 0.0f);
    const float x = __shfl_sync(FULL, one, 8), delta = softplus(dt + __shfl_sync(FULL, one, 10)), u = delta * x;
    float y = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const int n = state_of<S>(part, s);
        const float bn = __shfl_sync(FULL, b, n), cn = __shfl_sync(FULL, c, n);
        h[s] = fmaf(exp2_fast(delta * a[s]), h[s], u * bn);
        y = fmaf(cn, h[s], y);
        if (in(s)) *state(s) = h[s];
    }
#pragma unroll
    for (int o = 4; o; o >>= 1) y += __shfl_xor_sync(FULL, y, o);
    y = fmaf(__shfl_sync(FULL, one, 11), x, y);
    const float z = __shfl_sync(FULL, one, 9);
    if (lane != 0 || mine >= p.inner) return;
    p.product.y.row(0)[channel] = dt;
    if (p.z.p) y *= silu(z);
    p.y.row(0)[channel] = y;
}

#define OF_SCAN(S, W) \
    KERNEL __launch_bounds__(256, 3) row_scan_##S##_##W(ARGS(RowScan) p) { row_scan<S, W>(p); }
OF_SCAN(1, 1)
OF_SCAN(1, 2)
OF_SCAN(1, 4)
OF_SCAN(2, 1)
OF_SCAN(2, 2)
OF_SCAN(2, 4)

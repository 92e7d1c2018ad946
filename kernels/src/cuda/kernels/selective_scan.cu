// The scan of Mamba-1, token by token with states in registers.

#include "common.cuh"
#include "scan.cuh"

struct SelectiveScan {
    In x, dt, z, b, c, a;
    const float *dt_bias, *d;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    int inner, states, group_width; // channels that share b and c
};

// Channels of a block: few, so that blocks share the processors evenly.
#define A_BLOCK 8
#define THREADS (8 * A_BLOCK)

template <int S, bool SHARED>
__device__ __forceinline__ void scan(const SelectiveScan& p) {
    const int N = 8 * S, TOKENS = S <= 4 ? 32 : 16;
    __shared__ __align__(16) float xs[2][TOKENS][A_BLOCK], ds[2][TOKENS][A_BLOCK], zs[2][TOKENS][A_BLOCK];
    __shared__ __align__(16) float bs[2][SHARED ? TOKENS : 1][N], cs[2][SHARED ? TOKENS : 1][N];
    __shared__ __align__(16) float ys[TOKENS][A_BLOCK + 4];
    __shared__ float2 steps[TOKENS][A_BLOCK]; // step size, and that times x
    const Span span = p.spans[blockIdx.y];
    const int tid = threadIdx.x, lane = tid % 8, ch = tid / 8;
    const int c0 = blockIdx.x * A_BLOCK, channel = c0 + ch;
    const bool here = channel < p.inner;
    // Of each tile this thread stages four channels of one token.
    const int my_t = tid / (A_BLOCK / 4), my_c = tid % (A_BLOCK / 4) * 4;
    const bool wide = is_wide(p.x.p, p.x.stride, p.inner) && is_wide(p.dt.p, p.dt.stride, p.inner) &&
                      is_wide(p.y.p, p.y.stride, p.inner) && (!p.z.p || is_wide(p.z.p, p.z.stride, p.inner));
    const bool wide_bc = is_wide(p.b.p, p.b.stride, p.states) && is_wide(p.c.p, p.c.stride, p.states);

    const float* x_at = p.x.row(span.start + my_t) + c0 + my_c;
    const float* dt_at = p.dt.row(span.start + my_t) + c0 + my_c;
    const float* z_at = p.z.row(span.start + my_t) + c0 + my_c;

    auto stage = [&](int tile) {
        int t = tile * TOKENS + my_t, to = tile & 1;
        bool ok = t < span.len;
        if (my_t < TOKENS && wide) {
            ok = ok && c0 + my_c < p.inner;
            copy16(&xs[to][my_t][my_c], ok ? x_at + tile * TOKENS * p.x.stride : p.x.p, ok);
            copy16(&ds[to][my_t][my_c], ok ? dt_at + tile * TOKENS * p.dt.stride : p.dt.p, ok);
            if (p.z.p) copy16(&zs[to][my_t][my_c], ok ? z_at + tile * TOKENS * p.z.stride : p.z.p, ok);
        } else if (my_t < TOKENS) {
            i64 row = span.start + (ok ? t : 0);
            copy_four(&xs[to][my_t][my_c], p.x.row(row), c0 + my_c, p.inner, ok, false);
            copy_four(&ds[to][my_t][my_c], p.dt.row(row), c0 + my_c, p.inner, ok, false);
            if (p.z.p) copy_four(&zs[to][my_t][my_c], p.z.row(row), c0 + my_c, p.inner, ok, false);
        }
        if (SHARED) {
            for (int i = tid; i < TOKENS * N / 4; i += THREADS) {
                int r = i / (N / 4), n = i % (N / 4) * 4, tt = tile * TOKENS + r;
                bool in = tt < span.len;
                i64 of = span.start + (in ? tt : 0);
                copy_four(&bs[to][r][n], p.b.row(of), n, p.states, in, wide_bc);
                copy_four(&cs[to][r][n], p.c.row(of), n, p.states, in, wide_bc);
            }
        }
        copies_done();
    };

    float bias[4], skip[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        bool in = c0 + my_c + e < p.inner;
        bias[e] = in && p.dt_bias ? p.dt_bias[c0 + my_c + e] : 0.0f;
        skip[e] = in ? p.d[c0 + my_c + e] : 0.0f;
    }
    float* state = p.state + span.slot * p.state_stride;
    float h[S], a[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(lane, s);
        bool in = here && n < p.states;
        h[s] = in ? state[(i64)n * p.inner + channel] : 0.0f;
        a[s] = in ? p.a.row(n)[channel] * LOG2E : 0.0f;
    }
    const int group = here ? channel / p.group_width * p.states : 0;

    const int tiles = (span.len + TOKENS - 1) / TOKENS;
    stage(0);
    for (int tile = 0; tile < tiles; tile++) {
        const int at = tile & 1;
        if (tile + 1 < tiles) {
            stage(tile + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        // Step sizes and inputs of what this thread staged. A token that is not there changes nothing.
#pragma unroll
        for (int e = 0; e < (my_t < TOKENS ? 4 : 0); e++) {
            float delta = softplus(ds[at][my_t][my_c + e] + bias[e]);
            if (tile * TOKENS + my_t >= span.len) delta = 0.0f;
            steps[my_t][my_c + e] = make_float2(delta, delta * xs[at][my_t][my_c + e]);
        }
        __syncthreads();
        const int left = min(TOKENS, span.len - tile * TOKENS);
        for (int t0 = 0; t0 < left; t0 += 8) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = t0 + j;
                float b[S], c[S];
                if (SHARED) {
                    take<S>(bs[at][t], lane, b);
                    take<S>(cs[at][t], lane, c);
                } else {
                    i64 row = span.start + min(tile * TOKENS + t, span.len - 1);
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        int n = state_of<S>(lane, s);
                        b[s] = n < p.states ? p.b.row(row)[group + n] : 0.0f;
                        c[s] = n < p.states ? p.c.row(row)[group + n] : 0.0f;
                    }
                }
                const float2 step = steps[t][ch];
                const float delta = step.x, u = step.y;
                float sum = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = fmaf(exp2_fast(delta * a[s]), h[s], u * b[s]);
                    sum = fmaf(c[s], h[s], sum);
                }
                v[j] = sum;
            }
            float sum = sum_scattered(v, lane);
            ys[t0 + lane][ch] = sum;
        }
        __syncthreads();
        if (my_t < left) {
            float* to = p.y.row(span.start + tile * TOKENS + my_t) + c0 + my_c;
            float out[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                out[e] = fmaf(skip[e], xs[at][my_t][my_c + e], ys[my_t][my_c + e]);
                if (p.z.p) out[e] *= silu(zs[at][my_t][my_c + e]);
            }
            if (wide) {
                if (c0 + my_c < p.inner) *(float4*)to = make_float4(out[0], out[1], out[2], out[3]);
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (c0 + my_c + e < p.inner) to[e] = out[e];
            }
        }
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(lane, s);
        if (here && n < p.states) state[(i64)n * p.inner + channel] = h[s];
    }
}

#define OF_STATES(S) \
    KERNEL __launch_bounds__(THREADS, 8) selective_scan_##S(ARGS(SelectiveScan) p) { BEGIN(); scan<S, true>(p); }
OF_STATES(1)
OF_STATES(2)
OF_STATES(4)
OF_STATES(8)
#define OF_GROUPS(S) \
    KERNEL __launch_bounds__(THREADS, 8) selective_scan_groups_##S(ARGS(SelectiveScan) p) { BEGIN(); scan<S, false>(p); }
OF_GROUPS(1)
OF_GROUPS(2)
OF_GROUPS(4)

template <int S>
__device__ __forceinline__ void step(const SelectiveScan& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel = min((int)blockIdx.x * STEP_CHANNELS + lane, p.inner - 1);
    const bool here = blockIdx.x * STEP_CHANNELS + lane < p.inner;
    const int group = channel / p.group_width * p.states;
    const float bias = p.dt_bias ? p.dt_bias[channel] : 0.0f, skip = p.d[channel];
    float h[S], a[S], b[S], c[S], sum = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        a[s] = n < p.states ? p.a.row(n)[channel] * LOG2E : 0.0f;
    }
    BEGIN();
    const Span span = p.spans[blockIdx.y];
    float* state = p.state + span.slot * p.state_stride + channel;
    const float x = p.x.row(span.start)[channel], dt = p.dt.row(span.start)[channel];
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        bool in = n < p.states;
        h[s] = in ? state[(i64)n * p.inner] : 0.0f;
        b[s] = in ? p.b.row(span.start)[group + n] : 0.0f;
        c[s] = in ? p.c.row(span.start)[group + n] : 0.0f;
    }
    const float delta = softplus(dt + bias), u = delta * x;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        h[s] = fmaf(exp2_fast(delta * a[s]), h[s], u * b[s]);
        sum = fmaf(c[s], h[s], sum);
        if (here && n < p.states) state[(i64)n * p.inner] = h[s];
    }
    sum = sum_parts(sum, warp, lane);
    if (warp != 0 || !here) return;
    float y = fmaf(skip, x, sum);
    if (p.z.p) y *= silu(p.z.row(span.start)[channel]);
    p.y.row(span.start)[channel] = y;
}

#define OF_STEP(S) \
    KERNEL __launch_bounds__(256) selective_scan_step_##S(ARGS(SelectiveScan) p) { step<S>(p); }
OF_STEP(1)
OF_STEP(2)
OF_STEP(4)

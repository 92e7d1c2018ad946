// The scan of Mamba-2, token by token with states in registers: one decay a head.

#include "common.cuh"
#include "scan.cuh"

struct SsdScan {
    In x, dt, b, c;
    const float *a, *dt_bias, *d;
    float least, greatest;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    int heads, width, states, group_heads, scale_input;
};

template <int S>
__device__ __forceinline__ void scan(const SsdScan& p) {
    const int N = 8 * S, TOKENS = S <= 8 ? 32 : 256 / S;
    __shared__ __align__(16) float xs[2][TOKENS][CHANNELS], bs[2][TOKENS][N], cs[2][TOKENS][N];
    __shared__ __align__(16) float ys[TOKENS][CHANNELS + 4];
    __shared__ float steps[2][TOKENS], inputs[TOKENS], decays[TOKENS];
    const Span span = p.spans[blockIdx.y];
    const int tid = threadIdx.x, lane = tid % 8, ch = tid / 8;
    const int parts = (p.width + CHANNELS - 1) / CHANNELS;
    const int head = blockIdx.x / parts, p0 = blockIdx.x % parts * CHANNELS, channel = p0 + ch;
    const int c0 = head * p.width + p0, left_of_head = p.width - p0;
    const bool here = ch < left_of_head;
    const int my_t = tid / 4, my_c = tid % 4 * 4, group = head / p.group_heads * p.states;
    const bool wide = is_wide(p.x.p + c0, p.x.stride, left_of_head) && is_wide(p.y.p + c0, p.y.stride, left_of_head);
    const bool wide_bc = is_wide(p.b.p + group, p.b.stride, p.states) && is_wide(p.c.p + group, p.c.stride, p.states);

    auto stage = [&](int tile) {
        int to = tile & 1;
        if (my_t < TOKENS) {
            int t = tile * TOKENS + my_t;
            bool ok = t < span.len;
            copy_four(&xs[to][my_t][my_c], p.x.row(span.start + (ok ? t : 0)) + c0, my_c, left_of_head, ok, wide);
        }
        for (int i = tid; i < TOKENS * N / 4; i += 128) {
            int r = i / (N / 4), n = i % (N / 4) * 4, t = tile * TOKENS + r;
            bool ok = t < span.len;
            i64 row = span.start + (ok ? t : 0);
            copy_four(&bs[to][r][n], p.b.row(row) + group, n, p.states, ok, wide_bc);
            copy_four(&cs[to][r][n], p.c.row(row) + group, n, p.states, ok, wide_bc);
        }
        if (tid < TOKENS) {
            int t = tile * TOKENS + tid;
            bool ok = t < span.len;
            copy4(&steps[to][tid], p.dt.row(span.start + (ok ? t : 0)) + head, ok);
        }
        copies_done();
    };

    const float a = p.a[head], dt_bias = p.dt_bias ? p.dt_bias[head] : 0.0f, skip = p.d ? p.d[head] : 0.0f;
    float* state = p.state + span.slot * p.state_stride + (i64)head * p.states * p.width + channel;
    float h[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(lane, s);
        h[s] = here && n < p.states ? state[(i64)n * p.width] : 0.0f;
    }

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
        const int left = min(TOKENS, span.len - tile * TOKENS);
        if (tid < TOKENS) {
            float delta = fminf(fmaxf(softplus(steps[at][tid] + dt_bias), p.least), p.greatest);
            // A token that is not there changes nothing; its x is zero.
            decays[tid] = tid < left ? expf(delta * a) : 1.0f;
            inputs[tid] = p.scale_input ? delta : 1.0f;
        }
        __syncthreads();
        for (int t0 = 0; t0 < left; t0 += 8) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = t0 + j;
                float decay = decays[t], u = inputs[t] * xs[at][t][ch], sum = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s += 4) {
                    const int R = S < 4 ? S : 4;
                    float b[R], c[R];
                    take<R>(bs[at][t] + s * 8, lane, b);
                    take<R>(cs[at][t] + s * 8, lane, c);
#pragma unroll
                    for (int e = 0; e < R; e++) {
                        h[s + e] = fmaf(decay, h[s + e], u * b[e]);
                        sum = fmaf(c[e], h[s + e], sum);
                    }
                }
                v[j] = sum;
            }
            float sum = sum_scattered(v, lane);
            ys[t0 + lane][ch] = sum;
        }
        __syncthreads();
        if (my_t < left) {
            float* to = p.y.row(span.start + tile * TOKENS + my_t) + c0 + my_c;
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (my_c + e < left_of_head) to[e] = fmaf(skip, xs[at][my_t][my_c + e], ys[my_t][my_c + e]);
        }
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(lane, s);
        if (here && n < p.states) state[(i64)n * p.width] = h[s];
    }
}

#define OF_STATES(S) \
    KERNEL __launch_bounds__(128, 2) ssd_scan_##S(ARGS(SsdScan) p) { BEGIN(); scan<S>(p); }
OF_STATES(1)
OF_STATES(2)
OF_STATES(4)
OF_STATES(8)
OF_STATES(16)
OF_STATES(32)

// C neighbouring numbers of a state, which is read and written once a step.
template <int C>
__device__ __forceinline__ void take_some(const float* from, float* v) {
    if (C == 2) {
        const float2 two = __ldcs((const float2*)from);
        v[0] = two.x, v[C - 1] = two.y;
    } else {
        v[0] = __ldcs(from);
    }
}
template <int C>
__device__ __forceinline__ void put_some(float* to, const float* v) {
    if (C == 2) __stcs((float2*)to, make_float2(v[0], v[C - 1]));
    else __stcs(to, v[0]);
}

// A lane takes C channels of a head, whose width is whole times C.
template <int S, int C>
__device__ __forceinline__ void step(const SsdScan& p) {
    __shared__ float sums[C][8][STEP_CHANNELS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int parts = (p.width + C * STEP_CHANNELS - 1) / (C * STEP_CHANNELS);
    const int head = blockIdx.x / parts, p0 = blockIdx.x % parts * C * STEP_CHANNELS + C * lane;
    const bool here = p0 < p.width;
    const int of_head = here ? p0 : p.width - C, channel = head * p.width + of_head;
    const int group = head / p.group_heads * p.states;
    const float a = p.a[head], dt_bias = p.dt_bias ? p.dt_bias[head] : 0.0f, skip = p.d ? p.d[head] : 0.0f;
    const Span span = p.spans[blockIdx.y];
    float* state = p.state + span.slot * p.state_stride + (i64)head * p.states * p.width + of_head;
    if (gridDim.y < MANY_SPANS)
#pragma unroll
        for (int s = 0; s < S; s++)
            if (state_of<S>(warp, s) < p.states) come_near(state + (i64)state_of<S>(warp, s) * p.width);
    BEGIN();
    const float dt = p.dt.row(span.start)[head];
    float h[S][C], x[C], u[C], sum[C];
#pragma unroll
    for (int i = 0; i < C; i++) x[i] = p.x.row(span.start)[channel + i], sum[i] = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const int n = state_of<S>(warp, s);
#pragma unroll
        for (int i = 0; i < C; i++) h[s][i] = 0.0f;
        if (n < p.states) take_some<C>(state + (i64)n * p.width, h[s]);
    }
    const float delta = fminf(fmaxf(softplus(dt + dt_bias), p.least), p.greatest), decay = expf(delta * a);
#pragma unroll
    for (int i = 0; i < C; i++) u[i] = (p.scale_input ? delta : 1.0f) * x[i];
    const float *b = p.b.row(span.start) + group, *c = p.c.row(span.start) + group;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const int n = state_of<S>(warp, s);
        const bool in = n < p.states;
        const float bn = in ? b[n] : 0.0f, cn = in ? c[n] : 0.0f;
#pragma unroll
        for (int i = 0; i < C; i++) {
            h[s][i] = fmaf(decay, h[s][i], u[i] * bn);
            sum[i] = fmaf(cn, h[s][i], sum[i]);
        }
        if (here && in) put_some<C>(state + (i64)n * p.width, h[s]);
    }
#pragma unroll
    for (int i = 0; i < C; i++) sums[i][warp][lane] = sum[i];
    __syncthreads();
    if (warp != 0 || !here) return;
#pragma unroll
    for (int i = 0; i < C; i++) p.y.row(span.start)[channel + i] = fmaf(skip, x[i], eight_parts(sums[i], lane));
}

#define OF_STEP(S)                                                                                     \
    KERNEL __launch_bounds__(256) ssd_scan_step_##S(ARGS(SsdScan) p) { step<S, 1>(p); }                  \
    KERNEL __launch_bounds__(256) ssd_scan_pairs_##S(ARGS(SsdScan) p) { step<S, 2>(p); }
OF_STEP(1)
OF_STEP(2)
OF_STEP(4)
OF_STEP(8)
OF_STEP(16)
OF_STEP(32)

// The scan of Mamba-1, token by token with states in registers.

#include "common.cuh"
#include "scan.cuh"
#include "norm.cuh"

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
#define SCANNING (4 * A_BLOCK) // threads that go on with states, two channels each
#define MOVING (8 * A_BLOCK)   // threads that prepare and finish

// Where the eight parts of a channel's output stand, of a token: so that writers do not meet.
#define PARTS (9 * A_BLOCK)
__device__ __forceinline__ int part_of(int channel) { return 8 * channel + channel / 4 * 8; }

// Tiles of tokens go by. Some threads of a block take the states through one; the others meanwhile make the step sizes
// of the next, ask for inputs of the one after that, and sum and write the outputs of the one before.
template <int S, bool SHARED>
__device__ __forceinline__ void scan(const SelectiveScan& p) {
    const int GROUP = SHARED ? 8 : 4;
    const int N = 8 * S, TOKENS = S <= 4 ? 32 : 16; // a thread has four channels of one
    __shared__ __align__(16) float bs[3][SHARED ? TOKENS : 1][N], cs[3][SHARED ? TOKENS : 1][N];
    __shared__ __align__(16) float parts[2][TOKENS][PARTS];
    __shared__ __align__(16) float2 steps[2][TOKENS][A_BLOCK + 2]; // step size, and that times x
    const Span span = p.spans[blockIdx.y];
    const bool scans = threadIdx.x < SCANNING;
    const int tid = scans ? threadIdx.x : threadIdx.x - SCANNING, lane = tid % 8, ch = tid / 8 * 2;
    const int c0 = blockIdx.x * A_BLOCK;
    const int my_t = tid / (A_BLOCK / 4), my_c = tid % (A_BLOCK / 4) * 4;
    const bool wide = is_wide(p.x.p, p.x.stride, p.inner) && is_wide(p.dt.p, p.dt.stride, p.inner) &&
                      is_wide(p.y.p, p.y.stride, p.inner) && (!p.z.p || is_wide(p.z.p, p.z.stride, p.inner));
    const bool wide_bc = is_wide(p.b.p, p.b.stride, p.states) && is_wide(p.c.p, p.c.stride, p.states);

    // Four neighbours of a token's row; zeros where there are none.
    auto four = [&](const In& of, int t) {
        const float* from = of.row(span.start + min(t, span.len - 1)) + c0 + my_c;
        if (wide) return t < span.len && c0 + my_c < p.inner ? *(const float4*)from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = t < span.len && c0 + my_c + e < p.inner ? from[e] : 0.0f;
        return make_float4(v[0], v[1], v[2], v[3]);
    };
    auto stage = [&](int tile) {
        if (!SHARED) return;
        const int to = tile % 3;
        for (int i = tid; i < TOKENS * N / 4; i += MOVING) {
            int r = i / (N / 4), n = i % (N / 4) * 4, t = tile * TOKENS + r;
            bool in = t < span.len;
            i64 of = span.start + (in ? t : 0);
            copy_four(&bs[to][r][n], p.b.row(of), n, p.states, in, wide_bc);
            copy_four(&cs[to][r][n], p.c.row(of), n, p.states, in, wide_bc);
        }
        copies_done();
    };

    float* state = p.state + span.slot * p.state_stride;
    float h[2][S], a[2][S];
    int group[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int channel = c0 + ch + i;
        group[i] = min(channel, p.inner - 1) / p.group_width * p.states;
#pragma unroll
        for (int s = 0; s < S; s++) {
            int n = state_of<S>(lane, s);
            bool in = scans && channel < p.inner && n < p.states;
            h[i][s] = in ? state[(i64)n * p.inner + channel] : 0.0f;
            a[i][s] = in ? p.a.row(n)[channel] * LOG2E : 0.0f;
        }
    }

    float bias[4], skip[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        bool in = c0 + my_c + e < p.inner;
        bias[e] = in && p.dt_bias ? p.dt_bias[c0 + my_c + e] : 0.0f;
        skip[e] = in ? p.d[c0 + my_c + e] : 0.0f;
    }
    // A token that is not there changes nothing.
    auto prepare = [&](int tile, float4 x, float4 dt) {
        if (TOKENS < 32 && my_t >= TOKENS) return;
        const float xs[4] = {x.x, x.y, x.z, x.w}, ds[4] = {dt.x, dt.y, dt.z, dt.w};
        float delta[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            delta[e] = softplus(ds[e] + bias[e]);
            if (tile * TOKENS + my_t >= span.len) delta[e] = 0.0f;
        }
        float4* to = (float4*)&steps[tile & 1][my_t][my_c];
        to[0] = make_float4(delta[0], delta[0] * xs[0], delta[1], delta[1] * xs[1]);
        to[1] = make_float4(delta[2], delta[2] * xs[2], delta[3], delta[3] * xs[3]);
    };
    // Tokens from `t0` on. Their sums are stored when all are there: loads do not pass stores.
    auto some = [&](int tile, int t0) {
        float sums[GROUP][2];
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            const int t = t0 + j;
            float b[2][S], c[2][S];
            if (SHARED) {
                take<S>(bs[tile % 3][t], lane, b[0]);
                take<S>(cs[tile % 3][t], lane, c[0]);
            } else {
                i64 row = span.start + min(tile * TOKENS + t, span.len - 1);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        int n = state_of<S>(lane, s);
                        b[i][s] = n < p.states ? p.b.row(row)[group[i] + n] : 0.0f;
                        c[i][s] = n < p.states ? p.c.row(row)[group[i] + n] : 0.0f;
                    }
            }
            const float4 both = *(const float4*)&steps[tile & 1][t][ch];
            const float delta[2] = {both.x, both.z}, u[2] = {both.y, both.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int of = SHARED ? 0 : i;
                float sum = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[i][s] = fmaf(exp2_fast(delta[i] * a[i][s]), h[i][s], u[i] * b[of][s]);
                    sum = fmaf(c[of][s], h[i][s], sum);
                }
                sums[j][i] = sum;
            }
        }
#pragma unroll
        for (int j = 0; j < GROUP; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) parts[tile & 1][t0 + j][part_of(ch + i) + lane] = sums[j][i];
    };
    // In the order of `sum_parts`.
    auto finish = [&](int tile, float4 x, float4 z) {
        if (TOKENS < 32 && my_t >= TOKENS) return;
        const float xs[4] = {x.x, x.y, x.z, x.w}, zs[4] = {z.x, z.y, z.z, z.w};
        const int t = tile * TOKENS + my_t;
        float out[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float4* v = (const float4*)&parts[tile & 1][my_t][part_of(my_c + e)];
            const float4 u = v[0], w = v[1];
            float sum = ((u.x + w.x) + (u.z + w.z)) + ((u.y + w.y) + (u.w + w.w));
            out[e] = fmaf(skip[e], xs[e], sum);
            if (p.z.p) out[e] *= silu(zs[e]);
        }
        if (t >= span.len) return;
        float* to = p.y.row(span.start + t) + c0 + my_c;
        if (wide) {
            if (c0 + my_c < p.inner) *(float4*)to = make_float4(out[0], out[1], out[2], out[3]);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (c0 + my_c + e < p.inner) to[e] = out[e];
        }
    };

    const int tiles = (span.len + TOKENS - 1) / TOKENS;
    if (scans) {
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            const int left = span.len - tile * TOKENS;
            __syncthreads();
#pragma unroll 1
            for (int t = 0; t < min(left, TOKENS); t += GROUP) some(tile, t);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int s = 0; s < S; s++) {
                int n = state_of<S>(lane, s), channel = c0 + ch + i;
                if (channel < p.inner && n < p.states) state[(i64)n * p.inner + channel] = h[i][s];
            }
        return;
    }
    const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    stage(0), stage(1);
    // Of the tile before, of this one, of the next.
    float4 x_before = none, z_before = none, x = four(p.x, my_t), z = p.z.p ? four(p.z, my_t) : none;
    float4 x_next = four(p.x, TOKENS + my_t), dt_next = four(p.dt, TOKENS + my_t), z_next = p.z.p ? four(p.z, TOKENS + my_t) : none;
    prepare(0, x, four(p.dt, my_t));
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        wait_copies<1>();
        __syncthreads();
        stage(tile + 2);
        const int ahead = (tile + 2) * TOKENS + my_t;
        const float4 x_after = four(p.x, ahead), dt_after = four(p.dt, ahead), z_after = p.z.p ? four(p.z, ahead) : none;
        prepare(tile + 1, x_next, dt_next);
        if (tile) finish(tile - 1, x_before, z_before);
        x_before = x, z_before = z, x = x_next, z = z_next;
        x_next = x_after, dt_next = dt_after, z_next = z_after;
    }
    __syncthreads();
    finish(tiles - 1, x_before, z_before);
    wait_copies<0>();
}

#define OF_STATES(S) \
    KERNEL __launch_bounds__(SCANNING + MOVING, 5) selective_scan_##S(ARGS(SelectiveScan) p) { BEGIN(); scan<S, true>(p); }
OF_STATES(1)
OF_STATES(2)
OF_STATES(4)
OF_STATES(8)
#define OF_GROUPS(S) \
    KERNEL __launch_bounds__(SCANNING + MOVING, 5) selective_scan_groups_##S(ARGS(SelectiveScan) p) { BEGIN(); scan<S, false>(p); }
OF_GROUPS(1)
OF_GROUPS(2)
OF_GROUPS(4)

template <int S>
__device__ __forceinline__ void states_come(const float* state, int warp, const SelectiveScan& p) {
#pragma unroll
    for (int s = 0; s < S; s++) {
        const int n = state_of<S>(warp, s);
        if (n < p.states) come_near(state + (i64)n * p.inner);
    }
}

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
    const Span span = p.spans[blockIdx.y];
    float* state = p.state + span.slot * p.state_stride + channel;
    if (gridDim.y < MANY_SPANS) states_come<S>(state, warp, p);
    BEGIN();
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

// A step whose step sizes are a product of one row, in BF16, maybe of what is normed before it, as b and c may be: all
// that stands between two large products.
struct Given {
    Norm norms[4];
    int threads[4]; // as `rms_norms` would have; sums are added in that order
    int count;
    // The product: x, which is `norms[x_of]`'s result if that is not negative; the rest as in row.cu.
    In x;
    const u16* w;
    const float* bias;
    Out y;
    int k, warps; // warps that share a row there
    int x_of, b_of, c_of;
};

// By one warp, in the order in which `threads` would do it; also to `to`.
__device__ __forceinline__ void norm_row(const Norm& n, int threads, float* to, int lane, bool writes) {
    const float* x = n.x.row(0);
    float parts = 0.0f;
    for (int first = 0; first < threads; first += 32) {
        float sum = 0.0f;
        for (int i = first + lane; i < n.width; i += threads) {
            const float v = x[i];
            to[i] = v;
            sum = fmaf(v, v, sum);
        }
        sum = warp_sum(sum);
        if (lane == first / 32) parts = sum;
    }
    const float sum = threads == 32 ? __shfl_sync(FULL, parts, 0) : warp_sum(parts);
    const float by = 1.0f / sqrtf(sum / n.width + n.eps);
    for (int i = lane; i < n.width; i += 32) {
        const float y = to[i] * by * (n.weight ? n.weight[i] : 1.0f);
        to[i] = y;
        if (writes) n.y.row(0)[i] = y;
    }
}

// A block takes 32 channels.
template <int S>
__device__ __forceinline__ void step_given(const SelectiveScan& p, const Given& g) {
    extern __shared__ __align__(16) float normed[];
    __shared__ float dts[STEP_CHANNELS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c0 = blockIdx.x * STEP_CHANNELS;
    const int channel = min(c0 + lane, p.inner - 1), chunks = g.k / 8, mine = c0 + 4 * warp;
    const bool here = c0 + lane < p.inner;
    const int group = channel / p.group_width * p.states;
    const float dt_bias = p.dt_bias ? p.dt_bias[channel] : 0.0f, skip = p.d[channel];
    float h[S], a[S], sum = 0.0f;
    uint4 q[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        q[i] = lane < chunks ? __ldg((const uint4*)g.w + (i64)min(mine + i, p.inner - 1) * chunks + lane) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        a[s] = n < p.states ? p.a.row(n)[channel] * LOG2E : 0.0f;
    }
    const Span span = p.spans[0];
    float* state = p.state + span.slot * p.state_stride + channel;
    states_come<S>(state, warp, p);
    BEGIN();
    const float x = p.x.row(span.start)[channel], z = p.z.p ? p.z.row(span.start)[channel] : 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        h[s] = n < p.states ? state[(i64)n * p.inner] : 0.0f;
    }
    // Where the result of a norm stands.
    auto result = [&](int of) {
        float* at = normed;
        for (int i = 0; i < of; i++) at += g.norms[i].width;
        return at;
    };
    if (warp < g.count) norm_row(g.norms[warp], g.threads[warp], result(warp), lane, blockIdx.x == 0);
    if (g.count) __syncthreads();
    const float* from = g.x_of < 0 ? g.x.row(0) : result(g.x_of);
    float sums[4] = {};
    for (int i = lane; i < chunks; i += 32) {
        u32 v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = pack_bf16(from[8 * i + 2 * e], from[8 * i + 2 * e + 1]);
#pragma unroll
        for (int o = 0; o < 4; o++) {
            if (i >= 32) q[o] = __ldg((const uint4*)g.w + (i64)min(mine + o, p.inner - 1) * chunks + i);
            const u32 w[4] = {q[o].x, q[o].y, q[o].z, q[o].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[o] = fmaf(low_bf16(v[e]), low_bf16(w[e]), sums[o]);
                sums[o] = fmaf(high_bf16(v[e]), high_bf16(w[e]), sums[o]);
            }
        }
    }
#pragma unroll
    for (int o = 0; o < 4; o++) {
        sums[o] = warp_sum(sums[o]);
        // There the others' parts, which are nothing, are added.
        if (g.warps > 1) sums[o] += 0.0f;
    }
    if (lane < 4) {
        float y = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
        const int n = mine + lane;
        y += g.bias && n < p.inner ? g.bias[n] : 0.0f;
        if (n < p.inner) g.y.row(0)[n] = y;
        dts[4 * warp + lane] = y;
    }
    __syncthreads();
    const float delta = softplus(dts[lane] + dt_bias), u = delta * x;
    const float* b = (g.b_of < 0 ? p.b.row(span.start) : result(g.b_of)) + group;
    const float* c = (g.c_of < 0 ? p.c.row(span.start) : result(g.c_of)) + group;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = state_of<S>(warp, s);
        const bool in = n < p.states;
        h[s] = fmaf(exp2_fast(delta * a[s]), h[s], u * (in ? b[n] : 0.0f));
        sum = fmaf(in ? c[n] : 0.0f, h[s], sum);
        if (here && in) state[(i64)n * p.inner] = h[s];
    }
    sum = sum_parts(sum, warp, lane);
    if (warp != 0 || !here) return;
    float y = fmaf(skip, x, sum);
    if (p.z.p) y *= silu(z);
    p.y.row(span.start)[channel] = y;
}

#define OF_STEP_GIVEN(S) \
    KERNEL __launch_bounds__(256, 2) selective_scan_given_##S(ARGS(SelectiveScan) p, ARGS(Given) g) { step_given<S>(p, g); }
OF_STEP_GIVEN(1)
OF_STEP_GIVEN(2)
OF_STEP_GIVEN(4)

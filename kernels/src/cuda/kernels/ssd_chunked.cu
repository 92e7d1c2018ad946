// The scan of Mamba-2 by chunks: see ssd_chunked.rs. First the products of c and b within chunks, once for a
// group; then, a block for some channels of a head, chunk after chunk; at last what an unfinished chunk
// keeps. Every sum is one chain in order of n or s, so that no cut of a sequence changes a bit.

#include "common.cuh"

#define PARTS 16 // channels of a block
#define ROWS 32  // tokens, or tokens of the chunk, at a time

struct SsdChunked {
    In x, dt, b, c;
    const float *a, *dt_bias, *d;
    float least, greatest;
    float *state, *inputs, *kept, *decays; // S, u, b, l
    i64 state_stride, inputs_stride, kept_stride, decays_stride;
    Out y;
    const Span* spans;
    const u32* span_of;
    float* scores; // (rows, groups, Q)
    int heads, width, states, groups, scale_input, size;
};

__device__ __forceinline__ float step_of(const SsdChunked& p, i64 row, int head) {
    float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    return fminf(fmaxf(softplus(p.dt.row(row)[head] + bias), p.least), p.greatest);
}
__device__ __forceinline__ float input_of(const SsdChunked& p, i64 row, int head, int channel) {
    float x = p.x.row(row)[head * p.width + channel];
    return p.scale_input ? __fmul_rn(step_of(p, row, head), x) : x;
}

// c[t] · b[s] for the tokens s of t's chunk up to t.
KERNEL __launch_bounds__(128) ssd_scores(ARGS(SsdChunked) p) {
    BEGIN();
    extern __shared__ float cs[];
    const int t = blockIdx.x, g = blockIdx.y;
    const Span span = p.spans[p.span_of[t]];
    const int i = t - span.start, place = (span.position + i) % p.size;
    for (int n = threadIdx.x; n < p.states; n += 128) cs[n] = p.c.row(t)[g * p.states + n];
    __syncthreads();
    for (int s = threadIdx.x; s <= place; s += 128) {
        const float* b = s >= place - i ? p.b.row(t - (place - s)) + g * p.states
                                        : p.kept + span.slot * p.kept_stride + ((i64)g * p.size + s) * p.states;
        float sum = 0.0f;
#pragma unroll 4
        for (int n = 0; n < p.states; n++) sum = fmaf(cs[n], b[n], sum);
        p.scores[((i64)t * p.groups + g) * p.size + s] = sum;
    }
}

// NI: 32 states each.
template <int NI>
__device__ __forceinline__ void chunks(const SsdChunked& p) {
    extern __shared__ __align__(16) float room[];
    const int N = 32 * NI, PITCH = N + 4, size = p.size;
    float* S = room;                  // (N, PARTS)
    float* cs = S + N * PARTS;        // (ROWS, PITCH)
    float* ws = cs + ROWS * PITCH;    // (ROWS, ROWS)
    float* us = ws + ROWS * ROWS;     // (Q, PARTS)
    float* ls = us + size * PARTS;    // Q
    const Span span = p.spans[blockIdx.y];
    const int tid = threadIdx.x, ch = tid % PARTS, r = tid / PARTS;
    const int parts = (p.width + PARTS - 1) / PARTS, head = blockIdx.x / parts, channel = blockIdx.x % parts * PARTS + ch;
    const bool here = channel < p.width;
    const int g = head / (p.heads / p.groups);
    const float a = p.a[head], skip = p.d ? p.d[head] : 0.0f;
    float* state = p.state + span.slot * p.state_stride + (i64)head * p.states * p.width + channel;
    const float* kept = p.kept + span.slot * p.kept_stride + (i64)g * size * p.states;
    for (int n = r; n < N; n += 8) S[n * PARTS + ch] = here && n < p.states ? state[(i64)n * p.width] : 0.0f;
    bool changed = false;

    int first = span.position % size; // place of the piece's first token
    if (first) {
        const float* u = p.inputs + span.slot * p.inputs_stride + (i64)head * size * p.width + channel;
        for (int s = r; s < first; s += 8) us[s * PARTS + ch] = here ? u[(i64)s * p.width] : 0.0f;
        const float* l = p.decays + span.slot * p.decays_stride + (i64)head * size;
        for (int s = tid; s < first; s += 128) ls[s] = l[s];
    }
#pragma unroll 1
    for (int i = 0; i < span.len;) {
        const int last = min(size, first + span.len - i);
        const i64 row0 = span.start + i - first; // of the chunk's first token, were it in the batch
        for (int s = first + tid; s < last; s += 128) ls[s] = step_of(p, row0 + s, head);
        __syncthreads();
        for (int s = first + r; s < last; s += 8) {
            float x = here ? p.x.row(row0 + s)[head * p.width + channel] : 0.0f;
            us[s * PARTS + ch] = p.scale_input ? __fmul_rn(ls[s], x) : x;
        }
        __syncthreads();
        if (tid == 0) {
            float l = first ? ls[first - 1] : 0.0f;
#pragma unroll 4
            for (int s = first; s < last; s++) ls[s] = l = fmaf(ls[s], a, l);
        }
#pragma unroll 1
        for (int t0 = first; t0 < last; t0 += ROWS) {
            __syncthreads();
#pragma unroll 1
            for (int e = tid; e < ROWS * N; e += 128) {
                int t = t0 + e / N, n = e % N;
                cs[e / N * PITCH + n] = t < last && n < p.states ? p.c.row(row0 + t)[g * p.states + n] : 0.0f;
            }
            __syncthreads();
            float sum[4] = {};
#pragma unroll 1
            for (int n = 0; n < N; n += 4) {
                float s[4];
#pragma unroll
                for (int e = 0; e < 4; e++) s[e] = S[(n + e) * PARTS + ch];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float4 c = *(const float4*)(cs + (r + 8 * j) * PITCH + n);
                    sum[j] = fmaf(c.x, s[0], sum[j]), sum[j] = fmaf(c.y, s[1], sum[j]);
                    sum[j] = fmaf(c.z, s[2], sum[j]), sum[j] = fmaf(c.w, s[3], sum[j]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int t = t0 + r + 8 * j;
                if (t < last) sum[j] *= expf(ls[t]);
            }
            const int end = min(last, t0 + ROWS);
#pragma unroll 1
            for (int s0 = 0; s0 < end; s0 += ROWS) {
                __syncthreads();
#pragma unroll 1
                for (int e = tid; e < ROWS * ROWS; e += 128) {
                    int t = t0 + e / ROWS, s = s0 + e % ROWS;
                    if (t < last && s <= t)
                        ws[e] = expf(ls[t] - ls[s]) * p.scores[((row0 + t) * p.groups + g) * size + s];
                }
                __syncthreads();
#pragma unroll 1
                for (int s = s0; s < min(end, s0 + ROWS); s++) {
                    float u = us[s * PARTS + ch];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        if (s <= t0 + r + 8 * j) sum[j] = fmaf(ws[(r + 8 * j) * ROWS + s - s0], u, sum[j]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int t = t0 + r + 8 * j, c = head * p.width + channel;
                if (t < last && here) p.y.row(row0 + t)[c] = fmaf(skip, p.x.row(row0 + t)[c], sum[j]);
            }
        }
        __syncthreads();
        if (last == size) {
            changed = true;
            const float l = ls[size - 1], decay = expf(l);
            for (int s = r; s < size; s += 8) us[s * PARTS + ch] *= expf(l - ls[s]);
            float sum[NI][4];
#pragma unroll
            for (int k = 0; k < NI; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[k][e] = decay * S[(32 * k + 4 * r + e) * PARTS + ch];
#pragma unroll 1
            for (int s0 = 0; s0 < size; s0 += ROWS) {
                __syncthreads();
#pragma unroll 1
                for (int e = tid; e < ROWS * N; e += 128) {
                    int s = s0 + e / N, n = e % N;
                    float v = 0.0f;
                    if (s < size && n < p.states)
                        v = s >= first ? p.b.row(row0 + s)[g * p.states + n] : kept[(i64)s * p.states + n];
                    cs[e / N * PITCH + n] = v;
                }
                __syncthreads();
#pragma unroll 1
                for (int s = s0; s < min(size, s0 + ROWS); s++) {
                    float u = us[s * PARTS + ch];
#pragma unroll
                    for (int k = 0; k < NI; k++) {
                        float4 b = *(const float4*)(cs + (s - s0) * PITCH + 32 * k + 4 * r);
                        sum[k][0] = fmaf(b.x, u, sum[k][0]), sum[k][1] = fmaf(b.y, u, sum[k][1]);
                        sum[k][2] = fmaf(b.z, u, sum[k][2]), sum[k][3] = fmaf(b.w, u, sum[k][3]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < NI; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) S[(32 * k + 4 * r + e) * PARTS + ch] = sum[k][e];
            __syncthreads();
        }
        i += last - first;
        first = 0;
    }
    if (changed && here)
        for (int n = r; n < p.states; n += 8) state[(i64)n * p.width] = S[n * PARTS + ch];
}

KERNEL __launch_bounds__(128, 1) ssd_chunked_4(ARGS(SsdChunked) p) { BEGIN(); chunks<4>(p); }
KERNEL __launch_bounds__(128, 1) ssd_chunked_8(ARGS(SsdChunked) p) { BEGIN(); chunks<8>(p); }

// What the last tokens leave for those to come: each place of a chunk has its latest token.
KERNEL __launch_bounds__(128) ssd_keep(ARGS(SsdChunked) p) {
    BEGIN();
    const Span span = p.spans[blockIdx.y];
    const int head = blockIdx.x, of_group = p.heads / p.groups, g = head / of_group, size = p.size;
    const int from = max(0, span.len - size), place = (span.position + from) % size;
    if (threadIdx.x == 0) {
        float* l = p.decays + span.slot * p.decays_stride + (i64)head * size;
        // Sums begin with their chunk.
        int i = max(0, from - place), s = (span.position + i) % size;
        float sum = s ? l[s - 1] : 0.0f;
        for (; i < span.len; i++) {
            sum = fmaf(step_of(p, span.start + i, head), p.a[head], s ? sum : 0.0f);
            l[s] = sum;
            s = s + 1 == size ? 0 : s + 1;
        }
    }
    float* u = p.inputs + span.slot * p.inputs_stride + (i64)head * size * p.width;
    for (int e = threadIdx.x; e < (span.len - from) * p.width; e += 128) {
        int i = from + e / p.width, c = e % p.width, s = (span.position + i) % size;
        u[(i64)s * p.width + c] = input_of(p, span.start + i, head, c);
    }
    if (head % of_group) return;
    float* b = p.kept + span.slot * p.kept_stride + (i64)g * size * p.states;
    for (int e = threadIdx.x; e < (span.len - from) * p.states; e += 128) {
        int i = from + e / p.states, n = e % p.states, s = (span.position + i) % size;
        b[(i64)s * p.states + n] = p.b.row(span.start + i)[g * p.states + n];
    }
}

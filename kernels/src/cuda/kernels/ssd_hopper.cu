// The scan of Mamba-2 over prompts, on Hopper's matrix units. Chunks of 64 tokens, counted from where a span
// begins: products within a chunk, a state from chunk to chunk, as in ssd_chunked.rs. Every factor goes in as two
// BF16 numbers whose sum has sixteen bits, three products for each, so that a product errs by some 2^-16; sums,
// decays and states are f32. Where there are fewer heads than processors, a span is cut into segments: first the
// states that they would leave by themselves, then all of them at once, each from what those before it left.

#include "common.cuh"
#include "hopper.cuh"

#define CHUNK 64
#define WIDE 64           // channels of a block
#define PITCH (WIDE + 4)  // of x in shared memory
#define THREADS 128

struct Ssd {
    In x, dt, b, c;
    const float *a, *dt_bias, *d;
    float least, greatest;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    const int *chunks, *segments; // before each span
    u8* images;                   // of each chunk and group: tiles of c, then b, high and low halves
    float* scores;                // the same: c[t] · b[s]
    float* steps;                 // of each chunk and head: sums of decays, in powers of two, and step sizes
    float* left;                  // of each segment and block of channels: the state it leaves by itself
    float* fades;                 // the same: its decays in all, in powers of two
    int span_count, length;       // chunks of a segment
    int heads, width, states, groups, scale_input;
};

// The span that a chunk or a segment belongs to: the last that begins at or before it.
__device__ __forceinline__ int span_of(const int* before, int count, int i) {
    int of = 0;
    for (int high = count - 1; of < high;) {
        int middle = (of + high + 1) / 2;
        if (before[middle] <= i) of = middle;
        else high = middle - 1;
    }
    return of;
}
// Two numbers as two pairs of BF16, the second of what the first leaves.
__device__ __forceinline__ void split(float x, float y, u32& high, u32& low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - low_bf16(high), y - high_bf16(high));
}
// Eight neighbours.
__device__ __forceinline__ void split(const float* v, uint4& high, uint4& low) {
    split(v[0], v[1], high.x, low.x), split(v[2], v[3], high.y, low.y);
    split(v[4], v[5], high.z, low.z), split(v[6], v[7], high.w, low.w);
}
__device__ __forceinline__ u8* aligned(u8* memory) {
    return memory + (1024 - (u32)__cvta_generic_to_shared(memory) % 1024) % 1024;
}

// What all heads of a group share, and what all channels of a head do. Blocks beyond the groups take 128 heads each.
template <int N>
__device__ __forceinline__ void prepare(const Ssd& p) {
    extern __shared__ u8 memory[];
    const int TILE = CHUNK * N * 2;
    const int tid = threadIdx.x, chunk = blockIdx.x, of = span_of(p.chunks, p.span_count, chunk);
    const Span s = p.spans[of];
    const int t0 = (chunk - p.chunks[of]) * CHUNK, left = min(CHUNK, s.len - t0);
    const i64 row = s.start + t0;
    if ((int)blockIdx.y >= p.groups) {
        const int h = (blockIdx.y - p.groups) * THREADS + tid;
        if (h >= p.heads) return;
        const float a = p.a[h] * LOG2E, bias = p.dt_bias ? p.dt_bias[h] : 0.0f;
        float* to = p.steps + ((i64)chunk * p.heads + h) * 2 * CHUNK;
        float sum = 0.0f;
#pragma unroll 1
        for (int t = 0; t < CHUNK; t += 8) {
            float v[8], l[8];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = p.dt.row(row + min(t + e, left - 1))[h];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                v[e] = t + e < left ? fminf(fmaxf(softplus(v[e] + bias), p.least), p.greatest) : 0.0f;
                l[e] = sum = fmaf(v[e], a, sum);
                // What is not there changes nothing: its x is zero.
                if (!p.scale_input) v[e] = 1.0f;
            }
#pragma unroll
            for (int e = 0; e < 8; e += 4) {
                *(float4*)(to + t + e) = make_float4(l[e], l[e + 1], l[e + 2], l[e + 3]);
                *(float4*)(to + CHUNK + t + e) = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
            }
        }
        return;
    }
    const int g = blockIdx.y, warp = tid / 32, lane = tid % 32;
    u8* tiles = aligned(memory);
    const i64 of_group = (i64)chunk * p.groups + g;
    u8* image = p.images + of_group * 4 * TILE;
    for (int i = tid; i < CHUNK * N / 8; i += THREADS) {
        int t = i / (N / 8), n = i % (N / 8) * 8, put = place_in_tile(t, n, CHUNK);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float* from = (which ? p.b : p.c).row(row + min(t, left - 1)) + g * p.states;
            float v[8];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = t < left && n + e < p.states ? from[n + e] : 0.0f;
            uint4 high, low;
            split(v, high, low);
            const int at = 2 * which * TILE + put;
            *(uint4*)(tiles + at) = high, *(uint4*)(tiles + at + TILE) = low;
            *(uint4*)(image + at) = high, *(uint4*)(image + at + TILE) = low;
        }
    }
    for_units();
    __syncthreads();
    float sums[32];
    const u64 c = operand(tiles, 0), b = operand(tiles + 2 * TILE, 0);
    units_begin();
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const u64 deep = further(k / 4 * CHUNK * 128 + k % 4 * 32);
        Units<64>::shared(sums, c + deep, b + deep, k > 0);
        Units<64>::shared(sums, c + deep, b + deep + further(TILE), 1);
        Units<64>::shared(sums, c + deep + further(TILE), b + deep, 1);
    }
    units_go();
    units_wait<0>();
    settle<32>(sums);
    float* to = p.scores + of_group * CHUNK * CHUNK + (16 * warp + lane / 4) * CHUNK + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(float2*)(to + 8 * i * CHUNK + 8 * j) = make_float2(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
}

// Bytes that the copy engine brings, and the wait for them.
__device__ __forceinline__ void expect(u64* barrier, int bytes) {
    u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bring(void* to, const void* from, int bytes, u64* barrier) {
    u32 at = (u32)__cvta_generic_to_shared(to), b = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(at), "l"(from), "r"(bytes), "r"(b) : "memory");
}
__device__ __forceinline__ void wait_for(u64* barrier, int parity) {
    u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
                 ::"r"(at), "r"(parity) : "memory");
}

// A block takes 64 channels of a head, as rows of the units: thread `lane` of warp w has channels
// 16w + lane / 4 + 8i. FULL_SCAN false: only what segments leave, for those that others follow. Else a second
// warpgroup makes the next chunk's weights meanwhile, brings x and writes y.
template <int N, bool FULL_SCAN>
__device__ __forceinline__ void scan(const Ssd& p) {
    extern __shared__ u8 memory[];
    const int TILE = CHUNK * N * 2, IMAGE = FULL_SCAN ? 4 * TILE : 2 * TILE, STAGE = IMAGE + 2 * CHUNK * 4;
    const int WEIGHTS = FULL_SCAN ? CHUNK * CHUNK * 2 : 0;
    __shared__ u64 arrived[2];
    u8* room = aligned(memory);
    u8* images = room;
    u8* weights = images + 2 * IMAGE; // two stages: high, low
    float* steps = (float*)(weights + 4 * WEIGHTS);
    float* xs = steps + 4 * CHUNK;
    const int tid = threadIdx.x % THREADS, warp = tid / 32, lane = tid % 32;
    const bool multiplies = threadIdx.x < THREADS, moves = !FULL_SCAN || !multiplies;
    const int slices = (p.width + WIDE - 1) / WIDE, blocks = p.heads * slices;
    const int head = blockIdx.x / slices, p0 = blockIdx.x % slices * WIDE, wide = min(WIDE, p.width - p0);
    const int g = head / (p.heads / p.groups);
    const int segment = blockIdx.y, of = span_of(p.segments, p.span_count, segment);
    __shared__ Span s; // in registers it would be one too many
    if (threadIdx.x == 0) s = p.spans[of];
    __syncthreads();
    const int chunks = (s.len + CHUNK - 1) / CHUNK, nth = segment - p.segments[of];
    const int first = nth * p.length, end = min(chunks, first + p.length);
    if (!FULL_SCAN && end == chunks) return;

    const bool fast = is_wide(p.x.p + head * p.width + p0, p.x.stride, wide) &&
                      is_wide(p.y.p + head * p.width + p0, p.y.stride, wide);
    auto bring_chunk = [&](int chunk, int to) {
        if (tid) return;
        const i64 all = p.chunks[of] + chunk;
        const u8* image = p.images + (all * p.groups + g) * 4 * TILE;
        expect(&arrived[to], STAGE);
        bring(images + to * IMAGE, FULL_SCAN ? image : image + 2 * TILE, IMAGE, &arrived[to]);
        bring(steps + to * 2 * CHUNK, p.steps + (all * p.heads + head) * 2 * CHUNK, 2 * CHUNK * 4, &arrived[to]);
    };
    // Of each chunk this thread moves four neighbours of every eighth token, in and out.
    const int my_t = tid / 16, my_c = tid % 16 * 4;
    auto bring_x = [&](int chunk, int to) {
        const float* from = p.x.row(s.start + chunk * CHUNK) + head * p.width + p0;
        const int left = s.len - chunk * CHUNK;
#pragma unroll 2
        for (int i = 0; i < CHUNK / 8; i++) {
            const int t = my_t + 8 * i;
            const bool in = t < left;
            copy_four(xs + (to * CHUNK + t) * PITCH + my_c, from + (in ? t : 0) * p.x.stride, my_c, wide, in, fast);
        }
        copies_done();
    };
    // Outputs stand where x stood.
    auto send_y = [&](int chunk, int from) {
        float* to = p.y.row(s.start + chunk * CHUNK) + head * p.width + p0;
        const int left = s.len - chunk * CHUNK;
#pragma unroll 2
        for (int i = 0; i < CHUNK / 8; i++) {
            const int t = my_t + 8 * i;
            const float4 v = *(const float4*)(xs + (from * CHUNK + t) * PITCH + my_c);
            float* at = to + t * p.y.stride + my_c;
            if (t >= left) continue;
            if (fast) {
                if (my_c < wide) *(float4*)at = v;
            } else {
                const float each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (my_c + e < wide) at[e] = each[e];
            }
        }
    };
    // What tokens of a chunk say to later ones: their scores, faded.
    auto weigh = [&](int chunk, int to) {
        const float* from = p.scores + ((i64)(p.chunks[of] + chunk) * p.groups + g) * CHUNK * CHUNK;
        const float* l = p.steps + ((i64)(p.chunks[of] + chunk) * p.heads + head) * 2 * CHUNK;
        const int c = tid % 8 * 8;
        const float4 sums[2] = {*(const float4*)(l + c), *(const float4*)(l + c + 4)};
#pragma unroll
        for (int i = 0; i < CHUNK * CHUNK / 8 / THREADS; i++) {
            const int t = tid / 8 + 16 * i;
            const float lt = l[t];
            float v[8];
#pragma unroll
            for (int e = 0; e < 8; e += 4) {
                const float4 q = *(const float4*)(from + t * CHUNK + c + e), ls = sums[e / 4];
                v[e] = c + e <= t ? exp2_fast(lt - ls.x) * q.x : 0.0f;
                v[e + 1] = c + e + 1 <= t ? exp2_fast(lt - ls.y) * q.y : 0.0f;
                v[e + 2] = c + e + 2 <= t ? exp2_fast(lt - ls.z) * q.z : 0.0f;
                v[e + 3] = c + e + 3 <= t ? exp2_fast(lt - ls.w) * q.w : 0.0f;
            }
            uint4 high, low;
            split(v, high, low);
            u8* at = weights + to * 2 * WEIGHTS + place_in_tile(t, c, CHUNK);
            *(uint4*)at = high, *(uint4*)(at + WEIGHTS) = low;
        }
        for_units();
    };
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 at = (u32)__cvta_generic_to_shared(&arrived[i]);
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for_units();
    }
    __syncthreads();
    if (moves) {
        bring_chunk(first, 0);
        bring_x(first, 0);
    }
    if (!multiplies) {
        weigh(first, 0);
#pragma unroll 1
        for (int chunk = first; chunk < end; chunk++) {
            const int at = (chunk - first) & 1;
            wait_copies<0>();
            __syncthreads();
            const bool more = chunk + 1 < end;
            if (more) bring_chunk(chunk + 1, at ^ 1);
            // A thread's outputs make room for what it brings.
            if (chunk > first) send_y(chunk - 1, at ^ 1);
            if (!more) continue;
            bring_x(chunk + 1, at ^ 1);
            weigh(chunk + 1, at ^ 1);
        }
        __syncthreads();
        send_y(end - 1, (end - 1 - first) & 1);
        return;
    }

    // The state before the segment.
    float state[N / 2];
    const int channel = 16 * warp + lane / 4;
    auto of_slot = [&](int k) {
        float* slot = p.state + s.slot * p.state_stride + (i64)head * p.states * p.width + p0;
        int n = k / 4 * 8 + lane % 4 * 2 + k % 2, c = channel + k / 2 % 2 * 8;
        return n < p.states && c < wide ? slot + (i64)n * p.width + c : nullptr;
    };
    auto of_segment = [&](int i) { return p.left + ((i64)i * blocks + blockIdx.x) * N / 2 * THREADS + tid; };
    // Where another segment will write the slot, the first leaves a copy at the last one's place.
    const int begin = p.segments[of], count = (chunks + p.length - 1) / p.length;
    if (nth == 0 && (!FULL_SCAN || count == 1)) {
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            const float* from = of_slot(k);
            state[k] = from ? *from : 0.0f;
        }
        if (!FULL_SCAN) {
            float* copy = of_segment(begin + count - 1);
#pragma unroll
            for (int k = 0; k < N / 2; k++) copy[k * THREADS] = state[k];
        }
    } else if (FULL_SCAN) {
        const float* from = of_segment(nth == 0 ? begin + count - 1 : begin);
#pragma unroll
        for (int k = 0; k < N / 2; k++) state[k] = from[k * THREADS];
#pragma unroll 1
        for (int i = 1; i < nth; i++) {
            const float fade = exp2_fast(p.fades[(i64)(begin + i) * p.heads + head]);
            from = of_segment(begin + i);
#pragma unroll
            for (int k = 0; k < N / 2; k++) state[k] = fmaf(state[k], fade, from[k * THREADS]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < N / 2; k++) state[k] = 0.0f;
    }
    float faded = 0.0f;

#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
        const int at = (chunk - first) & 1;
        if (moves) wait_copies<0>();
        wait_for(&arrived[at], (chunk - first) / 2 & 1);
        __syncthreads();
        if (moves && chunk + 1 < end) bring_chunk(chunk + 1, at ^ 1);
        const float *l = steps + at * 2 * CHUNK, *deltas = l + CHUNK;
        float* x = xs + at * CHUNK * PITCH + channel;
        const u8* image = images + at * IMAGE;
        const u64 bs = operand(image + (FULL_SCAN ? 2 * TILE : 0), CHUNK * 128);
        const float whole = l[CHUNK - 1];
        float y[32];
        // What the state says to each token.
        if (FULL_SCAN) {
            const u64 cs = operand(image, 0);
            u32 high[N / 16][4], low[N / 16][4];
#pragma unroll
            for (int k = 0; k < N / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) split(state[8 * k + 2 * i], state[8 * k + 2 * i + 1], high[k][i], low[k][i]);
            const float fade = exp2_fast(whole);
#pragma unroll
            for (int k = 0; k < N / 2; k++) state[k] *= fade;
            settle<N / 2>(state);
            units_begin();
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                const u64 c = cs + further(k / 4 * CHUNK * 128 + k % 4 * 32);
                Units<64>::registers<false>(y, high[k], c, k > 0);
                Units<64>::registers<false>(y, high[k], c + further(TILE), 1);
                Units<64>::registers<false>(y, low[k], c, 1);
            }
            units_go();
        }
        // What the tokens leave in the state.
        {
            if (!FULL_SCAN) {
                const float fade = exp2_fast(whole);
#pragma unroll
                for (int k = 0; k < N / 2; k++) state[k] *= fade;
                settle<N / 2>(state);
            }
            u32 high[4][4], low[4][4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int t = 16 * k + 8 * h + lane % 4 * 2;
                    const float2 lt = *(const float2*)(l + t), dt = *(const float2*)(deltas + t);
                    const float u = dt.x * exp2_fast(whole - lt.x), v = dt.y * exp2_fast(whole - lt.y);
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        split(u * x[t * PITCH + 8 * i], v * x[(t + 1) * PITCH + 8 * i], high[k][2 * h + i], low[k][2 * h + i]);
                }
                const u64 b = bs + further(k * 16 * 128);
                units_begin();
                Units<N>::template registers<true>(state, high[k], b, 1);
                Units<N>::template registers<true>(state, high[k], b + further(TILE), 1);
                Units<N>::template registers<true>(state, low[k], b, 1);
            }
            units_go();
        }
        faded += whole;
        if (!FULL_SCAN) {
            if (chunk + 1 < end) bring_x(chunk + 1, at ^ 1);
            units_wait<0>();
            settle<N / 2>(state);
            continue;
        }
        units_wait<1>();
        settle<32>(y);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 lt = *(const float2*)(l + 8 * j + lane % 4 * 2);
            const float u = exp2_fast(lt.x), v = exp2_fast(lt.y);
            y[4 * j] *= u, y[4 * j + 1] *= v, y[4 * j + 2] *= u, y[4 * j + 3] *= v;
        }
        {
            const u64 ws = operand(weights + at * 2 * WEIGHTS, 0);
            u32 high[4][4], low[4][4];
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int t = 16 * k + 8 * h + lane % 4 * 2;
                    const float2 dt = *(const float2*)(deltas + t);
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        split(dt.x * x[t * PITCH + 8 * i], dt.y * x[(t + 1) * PITCH + 8 * i], high[k][2 * h + i], low[k][2 * h + i]);
                }
            settle<32>(y);
            units_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u64 w = ws + further(k * 32);
                Units<64>::registers<false>(y, high[k], w, 1);
                Units<64>::registers<false>(y, high[k], w + further(WEIGHTS), 1);
                Units<64>::registers<false>(y, low[k], w, 1);
            }
            units_go();
        }
        units_wait<0>();
        settle<32>(y);
        settle<N / 2>(state);
        const float skip = p.d ? p.d[head] : 0.0f;
#pragma unroll
        for (int k = 0; k < 32; k++) {
            float* out = x + (k / 4 * 8 + lane % 4 * 2 + k % 2) * PITCH + k / 2 % 2 * 8;
            *out = fmaf(skip, *out, y[k]);
        }
    }
    if (FULL_SCAN) __syncthreads();
    if (!FULL_SCAN) {
        float* to = of_segment(segment);
#pragma unroll
        for (int k = 0; k < N / 2; k++) to[k * THREADS] = state[k];
        if (tid == 0) p.fades[(i64)segment * p.heads + head] = faded;
    } else if (end * CHUNK >= s.len) {
#pragma unroll
        for (int k = 0; k < N / 2; k++)
            if (float* to = of_slot(k)) *to = state[k];
    }
}

#define OF_STATES(N)                                                                               \
    KERNEL __launch_bounds__(THREADS) ssd_prepare_##N(ARGS(Ssd) p) { BEGIN(); prepare<N>(p); }      \
    KERNEL __launch_bounds__(THREADS) ssd_segments_##N(ARGS(Ssd) p) { BEGIN(); scan<N, false>(p); } \
    KERNEL __launch_bounds__(2 * THREADS, 1) ssd_hopper_##N(ARGS(Ssd) p) { BEGIN(); scan<N, true>(p); }
OF_STATES(64)
OF_STATES(128)

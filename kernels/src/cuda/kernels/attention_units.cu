// Attention of many queries on matrix units, over pages in BF16. Queries and weights go in as two BF16
// numbers each, whose sum has 16 bits: what is lost is far below what keys and values have lost already.

#include "common.cuh"
#include "attention.cuh"

// A tile holds 64 queries of one sequence that share keys: neighbours in time, and the heads of a group;
// a warp takes 16 of them. Keys go by in blocks of 64 at absolute positions.
#define QUERIES 64
#define KEYS 64

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_keys(u32* r, const u16* at) {
    u32 p = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}
__device__ __forceinline__ void load_values(u32* r, const u16* at) {
    u32 p = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}
// Two numbers as two pairs of BF16, the second of what the first leaves.
__device__ __forceinline__ void split(float x, float y, u32& high, u32& low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - low_bf16(high), y - high_bf16(high));
}

template <int D>
__device__ __forceinline__ void attend(const Attention& p) {
    extern __shared__ __align__(16) u16 memory[];
    const int PITCH = D + 8; // so that eight rows lie in different banks
    u16* ks = memory;                     // (2, KEYS, PITCH)
    u16* vs = memory + 2 * KEYS * PITCH;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = blockIdx.y, group = p.heads / p.kv_heads;
    // Late tiles see the most and go first.
    const int tile = gridDim.x - 1 - blockIdx.x;
    const int of = span_of_tile(p, tile);
    const Span s = p.spans[of];
    const int first = (tile - p.tiles[of]) * QUERIES, count = min(QUERIES, s.len * group - first);
    const int last = s.position + (first + count - 1) / group, early = s.position + first / group;
    const int from = p.window ? max(0, early + 1 - p.window) : 0;
    const bool power = (p.page_size & (p.page_size - 1)) == 0;
    const int shift = __ffs(p.page_size) - 1;

    // Of what the tile's rows see, the part of this split.
    const int blocks = last / KEYS + 1, a_split = (blocks + p.splits - 1) / p.splits;
    const int begin = blockIdx.z * a_split, end = min(blocks, begin + a_split);
    auto next = [&](int block) {
        block++;
        return block * KEYS + KEYS <= from && block * KEYS >= p.keep_first ? from / KEYS : block;
    };
    auto stage = [&](int block, int to) {
        const int CHUNKS = D / 8;
        for (int i = tid; i < KEYS * CHUNKS; i += 128) {
            int r = i / CHUNKS, c = i % CHUNKS * 8, j = block * KEYS + r;
            bool in = j <= last;
            j = in ? j : last;
            int page = power ? j >> shift : j / p.page_size;
            i64 row = (i64)p.table[s.pages + page] * p.page_size + (power ? j & (p.page_size - 1) : j % p.page_size);
            copy16(ks + (to * KEYS + r) * PITCH + c, (const u16*)p.k_pages + row * p.k_stride + g * D + c, in);
            copy16(vs + (to * KEYS + r) * PITCH + c, (const u16*)p.v_pages + row * p.v_stride + g * D + c, in);
        }
        copies_done();
    };
    int block = next(begin - 1);
    if (block < end) stage(block, 0);

    // Rows `lane / 4` and eight further of the warp's sixteen.
    int position[2];
    u32 q_high[D / 16][4], q_low[D / 16][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = first + warp * 16 + lane / 4 + 8 * i;
        at = at < first + count ? at : first;
        position[i] = s.position + at / group;
        const float* q = p.q.row(s.start + at / group) + (g * group + at % group) * D + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            split(q[16 * k], q[16 * k + 1], q_high[k][i], q_low[k][i]);
            split(q[16 * k + 8], q[16 * k + 9], q_high[k][i + 2], q_low[k][i + 2]);
        }
    }
    float sums[D / 8][4] = {}, most[2] = {NOTHING, NOTHING}, total[2] = {};
    const float scale = p.scale * LOG2E;

    for (int at = 0; block < end; at ^= 1) {
        const int k0 = block * KEYS, following = next(block);
        if (following < end) {
            stage(following, at ^ 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const u16 *keys = ks + at * KEYS * PITCH, *values = vs + at * KEYS * PITCH;
        float w[KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 b[4];
                load_keys(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + k * 16 + lane / 8 % 2 * 8);
                multiply(w[2 * n], q_high[k], b[0], b[1]);
                multiply(w[2 * n + 1], q_high[k], b[2], b[3]);
                multiply(w[2 * n], q_low[k], b[0], b[1]);
                multiply(w[2 * n + 1], q_low[k], b[2], b[3]);
            }
        }
        // All of the block is seen by all rows, or each is asked.
        const bool open = k0 + KEYS - 1 <= early && (!p.window || k0 > last - p.window);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float now = most[i];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float v = w[n][2 * i + e] * scale;
                    if (!open) {
                        int j = k0 + n * 8 + lane % 4 * 2 + e;
                        bool seen = j <= position[i] && (!p.window || j > position[i] - p.window || j < p.keep_first);
                        v = seen ? v : NOTHING;
                    }
                    w[n][2 * i + e] = v;
                    now = fmaxf(now, v);
                }
            }
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            // Where nothing has been seen yet, all weights are to be zero.
            const float base = now == NOTHING ? 0.0f : now;
            const float fade = exp2_fast(most[i] - base);
            most[i] = now;
            total[i] *= fade;
#pragma unroll
            for (int n = 0; n < D / 8; n++) sums[n][2 * i] *= fade, sums[n][2 * i + 1] *= fade;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float v = exp2_fast(w[n][2 * i + e] - base);
                    w[n][2 * i + e] = v;
                    total[i] += v;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* v = &w[2 * k + i / 2][i % 2 * 2];
                split(v[0], v[1], high[i], low[i]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                load_values(b, values + (k * 16 + lane % 16) * PITCH + n * 16 + lane / 16 * 8);
                multiply(sums[2 * n], high, b[0], b[1]);
                multiply(sums[2 * n + 1], high, b[2], b[3]);
                multiply(sums[2 * n], low, b[0], b[1]);
                multiply(sums[2 * n + 1], low, b[2], b[3]);
            }
        }
        __syncthreads();
        block = following;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float all = total[i];
        all += __shfl_xor_sync(FULL, all, 1);
        all += __shfl_xor_sync(FULL, all, 2);
        const int at = first + warp * 16 + lane / 4 + 8 * i;
        if (at >= first + count) continue;
        const int t = p.spans[of].start + at / group, h = g * group + at % group;
        if (p.splits > 1) {
            float* part = p.parts + (((i64)t * p.heads + h) * p.splits + blockIdx.z) * (D + 2);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float* to = part + n * 8 + lane % 4 * 2;
                to[0] = sums[n][2 * i], to[1] = sums[n][2 * i + 1];
            }
            // Scores were in powers of two.
            if (lane % 4 == 0) part[D] = most[i] / LOG2E, part[D + 1] = all;
            continue;
        }
        float* y = p.y.row(t) + h * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) y[n * 8] = sums[n][2 * i] / all, y[n * 8 + 1] = sums[n][2 * i + 1] / all;
    }
}

#define OF_WIDTH(D) \
    KERNEL __launch_bounds__(128, 2) attention_units_##D(ARGS(Attention) p) { BEGIN(); attend<D>(p); }
OF_WIDTH(64)
OF_WIDTH(80)
OF_WIDTH(96)
OF_WIDTH(128)

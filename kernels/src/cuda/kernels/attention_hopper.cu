// Attention of many queries on Hopper's matrix units, over pages in BF16. Queries and weights are rounded to BF16,
// sums are f32, and so is the sum of the weights, which are not rounded there.

#include "common.cuh"
#include "attention.cuh"
#include "hopper.cuh"

// A tile holds 128 queries of one sequence that share keys: neighbours in time, and the heads of a group; a
// warpgroup takes 64 of them. Keys go by in blocks at absolute positions. While the units multiply one block's
// weights with its values, they also score the next block, and its weights are made.
#define QUERIES 128
#define THREADS 256

template <int D>
struct Sizes {
    static const int KEYS = D <= 128 ? 128 : 64, PANELS = (D + PANEL - 1) / PANEL;
    static const int BLOCK = PANELS * KEYS * 128; // bytes of a block of keys
};

// sums += weights · values: w has KEYS / 16 operands, v is a block of values.
template <int D>
__device__ __forceinline__ void add_values(float* sums, u32 (*w)[4], const u8* v) {
    const int KEYS = Sizes<D>::KEYS, PITCH = KEYS * 128;
    const u64 values = operand(v, PITCH);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        const u64 at = values + further(k * 16 * 128);
#pragma unroll
        for (int i = 0; i < D / 128; i++) Units<128>::registers<true>(sums + 64 * i, w[k], at + further(2 * i * PITCH), 1);
        const int WHOLE = D / 128 * 128, REST = D % 64 ? D % 64 : 16;
        if (D % 128 >= 64) Units<64>::registers<true>(sums + WHOLE / 2, w[k], at + further(WHOLE / PANEL * PITCH), 1);
        if (D % 64) Units<REST>::template registers<true>(sums + D / 64 * 32, w[k], at + further(D / 64 * PITCH), 1);
    }
}

template <int D>
__device__ __forceinline__ void attend(const Attention& p) {
    const int KEYS = Sizes<D>::KEYS, PANELS = Sizes<D>::PANELS, BLOCK = Sizes<D>::BLOCK;
    extern __shared__ u8 memory[];
    u8* qs = memory + (1024 - (u32)__cvta_generic_to_shared(memory) % 1024) % 1024;
    u8 *ks = qs + PANELS * QUERIES * 128, *vs = ks + 2 * BLOCK;
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
    // Rows of pages of four blocks that follow each other; what lies beyond the last key is masked.
    __shared__ u32 places[4][KEYS];
    auto find = [&](int block, int to) {
        if (tid >= KEYS || block >= end) return;
        const int j = min(block * KEYS + tid, last);
        const int page = power ? j >> shift : j / p.page_size;
        places[to & 3][tid] = p.table[s.pages + page] * p.page_size + (power ? j & (p.page_size - 1) : j % p.page_size);
    };
    // Keys of one block and values of another, the `n`th that they are.
    const int CHUNKS = D / 8;
    const u8 *k_pages = (const u8*)p.k_pages + 2 * g * D, *v_pages = (const u8*)p.v_pages + 2 * g * D;
    const u32 k_stride = 2 * (u32)p.k_stride, v_stride = 2 * (u32)p.v_stride;
    auto stage = [&](const u8* pages, u32 stride, int n, u8* to) {
#pragma unroll 1
        for (int i = tid; i < KEYS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, c = i % CHUNKS * 8;
            copy16(to + place_in_tile(r, c, KEYS), pages + (u64)places[n & 3][r] * stride + 2 * c, true);
        }
    };
    int block = next(begin - 1), following = block < end ? next(block) : end, after = following < end ? next(following) : end;
    find(block, 0), find(following, 1), find(after, 2);
    __syncthreads();
    if (block < end) {
        stage(k_pages, k_stride, 0, ks);
        copies_done();
        stage(v_pages, v_stride, 0, vs);
        if (following < end) stage(k_pages, k_stride, 1, ks + BLOCK);
        copies_done();
    }
    for (int i = tid; i < QUERIES * CHUNKS; i += THREADS) {
        int r = i / CHUNKS, c = i % CHUNKS * 8, at = first + (r < count ? r : 0);
        const float* q = p.q.row(s.start + at / group) + (g * group + at % group) * D + c;
        u32 words[4];
#pragma unroll
        for (int e = 0; e < 4; e++) words[e] = pack_bf16(q[2 * e], q[2 * e + 1]);
        *(uint4*)(qs + place_in_tile(r, c, QUERIES)) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    // Rows `lane / 4` and eight further of the warp's sixteen.
    int position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = warp * 16 + lane / 4 + 8 * i;
        position[i] = s.position + (first + (at < count ? at : 0)) / group;
    }
    float sums[D / 2] = {}, most[2] = {NOTHING, NOTHING}, total[2] = {};
    const float scale = p.scale * LOG2E;
    const u8* mine = qs + warp / 4 * 64 * 128;

    float w[KEYS / 2];
    auto score = [&](const u8* keys) {
        const u64 a = operand(mine, 0), b = operand(keys, 0);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const int deep = k % 4 * 32;
            Units<KEYS>::shared(w, a + further(k / 4 * QUERIES * 128 + deep), b + further(k / 4 * KEYS * 128 + deep), k > 0);
        }
        units_go();
    };
    // Scores to weights; the sums so far are to be multiplied by `fade`.
    float fade[2];
    auto weigh = [&](int k0) {
        // All of the block is seen by all rows, or each is asked.
        const bool open = k0 + KEYS - 1 <= early && (!p.window || k0 > last - p.window);
        if (!open) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int j = k0 + n * 8 + lane % 4 * 2 + e % 2, at = position[e / 2];
                    bool seen = j <= at && (!p.window || j > at - p.window || j < p.keep_first);
                    w[4 * n + e] = seen ? w[4 * n + e] : NOTHING;
                }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float now = most[i];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(w[4 * n + 2 * i], w[4 * n + 2 * i + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            // Where nothing has been seen yet, all weights are to be zero.
            const float base = now == NOTHING ? 0.0f : now * scale;
            fade[i] = exp2_fast(fmaf(most[i], scale, -base));
            most[i] = now;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float v = exp2_fast(fmaf(w[4 * n + 2 * i + e], scale, -base));
                    w[4 * n + 2 * i + e] = v;
                    sum += v;
                }
            total[i] = fmaf(total[i], fade[i], sum);
        }
    };
    u32 rounded[KEYS / 16][4];
    auto round = [&]() {
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) rounded[k][i] = pack_bf16(w[8 * k + 2 * i], w[8 * k + 2 * i + 1]);
    };

    if (block < end) {
        wait_copies<1>();
        for_units();
        __syncthreads();
        units_begin();
        score(ks);
        units_wait<0>();
        settle<KEYS / 2>(w);
        weigh(block * KEYS);
        round();
        int at = 0; // where this block's values are, and not the next one's keys
#pragma unroll 1
        for (int n = 0; following < end; n++) {
            wait_copies<0>();
            for_units();
            __syncthreads();
            settle<KEYS / 2>(w);
            settle<D / 2>(sums);
            units_begin();
            score(ks + (at ^ 1) * BLOCK);
            add_values<D>(sums, rounded, vs + at * BLOCK);
            units_go();
            stage(v_pages, v_stride, n + 1, vs + (at ^ 1) * BLOCK);
            int later = end;
            if (after < end) {
                stage(k_pages, k_stride, n + 2, ks + at * BLOCK);
                later = next(after);
                find(later, n + 3);
            }
            copies_done();
            units_wait<1>();
            settle<KEYS / 2>(w);
            weigh(following * KEYS);
            units_wait<0>();
            settle<D / 2>(sums);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[4 * n + e] *= fade[e / 2];
            round();
            following = after, after = later;
            at ^= 1;
        }
        wait_copies<0>();
        for_units();
        __syncthreads();
        settle<D / 2>(sums);
        units_begin();
        add_values<D>(sums, rounded, vs + at * BLOCK);
        units_go();
        units_wait<0>();
        settle<D / 2>(sums);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float all = total[i];
        all += __shfl_xor_sync(FULL, all, 1);
        all += __shfl_xor_sync(FULL, all, 2);
        const int r = warp * 16 + lane / 4 + 8 * i;
        if (r >= count) continue;
        const int t = s.start + (first + r) / group, h = g * group + (first + r) % group;
        if (p.splits > 1) {
            float* part = p.parts + (((i64)t * p.heads + h) * p.splits + blockIdx.z) * (D + 2);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float* to = part + n * 8 + lane % 4 * 2;
                to[0] = sums[4 * n + 2 * i], to[1] = sums[4 * n + 2 * i + 1];
            }
            if (lane % 4 == 0) part[D] = most[i] * p.scale, part[D + 1] = all;
            continue;
        }
        float* y = p.y.row(t) + h * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) y[n * 8] = sums[4 * n + 2 * i] / all, y[n * 8 + 1] = sums[4 * n + 2 * i + 1] / all;
    }
}

#define OF_WIDTH(D) \
    KERNEL __launch_bounds__(THREADS, 1) attention_hopper_##D(ARGS(Attention) p) { BEGIN(); attend<D>(p); }
OF_WIDTH(64)
OF_WIDTH(80)
OF_WIDTH(96)
OF_WIDTH(128)
OF_WIDTH(192)
OF_WIDTH(256)

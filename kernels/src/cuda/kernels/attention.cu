// Rotation, the way into pages, and attention over pages.

#include "common.cuh"
#include "attention.cuh"

struct Rope {
    Out x;
    const float* frequencies;
    const Span* spans;
    const int* span_of;
    int head_dim, heads, pairs, interleaved;
    float scale;
};

KERNEL __launch_bounds__(128) rope(ARGS(Rope) p) {
    BEGIN();
    int i = blockIdx.y * 128 + threadIdx.x, t = blockIdx.x;
    if (i >= p.heads * p.pairs) return;
    const Span s = p.spans[p.span_of[t]];
    int head = i / p.pairs, f = i % p.pairs;
    float sine, cosine;
    sincosf(__fmul_rn((float)(s.position + t - s.start), p.frequencies[f]), &sine, &cosine);
    sine *= p.scale, cosine *= p.scale;
    float* x = p.x.row(t) + head * p.head_dim;
    int a = p.interleaved ? 2 * f : f, b = p.interleaved ? 2 * f + 1 : f + p.pairs;
    float u = x[a], v = x[b];
    x[a] = u * cosine - v * sine;
    x[b] = v * cosine + u * sine;
}

struct KvWrite {
    In k, v;
    void *k_pages, *v_pages;
    i64 k_stride, v_stride;
    int k_type, v_type;
    const Span* spans;
    const int* span_of;
    const u32* table;
    int page_size, k_cols, v_cols, kv_heads;
};

KERNEL __launch_bounds__(128) kv_write(ARGS(KvWrite) p) {
    BEGIN();
    int t = blockIdx.x, c = blockIdx.y * 128 + threadIdx.x;
    const Span s = p.spans[p.span_of[t]];
    i64 to = page_row(p.table, s, p.page_size, s.position + t - s.start);
    if (c < p.k_cols) store(p.k_pages, to * p.k_stride + c, p.k_type, p.k.row(t)[c]);
    c -= p.k_cols;
    if (c >= 0 && c < p.v_cols) store(p.v_pages, to * p.v_stride + c, p.v_type, p.v.row(t)[c]);
}

// The same to bytes: a warp rounds a head of keys or values by its largest element, as `quantize` in kv.rs.
KERNEL __launch_bounds__(128) kv_write_bytes(ARGS(KvWrite) p) {
    BEGIN();
    const int t = blockIdx.x, lane = threadIdx.x % 32;
    int h = blockIdx.y * 4 + threadIdx.x / 32;
    if (h >= 2 * p.kv_heads) return;
    const bool keys = h < p.kv_heads;
    if (!keys) h -= p.kv_heads;
    const int dim = (keys ? p.k_cols : p.v_cols) / p.kv_heads, each = bytes_of_head(dim);
    const Span s = p.spans[p.span_of[t]];
    const i64 row = page_row(p.table, s, p.page_size, s.position + t - s.start);
    const float* x = (keys ? p.k : p.v).row(t) + h * dim;
    u8* to = (u8*)(keys ? p.k_pages : p.v_pages) + row * (keys ? p.k_stride : p.v_stride) + (i64)h * each;
    float most = 0.0f;
    bool finite = true;
    for (int d = lane; d < dim; d += 32) {
        const float size = fabsf(x[d]);
        most = fmaxf(most, size);
        finite = finite && size < __int_as_float(0x7f800000);
    }
    most = warp_max(most);
    finite = __all_sync(FULL, finite);
    const float scale = __fdiv_rn(most, 127.0f);
    for (int d = lane; d < each - 4; d += 32) {
        const float code = d < dim && scale > 0.0f ? __fdiv_rn(x[d], scale) : 0.0f;
        to[d] = (u8)(signed char)__float2int_rn(fminf(fmaxf(code, -127.0f), 127.0f));
    }
    if (lane == 0) *(float*)(to + each - 4) = finite ? scale : __int_as_float(0x7fc00000);
}

// A tile holds 16 queries of one sequence that share keys: neighbours in time, and the heads of a
// group. Keys go by in blocks of 32 at absolute positions; scores and sums are f32.
#define QUERIES 16
#define KEYS 32
#define COLUMNS_A_THREAD 2

// Where pages are in bytes, a key's scale multiplies its scores, and a value's its weights.
template <bool BYTES>
__device__ __forceinline__ void attend(const Attention& p) {
    extern __shared__ __align__(16) float memory[];
    __shared__ __align__(16) float weights[QUERIES][KEYS];
    __shared__ float fade[QUERIES], most[QUERIES], total[QUERIES];
    __shared__ i64 places[KEYS];
    __shared__ float k_scales[BYTES ? KEYS : 1], v_scales[BYTES ? KEYS : 1];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = blockIdx.y, group = p.heads / p.kv_heads;
    // Late tiles see the most and go first.
    const int tile = gridDim.x - 1 - blockIdx.x;
    const int of = span_of_tile(p, tile);
    const Span s = p.spans[of];
    const int first = (tile - p.tiles[of]) * QUERIES, count = min(QUERIES, s.len * group - first);
    const int deep = (p.dim + 3) / 4 * 4;
    float* qs = memory;                  // (QUERIES, deep)
    float* kv = memory + QUERIES * deep; // (KEYS, deep + 1), then (KEYS, v_dim)
    for (int i = tid; i < QUERIES * deep; i += 128) {
        int r = i / deep, d = i % deep, at = first + r;
        bool in = r < count && d < p.dim;
        qs[i] = in ? p.q.row(s.start + at / group)[(g * group + at % group) * p.dim + d] : 0.0f;
    }
    if (tid < QUERIES) most[tid] = NOTHING, total[tid] = 0.0f;
    float sums[QUERIES][COLUMNS_A_THREAD] = {};

    // What the tile's rows see: up to the last one's position, from the first one's window on, and the
    // first tokens; of that the part of this split.
    const int last = s.position + (first + count - 1) / group, early = s.position + first / group;
    const int from = p.window ? max(0, early + 1 - p.window) : 0;
    const int blocks = last / KEYS + 1, a_split = (blocks + p.splits - 1) / p.splits;
    const int begin = blockIdx.z * a_split, end = min(blocks, begin + a_split);
    for (int block = begin; block < end; block++) {
        const int k0 = block * KEYS;
        if (k0 + KEYS <= from && k0 >= p.keep_first) continue;
        const int keys = min(KEYS, last + 1 - k0);
        __syncthreads();
        if (tid < KEYS) {
            const i64 row = page_row(p.table, s, p.page_size, k0 + min(tid, keys - 1));
            places[tid] = row;
            if (BYTES) {
                k_scales[tid] = scale_of_head(p.k_pages, row * p.k_stride, g, p.dim);
                v_scales[tid] = scale_of_head(p.v_pages, row * p.v_stride, g, p.v_dim);
            }
        }
        __syncthreads();
        for (int i = tid; i < KEYS * deep; i += 128) {
            int j = i / deep, d = i % deep;
            float v = 0.0f;
            if (j < keys && d < p.dim) {
                const i64 row = places[j] * p.k_stride;
                if (BYTES) v = (float)((const signed char*)p.k_pages)[row + g * bytes_of_head(p.dim) + d];
                else v = load(p.k_pages, row + g * p.dim + d, p.k_type);
            }
            kv[j * (deep + 1) + d] = v;
        }
        __syncthreads();
        float score[4] = {};
        const float* key = kv + lane * (deep + 1);
        for (int d = 0; d < deep; d += 4) {
            float k_0 = key[d], k_1 = key[d + 1], k_2 = key[d + 2], k_3 = key[d + 3];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float4 q = *(const float4*)(qs + (warp * 4 + i) * deep + d);
                score[i] = fmaf(q.w, k_3, fmaf(q.z, k_2, fmaf(q.y, k_1, fmaf(q.x, k_0, score[i]))));
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = warp * 4 + i, position = s.position + (first + r) / group, j = k0 + lane;
            bool seen = r < count && j <= position && (!p.window || j > position - p.window || j < p.keep_first);
            float v = seen ? score[i] * (BYTES ? p.scale * k_scales[lane] : p.scale) : NOTHING;
            float before = most[r], now = fmaxf(before, warp_max(v));
            float weight = seen ? expf(v - now) : 0.0f, all = warp_sum(weight);
            weights[r][lane] = BYTES ? weight * v_scales[lane] : weight;
            __syncwarp();
            if (lane == 0) {
                float by = before == now ? 1.0f : expf(before - now);
                fade[r] = by, most[r] = now, total[r] = total[r] * by + all;
            }
        }
        __syncthreads();
        for (int i = tid; i < KEYS * p.v_dim; i += 128) {
            int j = i / p.v_dim, d = i % p.v_dim;
            float v = 0.0f;
            if (j < keys) {
                const i64 row = places[j] * p.v_stride;
                if (BYTES) v = (float)((const signed char*)p.v_pages)[row + g * bytes_of_head(p.v_dim) + d];
                else v = load(p.v_pages, row + g * p.v_dim + d, p.v_type);
            }
            kv[i] = v;
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < COLUMNS_A_THREAD; c++) {
            int d = tid + 128 * c;
            if (d >= p.v_dim) continue;
#pragma unroll
            for (int r = 0; r < QUERIES; r++) sums[r][c] *= fade[r];
            for (int j = 0; j < KEYS; j += 4) {
                float v_0 = kv[j * p.v_dim + d], v_1 = kv[(j + 1) * p.v_dim + d];
                float v_2 = kv[(j + 2) * p.v_dim + d], v_3 = kv[(j + 3) * p.v_dim + d];
#pragma unroll
                for (int r = 0; r < QUERIES; r++) {
                    float4 w = *(const float4*)&weights[r][j];
                    sums[r][c] = fmaf(w.w, v_3, fmaf(w.z, v_2, fmaf(w.y, v_1, fmaf(w.x, v_0, sums[r][c]))));
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < QUERIES; r++) {
        if (r >= count) break;
        int t = s.start + (first + r) / group, h = g * group + (first + r) % group;
        float* part = p.parts + (((i64)t * p.heads + h) * p.splits + blockIdx.z) * (p.v_dim + 2);
#pragma unroll
        for (int c = 0; c < COLUMNS_A_THREAD; c++) {
            int d = tid + 128 * c;
            if (d >= p.v_dim) continue;
            if (p.splits == 1) p.y.row(t)[h * p.v_dim + d] = sums[r][c] / total[r];
            else part[d] = sums[r][c];
        }
        if (p.splits > 1 && tid == 0) part[p.v_dim] = most[r], part[p.v_dim + 1] = total[r];
    }
}

KERNEL __launch_bounds__(128, 4) attention(ARGS(Attention) p) { BEGIN(); attend<false>(p); }
KERNEL __launch_bounds__(128, 3) attention_bytes(ARGS(Attention) p) { BEGIN(); attend<true>(p); }

// Adds the parts of a row and head, in order. Shared memory holds a number a part.
KERNEL __launch_bounds__(128) attention_sum(const float* parts, int splits, int heads, int v_dim, Out y) {
    BEGIN();
    extern __shared__ __align__(16) float memory[];
    __shared__ float room[32];
    const int t = blockIdx.x, h = blockIdx.y, size = v_dim + 2, tid = threadIdx.x;
    const float* part = parts + ((i64)t * heads + h) * splits * size;
    float most = NOTHING, total = 0.0f;
    for (int i = tid % 32; i < splits; i += 32) most = fmaxf(most, part[i * size + v_dim]);
    most = warp_max(most);
    for (int i = tid; i < splits; i += 128) {
        float by = expf(part[i * size + v_dim] - most);
        memory[i] = by;
        total = fmaf(by, part[i * size + v_dim + 1], total);
    }
    total = block_sum(total, room);
    for (int d = tid; d < v_dim; d += 128) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < splits; i++) sum = fmaf(memory[i], part[i * size + d], sum);
        y.row(t)[h * v_dim + d] = sum / total;
    }
}

// Products of up to 64 rows, rounded to integers, with weights in blocks, on the matrix units that multiply
// bytes: sums of a run of codes are exact, as for one row. A warp takes sixteen outputs with all rows of x;
// warps of a block share K. What comes out for a row does not depend on the rows beside it.
//
// Rounded rows lie in tiles of eight. Codes: (tile, run, row, 32), their sums (tile, run, row), the scales of
// x's blocks (tile, block, row). The runs are of 32 codes; those of Q6_K are halves of them.

#include "blocks.cuh"

#define MAGIC 0x4b400000 // as a float 12,582,912; integers added to it up to four million are floats
#define MAGIC_FLOAT 12582912.0f

// Four codes of each half of a run are side by side where a half has a scale of its own.
template <int F>
__device__ __forceinline__ int place(int c) { return F == Q6_K ? (c & 12) << 1 | (c & 16) >> 2 | (c & 3) : c; }

template <int F, int B>
__device__ __forceinline__ void round_units(In x, int rows, u8* to, int k, int wide) {
    const int c = (blockIdx.y * 256 + threadIdx.x) * 8, lane = threadIdx.x % 32, r = blockIdx.x;
    if (c - lane * 8 >= k) return;
    const int tiles = gridDim.x / 8, tile = r / 8, runs = k / 32;
    int codes[8] = {};
    float d = 0.0f;
    if (r < rows) {
        float v[8];
        take_eight(x.row(r), c, k, wide, v);
        d = round_eight<B>(v, codes);
    }
    const u32 low = pack_bytes(codes), high = pack_bytes(codes + 4);
    int sum = dot4(low, 0x01010101u, dot4(high, 0x01010101u, 0));
    sum += __shfl_xor_sync(FULL, sum, 1);
    sum += __shfl_xor_sync(FULL, sum, 2);
    if (c >= k) return;
    u8* run = to + (((i64)tile * runs + c / 32) * 8 + r % 8) * 32;
    *(u32*)(run + place<F>(c % 32)) = low, *(u32*)(run + place<F>(c % 32 + 4)) = high;
    float* sums = (float*)(to + (i64)tiles * 8 * k);
    float* scales = sums + (i64)tiles * runs * 8;
    if (c % 32 == 0) sums[((i64)tile * runs + c / 32) * 8 + r % 8] = (float)sum;
    if (c % B == 0) scales[((i64)tile * (k / B) + c / B) * 8 + r % 8] = d;
}

__device__ __forceinline__ uint2 two(const u8* p) { return __ldg((const uint2*)p); }
// Byte i of a word as a float.
__device__ __forceinline__ float byte_at(u32 w, int i) {
    return __uint_as_float(choose_bytes(w, 0x4b000000u, 0x7440 | i)) - 8388608.0f;
}

// Four runs of codes of two rows of w, step `f` of the matrix and `g` of it, as lane `t` of a row's four holds
// them: as they are stored, and run by run.
template <int F>
struct Four;

template <>
struct Four<Q8_0> {
    static const int BLOCK = 32, HALVES = 1;
    static const bool MINIMA = false;
    uint2 q[2][4], d[2];
    __device__ __forceinline__ void load(const u8* w, i64 n, const i64* f, int t) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            d[i] = two(w + 32 * n + 8 * f[i]);
#pragma unroll
            for (int r = 0; r < 4; r++) q[i][r] = two(w + 128 * f[i] + 32 * r + 8 * t);
        }
    }
    __device__ __forceinline__ void begin(i64) {}
    __device__ __forceinline__ u32 codes(int i, int r, int h) const { return h ? q[i][r].y : q[i][r].x; }
    __device__ __forceinline__ float scale(int i, int r, int) const {
        u32 w = r < 2 ? d[i].x : d[i].y;
        return r & 1 ? high_half(w) : low_half(w);
    }
    __device__ __forceinline__ float least(int, int) const { return 0.0f; }
};

template <>
struct Four<Q4_K> {
    static const int BLOCK = 256, HALVES = 1;
    static const bool MINIMA = true;
    uint2 q[2][2];
    uint4 head[2];
    u32 s[2], m[2];
    __device__ __forceinline__ void load(const u8* w, i64 n, const i64* f, int t) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            q[i][0] = two(w + 64 * f[i] + 8 * t), q[i][1] = two(w + 64 * f[i] + 32 + 8 * t);
            head[i] = __ldg((const uint4*)(w + 128 * n) + f[i] / 2);
        }
    }
    __device__ __forceinline__ void begin(i64 f) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 h = head[i];
            s[i] = h.y & 0x3f3f3f3f, m[i] = h.z & 0x3f3f3f3f;
            if (f & 1) s[i] = (h.w & 0x0f0f0f0f) | (h.y >> 2 & 0x30303030), m[i] = (h.w >> 4 & 0x0f0f0f0f) | (h.z >> 2 & 0x30303030);
        }
    }
    __device__ __forceinline__ u32 codes(int i, int r, int h) const {
        u32 w = h ? q[i][r / 2].y : q[i][r / 2].x;
        return (r & 1 ? w >> 4 : w) & 0x0f0f0f0f;
    }
    __device__ __forceinline__ float scale(int i, int r, int) const { return low_half(head[i].x) * byte_at(s[i], r); }
    __device__ __forceinline__ float least(int i, int r) const { return high_half(head[i].x) * byte_at(m[i], r); }
};

template <>
struct Four<Q6_K> {
    static const int BLOCK = 256, HALVES = 2;
    static const bool MINIMA = false;
    u32 q[2][2][2], high[2][2];
    uint2 s[2];
    u16 d[2];
    __device__ __forceinline__ void load(const u8* w, i64 n, const i64* f, int t) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                q[i][0][h] = word(w + 64 * f[i] + 16 * h + 4 * t), q[i][1][h] = word(w + 64 * f[i] + 32 + 16 * h + 4 * t);
                high[i][h] = word(w + 128 * n + 32 * f[i] + 16 * h + 4 * t);
            }
            s[i] = two(w + 192 * n + 8 * f[i]);
            d[i] = __ldg((const u16*)(w + 208 * n) + f[i] / 2);
        }
    }
    __device__ __forceinline__ void begin(i64) {}
    __device__ __forceinline__ u32 codes(int i, int r, int h) const {
        const u32 w = q[i][r & 1][h], two = high[i][h] >> 2 * (r & 1);
        const u32 c = r < 2 ? (w & 0x0f0f0f0f) | (two << 4 & 0x30303030) : (w >> 4 & 0x0f0f0f0f) | (two & 0x30303030);
        return ((c | 0x80808080) - 0x20202020) ^ 0x80808080; // less 32
    }
    __device__ __forceinline__ float scale(int i, int r, int h) const {
        const u32 w = r < 2 ? s[i].x : s[i].y;
        return from_f16(d[i]) * (float)(signed char)(w >> (16 * (r & 1) + 8 * h));
    }
    __device__ __forceinline__ float least(int, int) const { return 0.0f; }
};

__device__ __forceinline__ void multiply(const u32* a, u32 b0, u32 b1, float* v) {
    int d[4];
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC));
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __int_as_float(d[i]) - MAGIC_FLOAT;
}
__device__ __forceinline__ void multiply_half(u32 a0, u32 a1, u32 b, float* v) {
    int d[4];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b), "r"(MAGIC));
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __int_as_float(d[i]) - MAGIC_FLOAT;
}

struct Units {
    const u8* x;
    const u8* w;
    i64 blocks;
    const float* bias;
    Out y;
    int rows, k, n;
    int split; // warps that share K
};

// K is whole steps of 128.
template <int F, int TILES>
__device__ __forceinline__ void units(const Units& p) {
    typedef Four<F> W;
    __shared__ float sums_of[8][8 * TILES][17];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int part = warp % p.split, outputs = 8 / p.split * 16, first = blockIdx.x * outputs, m0 = first + warp / p.split * 16;
    const int steps = p.k / 128, runs = p.k / 32;
    i64 f[2] = {(i64)min(m0 + g, p.n - 1) * steps + part, (i64)min(m0 + g + 8, p.n - 1) * steps + part};
    W now, next;
    if (part < steps) now.load(p.w, p.blocks, f, t);
    BEGIN();
    const float* sums = (const float*)(p.x + (i64)TILES * 8 * p.k);
    const float* scales = sums + (i64)TILES * runs * 8;
    float sum[TILES][4] = {};
#pragma unroll 1
    for (int at = part; at < steps; at += p.split) {
        const i64 here = f[0];
        f[0] += p.split, f[1] += p.split;
        if (at + p.split < steps) next.load(p.w, p.blocks, f, t);
        now.begin(here);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            u32 a[4] = {now.codes(0, r, 0), now.codes(1, r, 0), now.codes(0, r, 1), now.codes(1, r, 1)};
            float s[W::HALVES][2], m[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int h = 0; h < W::HALVES; h++) s[h][i] = now.scale(i, r, h);
                m[i] = now.least(i, r);
            }
            const int run = 4 * at + r;
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const uint2 b = *(const uint2*)(p.x + (((i64)j * runs + run) * 8 + g) * 32 + 8 * t);
                const float2 dx = *(const float2*)(scales + ((i64)j * (p.k / W::BLOCK) + run * 32 / W::BLOCK) * 8 + 2 * t);
                float v[4], part_of[4];
                if (W::HALVES == 1) {
                    multiply(a, b.x, b.y, v);
#pragma unroll
                    for (int i = 0; i < 4; i++) part_of[i] = s[0][i / 2] * v[i];
                } else {
                    multiply_half(a[0], a[1], b.x, v);
#pragma unroll
                    for (int i = 0; i < 4; i++) part_of[i] = s[0][i / 2] * v[i];
                    multiply_half(a[2], a[3], b.y, v);
#pragma unroll
                    for (int i = 0; i < 4; i++) part_of[i] = fmaf(s[W::HALVES - 1][i / 2], v[i], part_of[i]);
                }
                if (W::MINIMA) {
                    const float2 q = *(const float2*)(sums + ((i64)j * runs + run) * 8 + 2 * t);
#pragma unroll
                    for (int i = 0; i < 4; i++) part_of[i] = fmaf(-m[i / 2], i % 2 ? q.y : q.x, part_of[i]);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) sum[j][i] = fmaf(part_of[i], i % 2 ? dx.y : dx.x, sum[j][i]);
            }
        }
        now = next;
    }
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums_of[warp][8 * j + 2 * t + i % 2][g + i / 2 * 8] = sum[j][i];
    __syncthreads();
    for (int i = threadIdx.x; i < outputs * p.rows; i += 256) {
        const int r = i / outputs, o = i % outputs, n = first + o;
        if (n >= p.n) continue;
        float y = 0.0f;
        for (int v = 0; v < p.split; v++) y += sums_of[o / 16 * p.split + v][r][o % 16];
        p.y.row(r)[n] = y + (p.bias ? p.bias[n] : 0.0f);
    }
}

// Most tiles of which a processor holds two blocks: where all kernels keep within registers.
#if __CUDA_ARCH__ >= 1000
#define MOST_OF_TWO 1
#else
#define MOST_OF_TWO 2
#endif

#define OF_TILES(F, NAME, TILES) \
    KERNEL __launch_bounds__(256, TILES > MOST_OF_TWO ? 1 : 2) units_##NAME##_##TILES(ARGS(Units) p) { units<F, TILES>(p); }
#define OF_FORMAT_UNITS(F, NAME, B)                                                                                   \
    KERNEL __launch_bounds__(256) round_units_##NAME(In x, int rows, u8* to, int k, int wide) {                        \
        BEGIN();                                                                                                       \
        round_units<F, B>(x, rows, to, k, wide);                                                                       \
    }                                                                                                                  \
    OF_TILES(F, NAME, 1)                                                                                               \
    OF_TILES(F, NAME, 2)                                                                                               \
    OF_TILES(F, NAME, 4)                                                                                               \
    OF_TILES(F, NAME, 8)
OF_FORMAT_UNITS(Q8_0, q8_0, 32)
OF_FORMAT_UNITS(Q6_K, q6_k, 256)
OF_FORMAT_UNITS(Q4_K, q4_k, 256)

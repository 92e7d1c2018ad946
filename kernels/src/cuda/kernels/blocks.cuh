// Weights in blocks. `arrange` lays the blocks of a whole matrix out by fields: all codes first, then what
// else a block holds, so that every field is aligned and neighbours are read together.
//
// A unit is 32 codes of a block: two runs of 16 elements, `at` their places in the block. An element is
// s · (code - OFFSET) - m.

#include "common.cuh"

enum Format { Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL, Q6_K, Q5_K, Q4_K, IQ4_XS, Q3_K, Q2_K, INT8, FP8 };

struct Unit {
    u32 q[8];
    float s[2], m[2];
    int at[2];
};

__device__ __forceinline__ void words(const u8* p, u32* to) {
    uint4 v = __ldg((const uint4*)p);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ u32 word(const u8* p) { return __ldg((const u32*)p); }
__device__ __forceinline__ float half_at(const u8* p) { return from_f16(__ldg((const u16*)p)); }
__device__ __forceinline__ float low_half(u32 x) { return from_f16((u16)x); }
__device__ __forceinline__ float high_half(u32 x) { return from_f16((u16)(x >> 16)); }
__device__ __forceinline__ float byte_of(u32 x, int shift) { return (float)((x >> shift) & 255); }

// Sixteen bytes of nibbles: the lower ones are the first run.
__device__ __forceinline__ void nibbles(const u8* p, u32* q) {
    u32 w[4];
    words(p, w);
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = w[i] & 0x0f0f0f0f, q[4 + i] = w[i] >> 4 & 0x0f0f0f0f;
}

// The fifth bits of four codes, from four neighbouring bits.
__device__ __forceinline__ u32 fifths(u32 bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) << 4; }

__device__ __forceinline__ u32 choose_bytes(u32 a, u32 b, u32 how) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(how));
    return r;
}
// The values that four neighbouring nibbles stand for: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113.
__device__ __forceinline__ u32 uneven(u32 nibbles) {
    u32 how = nibbles & 0x7777, upper = 0x3210 | (nibbles & 0x8888) >> 1;
    return choose_bytes(choose_bytes(0xbfad9881u, 0xf6eaddcfu, how), choose_bytes(0x26190d01u, 0x71594535u, how), upper);
}
__device__ __forceinline__ void values(const u8* p, u32* q) {
    u32 w[4];
    words(p, w);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 a = uneven(w[i]), b = uneven(w[i] >> 16);
        q[i] = choose_bytes(a, b, 0x6420), q[4 + i] = choose_bytes(a, b, 0x7531);
    }
}

__device__ __forceinline__ void plain(Unit& t, float d, float m) {
    t.s[0] = t.s[1] = d, t.m[0] = t.m[1] = m;
    t.at[0] = 0, t.at[1] = 16;
}

// `take` reads unit `u` of block `b` of a matrix of `n` blocks.
template <int F>
struct Of;

template <>
struct Of<Q8_0> {
    static const int BLOCK = 32, OFFSET = 0;
    static const bool MINIMA = false, SIGNED = true;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        words(w + 32 * b, t.q), words(w + 32 * b + 16, t.q + 4);
        plain(t, half_at(w + 32 * n + 2 * b), 0.0f);
    }
};
template <>
struct Of<Q4_0> {
    static const int BLOCK = 32, OFFSET = 8;
    static const bool MINIMA = false, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        nibbles(w + 16 * b, t.q);
        plain(t, half_at(w + 16 * n + 2 * b), 0.0f);
    }
};
template <>
struct Of<IQ4_NL> {
    static const int BLOCK = 32, OFFSET = 0;
    static const bool MINIMA = false, SIGNED = true;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        values(w + 16 * b, t.q);
        plain(t, half_at(w + 16 * n + 2 * b), 0.0f);
    }
};
template <>
struct Of<Q4_1> {
    static const int BLOCK = 32, OFFSET = 0;
    static const bool MINIMA = true, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        nibbles(w + 16 * b, t.q);
        u32 d = word(w + 16 * n + 4 * b);
        plain(t, low_half(d), -high_half(d));
    }
};
template <>
struct Of<Q5_0> {
    static const int BLOCK = 32, OFFSET = 16;
    static const bool MINIMA = false, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        nibbles(w + 16 * b, t.q);
        u32 high = word(w + 16 * n + 4 * b);
#pragma unroll
        for (int i = 0; i < 8; i++) t.q[i] |= fifths(high >> 4 * i);
        plain(t, half_at(w + 20 * n + 2 * b), 0.0f);
    }
};
template <>
struct Of<Q5_1> {
    static const int BLOCK = 32, OFFSET = 0;
    static const bool MINIMA = true, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int, Unit& t) {
        nibbles(w + 16 * b, t.q);
        u32 high = word(w + 16 * n + 4 * b), d = word(w + 20 * n + 4 * b);
#pragma unroll
        for (int i = 0; i < 8; i++) t.q[i] |= fifths(high >> 4 * i);
        plain(t, low_half(d), -high_half(d));
    }
};

// Runs 2j and 2j + 1 of a block, half of each, from sixteen bytes of d, m and eight scales and minima of
// six bits.
__device__ __forceinline__ void six_bits(const u8* head, int u, Unit& t) {
    const int j = u / 2, shift = (j & 1) * 16;
    u32 h[4];
    words(head, h);
    u32 s = h[1] & 0x3f3f3f3f, m = h[2] & 0x3f3f3f3f;
    if (j >= 2) {
        s = (h[3] & 0x0f0f0f0f) | (h[1] >> 2 & 0x30303030);
        m = (h[3] >> 4 & 0x0f0f0f0f) | (h[2] >> 2 & 0x30303030);
    }
    float d = low_half(h[0]), least = high_half(h[0]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        t.s[r] = __fmul_rn(d, byte_of(s, shift + 8 * r)), t.m[r] = __fmul_rn(least, byte_of(m, shift + 8 * r));
        t.at[r] = 64 * j + 32 * r + 16 * (u & 1);
    }
}
template <>
struct Of<Q4_K> {
    static const int BLOCK = 256, OFFSET = 0;
    static const bool MINIMA = true, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        nibbles(w + 128 * b + 16 * u, t.q);
        six_bits(w + 128 * n + 16 * b, u, t);
    }
};
template <>
struct Of<Q5_K> {
    static const int BLOCK = 256, OFFSET = 0;
    static const bool MINIMA = true, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        nibbles(w + 128 * b + 16 * u, t.q);
        u32 high[4];
        words(w + 128 * n + 32 * b + 16 * (u & 1), high);
        const int shift = u & 6;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            t.q[i] |= (high[i] >> shift & 0x01010101) << 4;
            t.q[4 + i] |= (high[i] >> (shift + 1) & 0x01010101) << 4;
        }
        six_bits(w + 160 * n + 16 * b, u, t);
    }
};
template <>
struct Of<Q6_K> {
    static const int BLOCK = 256, OFFSET = 32;
    static const bool MINIMA = false, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        const int p = u / 4, s = u / 2 & 1, h = u & 1;
        nibbles(w + 128 * b + 16 * u, t.q);
        u32 high[4];
        words(w + 128 * n + 64 * b + 32 * p + 16 * h, high);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 two = high[i] >> 2 * s;
            t.q[i] |= (two & 0x03030303) << 4, t.q[4 + i] |= two & 0x30303030;
        }
        const signed char* scales = (const signed char*)(w + 192 * n + 16 * b);
        float d = half_at(w + 208 * n + 2 * b);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            t.at[r] = 128 * p + 64 * r + 32 * s + 16 * h;
            t.s[r] = __fmul_rn(d, (float)__ldg(scales + t.at[r] / 16)), t.m[r] = 0.0f;
        }
    }
};
template <>
struct Of<IQ4_XS> {
    static const int BLOCK = 256, OFFSET = 0;
    static const bool MINIMA = false, SIGNED = true;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        values(w + 128 * b + 16 * u, t.q);
        u32 d = word(w + 128 * n + 8 * b), low = word(w + 128 * n + 8 * b + 4);
        int s = (int)((low >> 4 * u & 15) | (d >> (16 + 2 * u) & 3) << 4) - 32;
        plain(t, __fmul_rn(low_half(d), (float)s), 0.0f);
        t.at[0] = 32 * u, t.at[1] = 32 * u + 16;
    }
};

// Codes of two bits: run u of eight.
__device__ __forceinline__ void pairs(const u8* codes, int u, Unit& t) {
    words(codes + 32 * (u / 4), t.q), words(codes + 32 * (u / 4) + 16, t.q + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) t.q[i] = t.q[i] >> 2 * (u & 3) & 0x03030303;
    t.at[0] = 32 * u, t.at[1] = 32 * u + 16;
}
template <>
struct Of<Q3_K> {
    static const int BLOCK = 256, OFFSET = 4;
    static const bool MINIMA = false, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        pairs(w + 64 * b, u, t);
        u32 high[8];
        words(w + 64 * n + 32 * b, high), words(w + 64 * n + 32 * b + 16, high + 4);
#pragma unroll
        for (int i = 0; i < 8; i++) t.q[i] |= (high[i] >> u & 0x01010101) << 2;
        const u8* scales = w + 96 * n + 12 * b;
        float d = half_at(w + 108 * n + 2 * b);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = 2 * u + r, low = __ldg(scales + i % 8) >> (i / 8 * 4) & 15;
            int s = low | (__ldg(scales + 8 + i % 4) >> (i / 4 * 2) & 3) << 4;
            t.s[r] = __fmul_rn(d, (float)(s - 32)), t.m[r] = 0.0f;
        }
    }
};
template <>
struct Of<Q2_K> {
    static const int BLOCK = 256, OFFSET = 0;
    static const bool MINIMA = true, SIGNED = false;
    static __device__ __forceinline__ void take(const u8* w, i64 n, i64 b, int u, Unit& t) {
        pairs(w + 64 * b, u, t);
        u32 d = word(w + 80 * n + 4 * b);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int s = __ldg(w + 64 * n + 16 * b + 2 * u + r);
            t.s[r] = __fmul_rn(low_half(d), (float)(s & 15)), t.m[r] = __fmul_rn(high_half(d), (float)(s >> 4));
        }
    }
};

// Element i of a run of a unit, to the bit of `Format::dequantize`.
template <int F>
__device__ __forceinline__ float element(const Unit& t, int run, int i) {
    u32 byte = t.q[4 * run + i / 4] >> (8 * (i % 4)) & 255;
    int code = Of<F>::SIGNED ? (int)(signed char)byte : (int)byte - Of<F>::OFFSET;
    float v = __fmul_rn(t.s[run], (float)code);
    return Of<F>::MINIMA ? __fsub_rn(v, t.m[run]) : v;
}

// Eight neighbours of a row; zeros behind its end.
__device__ __forceinline__ void take_eight(const float* x, int c, int k, int wide, float* v) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0.0f;
    if (c >= k) return;
    if (wide) {
        float4 a = *(const float4*)(x + c), b = *(const float4*)(x + c + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = x[c + i];
    }
}

// What a block's elements are times to become integers, and its scale, where `bits` are those of the largest
// magnitude; and an element's integer.
__device__ __forceinline__ float inverse_of(u32 bits, float& scale) {
    const float most = __uint_as_float(bits);
    scale = bits >= 0x7f800000u ? __uint_as_float(0x7fc00000u) : most < 1e-30f ? 0.0f : most / 127.0f;
    return most >= 1e-30f ? 127.0f / most : 0.0f;
}
__device__ __forceinline__ int code_of(float x, float inverse) {
    return (signed char)__float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

// Eight neighbours, rounded to integers as rounded.rs does, in blocks of B that neighbouring lanes share; the
// block's scale.
template <int B>
__device__ __forceinline__ float round_eight(const float* v, int* codes) {
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
    for (int o = B / 16; o; o >>= 1) bits = max(bits, __shfl_xor_sync(FULL, bits, o));
    float scale;
    const float inverse = inverse_of(bits, scale);
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = code_of(v[i], inverse);
    return scale;
}

__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    int r;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
    return r;
}
__device__ __forceinline__ u32 pack_bytes(const int* c) {
    return (c[0] & 255) | (c[1] & 255) << 8 | (c[2] & 255) << 16 | (u32)(c[3] & 255) << 24;
}

// A row in shared memory: its codes, their sums by sixteens, the scales of its blocks.
__device__ __forceinline__ int row_room(int k, int block) { return (k + k / 4 + 4 * (k / block) + 15) & ~15; }

// T rows of x with all rows of w. A team of `split` warps takes R outputs at a time; what the warps have is
// added in their order.
template <int F, int T, int R>
__device__ __forceinline__ void few(In x, i64 x0, int rows, const u8* w, i64 blocks, const float* bias, Out y, i64 y0,
                                    int k, int n, int split, int wide) {
    extern __shared__ __align__(16) u8 room[];
    __shared__ float parts[8][R * T];
    typedef Of<F> O;
    const int B = O::BLOCK, PER = B / 32, each = row_room(k, B), units = k / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int t = 0; t < T; t++) {
        const float* from = x.row(x0 + min(t, rows - 1));
        u8* to = room + t * each;
        for (int c0 = warp * 256; c0 < k; c0 += 8 * 256) {
            int c = c0 + 8 * lane, codes[8];
            float v[8];
            take_eight(from, c, k, wide, v);
            float d = round_eight<B>(v, codes);
            u32 low = pack_bytes(codes), high = pack_bytes(codes + 4);
            int sum = dot4(low, 0x01010101u, dot4(high, 0x01010101u, 0));
            sum += __shfl_xor_sync(FULL, sum, 1);
            if (c >= k) continue;
            *(uint2*)(to + c) = make_uint2(low, high);
            if (lane % 2 == 0) ((int*)(to + k))[c / 16] = sum;
            if (c % B == 0) ((float*)(to + k + k / 4))[c / B] = d;
        }
    }
    __syncthreads();
    const int groups = (n + R - 1) / R, teams = 8 / split, part = warp % split;
    for (int g0 = blockIdx.x * teams; g0 < groups; g0 += gridDim.x * teams) {
        const int group = g0 + warp / split, n0 = min(group, groups - 1) * R;
        float sum[R][T] = {};
#pragma unroll (T == 1 ? 2 : 1)
        for (int i = part * 32 + lane; i < units; i += 32 * split) {
            Unit q[R];
#pragma unroll
            for (int r = 0; r < R; r++) O::take(w, blocks, (i64)min(n0 + r, n - 1) * (units / PER) + i / PER, i % PER, q[r]);
            const int base = i / PER * B;
#pragma unroll
            for (int t = 0; t < T; t++) {
                const u8* row = room + t * each;
                float part_of[R];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int at = base + q[0].at[h];
                    uint4 a = *(const uint4*)(row + at);
                    int total = 0;
                    if (O::MINIMA || O::OFFSET) total = ((const int*)(row + k))[at / 16];
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        const u32* c = q[r].q + 4 * h;
                        int d = dot4(c[0], a.x, dot4(c[1], a.y, dot4(c[2], a.z, dot4(c[3], a.w, 0))));
                        if (O::OFFSET) d -= O::OFFSET * total;
                        float v = h ? fmaf(q[r].s[h], (float)d, part_of[r]) : q[r].s[h] * (float)d;
                        part_of[r] = O::MINIMA ? fmaf(-q[r].m[h], (float)total, v) : v;
                    }
                }
                const float dx = ((const float*)(row + k + k / 4))[i / PER];
#pragma unroll
                for (int r = 0; r < R; r++) sum[r][t] = fmaf(part_of[r], dx, sum[r][t]);
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int t = 0; t < T; t++) sum[r][t] = warp_sum(sum[r][t]);
        if (split > 1) {
            if (lane == 0)
#pragma unroll
                for (int i = 0; i < R * T; i++) parts[warp][i] = sum[i / T][i % T];
            __syncthreads();
            if (part == 0)
#pragma unroll
                for (int i = 0; i < R * T; i++)
                    for (int v = 1; v < split; v++) sum[i / T][i % T] += parts[warp + v][i];
            __syncthreads();
        }
        if (lane != 0 || part != 0 || group >= groups) continue;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int t = 0; t < T; t++)
                if (t < rows && n0 + r < n) y.row(y0 + t)[n0 + r] = sum[r][t] + (bias ? bias[n0 + r] : 0.0f);
    }
}

// The first codes of a team of `few`, on their way while the kernel before this one ends. More of them were slower.
__device__ __forceinline__ void ahead(const u8* w, i64 row, int n, int split, int R) {
    i64 first = (i64)(blockIdx.x * (8 / split) + threadIdx.x / 32 / split) * R * row, at = first + threadIdx.x % (32 * split) * 128;
    if (at < min(first + R * row, n * row)) asm volatile("prefetch.global.L2 [%0];" ::"l"(w + at));
}

struct Few {
    In x;
    const u8* w;
    i64 blocks;
    const float* bias;
    Out y;
    int rows, k, n, split, wide;
    int row_bytes; // of the first field
};

// As in experts.cu: row r of y is choice r; row r / x_div of x.
struct Chosen {
    In x;
    const u8* const* w;
    const int* experts;
    i64 experts_stride, blocks;
    Out y;
    int k, n, split, wide, x_div, choices;
};

template <int F>
__device__ __forceinline__ void chosen(const Chosen& p) {
    const int r = blockIdx.y;
    const int expert = p.experts[(r / p.choices) * p.experts_stride + r % p.choices];
    few<F, 1, 2>(p.x, r / p.x_div, 1, p.w[expert], p.blocks, nullptr, p.y, r, p.k, p.n, p.split, p.wide);
}

// Rows of a matrix, or of each of several, as numbers. `ids` says which, or they follow `first`.
struct Widen {
    const u8* w;
    const u8* const* list; // of several matrices, whose results follow each other; `table` gets their places
    u64* table;
    i64 blocks;
    const u32* ids;
    int first, k;
    void* to;
    i64 stride;
    int type, wide;
};

template <int F>
__device__ __forceinline__ void widen(const Widen& p) {
    typedef Of<F> O;
    const int PER = O::BLOCK / 32, i = blockIdx.y * 128 + threadIdx.x, units = p.k / 32;
    const u8* w = p.w;
    i64 to = (i64)blockIdx.x * p.stride;
    if (p.list) {
        w = p.list[blockIdx.z];
        i64 place = (i64)blockIdx.z * gridDim.x * p.stride;
        if (blockIdx.x == 0 && i == 0) p.table[blockIdx.z] = (u64)p.to + place * (p.type == F32 ? 4 : 2);
        to += place;
    }
    if (i >= units) return;
    const i64 row = p.ids ? p.ids[blockIdx.x] : p.first + blockIdx.x;
    Unit t;
    O::take(w, p.blocks, row * (units / PER) + i / PER, i % PER, t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const i64 at = to + i / PER * O::BLOCK + t.at[h];
        float v[16];
#pragma unroll
        for (int e = 0; e < 16; e++) v[e] = element<F>(t, h, e);
        if (p.type == BF16) {
            uint4* q = (uint4*)((u16*)p.to + at);
            q[0] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            q[1] = make_uint4(pack_bf16(v[8], v[9]), pack_bf16(v[10], v[11]), pack_bf16(v[12], v[13]), pack_bf16(v[14], v[15]));
        } else if (p.wide) {
            float4* q = (float4*)((float*)p.to + at);
#pragma unroll
            for (int e = 0; e < 4; e++) q[e] = make_float4(v[4 * e], v[4 * e + 1], v[4 * e + 2], v[4 * e + 3]);
        } else {
#pragma unroll
            for (int e = 0; e < 16; e++) ((float*)p.to)[at + e] = v[e];
        }
    }
}

// Rows of x, each number what its integer and its block's scale make, as f32 or rounded to bf16.
template <int B>
__device__ __forceinline__ void round_rows(In x, void* to, int type, int k, int wide) {
    const int c = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (c - (int)(threadIdx.x % 32) * 8 >= k) return;
    int codes[8];
    float v[8];
    take_eight(x.row(blockIdx.x), c, k, wide, v);
    const float d = round_eight<B>(v, codes);
    if (c >= k) return;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = d * (float)codes[i];
    const i64 at = (i64)blockIdx.x * k + c;
    if (type == BF16) {
        *(uint4*)((u16*)to + at) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    } else {
        float4* q = (float4*)((float*)to + at);
        q[0] = make_float4(v[0], v[1], v[2], v[3]), q[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

// Blocks of `few` for up to four rows that a processor holds at least: where all kernels keep within registers.
#if __CUDA_ARCH__ == 900
#define RESIDENT 3
#else
#define RESIDENT 2
#endif

#define OF_ROWS(F, NAME, T)                                                                                          \
    KERNEL __launch_bounds__(256, T > 4 ? 2 : RESIDENT) few_##NAME##_##T(ARGS(Few) p) {                                \
        ahead(p.w, p.row_bytes, p.n, p.split, 2);                                                                      \
        BEGIN();                                                                                                       \
        few<F, T, 2>(p.x, 0, p.rows, p.w, p.blocks, p.bias, p.y, 0, p.k, p.n, p.split, p.wide);                         \
    }
#define OF_FORMAT(F, NAME)                                                                                           \
    OF_ROWS(F, NAME, 1)                                                                                                \
    OF_ROWS(F, NAME, 4)                                                                                                \
    OF_ROWS(F, NAME, 8)                                                                                                \
    KERNEL __launch_bounds__(256, 2) few_##NAME##_chosen(ARGS(Chosen) p) { BEGIN(); chosen<F>(p); }                    \
    KERNEL __launch_bounds__(128) widen_##NAME(ARGS(Widen) p) { BEGIN(); widen<F>(p); }

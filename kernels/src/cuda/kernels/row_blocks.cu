// Products of one row, rounded to integers, with weights in blocks, or with large matrices in BF16: the speed is that of memory. A block of
// threads takes neighbouring rows of w, whose codes lie in one piece, and shares them out to teams of eight
// lanes by steps of 128 bytes: all teams have as much to do, wherever rows end. What follows a product
// element by element may be done in the same kernel, as in row.cu.

#include "blocks.cuh"
#include "after.cuh"
#include "fp8.cuh"

#define THREADS 512
#define TEAMS (THREADS / 8)

struct BlockRow {
    In x;
    const u8* w;
    i64 blocks;
    const float* bias;
    Out y;
    int k, n;
    int after;
    // Added to y, in z.
    In other;
    Out z;
    // A second product of x, whose y goes through `act` and times the first, in z.
    const u8* gate;
    const float* gate_bias;
    Out gate_y;
    int act;
    int rows;   // of a block of threads
    int share;  // steps of a team
    int places; // rows that a team can have to do with
    int wide;
    int windows; // where those of a convolution begin in shared memory
    Convolution conv;
};

// Codes are read once.
__device__ __forceinline__ uint4 once(const u8* at) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(at));
    return r;
}
// Codes without a sign.
__device__ __forceinline__ int dot4_plain(u32 codes, u32 x, int sum) {
    int r;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(codes), "r"(x), "r"(sum));
    return r;
}

// x in shared memory: `codes` in the order in which lanes read them, their `sums` by sixteens, in that order
// too, and the scales of its blocks.
struct Rounded {
    const u8* codes;
    const int* sums;
    const float* scales;
};

// What a lane loads of step `f` of a matrix of `n` blocks, sixteen bytes of codes and what belongs to them, and
// its part of the product with step `p` of x. `place` is where x's code `c` of a step lies.
template <int F>
struct Step;

template <>
struct Step<Q8_0> {
    static const int CODES = 128, BLOCK = 32, AHEAD = 6;
    uint4 c;
    u16 d;
    static __device__ __forceinline__ int place(int c) { return c; }
    __device__ __forceinline__ void load(const u8* w, i64 n, i64 f, int u) {
        c = once(w + 128 * f + 16 * u);
        d = __ldg((const u16*)(w + 32 * n) + 4 * f + u / 2);
    }
    __device__ __forceinline__ float times(const Rounded& x, int p, int u, float sum) const {
        const uint4 a = *(const uint4*)(x.codes + 128 * p + 16 * u);
        const int s = dot4(c.x, a.x, dot4(c.y, a.y, dot4(c.z, a.z, dot4(c.w, a.w, 0))));
        return fmaf(from_f16(d) * (float)s, x.scales[4 * p + u / 2], sum);
    }
};

template <>
struct Step<Q4_K> {
    static const int CODES = 256, BLOCK = 256, AHEAD = 4;
    uint4 c, head;
    static __device__ __forceinline__ int place(int c) { return (c & 32) << 2 | (c & 192) >> 1 | (c & 31); }
    __device__ __forceinline__ void load(const u8* w, i64 n, i64 f, int u) {
        c = once(w + 128 * f + 16 * u);
        head = __ldg((const uint4*)(w + 128 * n) + f);
    }
    __device__ __forceinline__ float times(const Rounded& x, int p, int u, float sum) const {
        const uint4 a = *(const uint4*)(x.codes + 256 * p + 16 * u), b = *(const uint4*)(x.codes + 256 * p + 128 + 16 * u);
        const u32 L = 0x0f0f0f0f, H = 0xf0f0f0f0;
        int s0 = dot4(c.x & L, a.x, dot4(c.y & L, a.y, dot4(c.z & L, a.z, dot4(c.w & L, a.w, 0))));
        int s1 = dot4_plain(c.x & H, b.x, dot4_plain(c.y & H, b.y, dot4_plain(c.z & H, b.z, dot4_plain(c.w & H, b.w, 0)))) >> 4;
        // As `six_bits`, two bytes of each.
        const bool late = u & 4;
        const int shift = (u & 2) << 3;
        u32 s = (late ? head.w : head.y) >> shift & (late ? 0x0f0f : 0x3f3f);
        u32 m = (late ? head.w >> 4 : head.z) >> shift & (late ? 0x0f0f : 0x3f3f);
        if (late) s |= head.y >> (shift + 2) & 0x3030, m |= head.z >> (shift + 2) & 0x3030;
        const int whole = (int)(s & 255) * s0 + (int)(s >> 8) * s1;
        const int least = (int)(m & 255) * x.sums[16 * p + u] + (int)(m >> 8) * x.sums[16 * p + 8 + u];
        return fmaf(fmaf(-high_half(head.x), (float)least, low_half(head.x) * (float)whole), x.scales[p], sum);
    }
};

template <>
struct Step<Q6_K> {
    static const int CODES = 256, BLOCK = 256, AHEAD = 3;
    uint4 c, high;
    int s0, s1;
    u16 d;
    static __device__ __forceinline__ int place(int c) { return (c & 64) << 1 | (c & 128) >> 1 | (c & 63); }
    __device__ __forceinline__ void load(const u8* w, i64 n, i64 f, int u) {
        c = once(w + 128 * f + 16 * u);
        high = __ldg((const uint4*)(w + 128 * n + 64 * f + 8 * (u & 4) + 16 * (u & 1)));
        const signed char* scales = (const signed char*)(w + 192 * n + 16 * f) + 2 * (u & 4) + (u & 3);
        s0 = __ldg(scales), s1 = __ldg(scales + 4);
        d = __ldg((const u16*)(w + 208 * n) + f);
    }
    __device__ __forceinline__ float times(const Rounded& x, int p, int u, float sum) const {
        const uint4 a = *(const uint4*)(x.codes + 256 * p + 16 * u), b = *(const uint4*)(x.codes + 256 * p + 128 + 16 * u);
        const u32 cs[4] = {c.x, c.y, c.z, c.w}, hs[4] = {high.x, high.y, high.z, high.w};
        const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
        int t0 = 0, t1 = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 two = hs[i] >> (u & 2);
            t0 = dot4((cs[i] & 0x0f0f0f0f) | (two << 4 & 0x30303030), as[i], t0);
            t1 = dot4((cs[i] >> 4 & 0x0f0f0f0f) | (two & 0x30303030), bs[i], t1);
        }
        t0 -= 32 * x.sums[16 * p + u], t1 -= 32 * x.sums[16 * p + 8 + u];
        return fmaf(from_f16(d) * (float)(s0 * t0 + s1 * t1), x.scales[p], sum);
    }
};

// Whole numbers with a scale a row, for which the row of x is one block: sums stay whole numbers.
template <>
struct Step<INT8> {
    static const int CODES = 128, BLOCK = 128, AHEAD = 8;
    uint4 c;
    static __device__ __forceinline__ int place(int c) { return c; }
    __device__ __forceinline__ void load(const u8* w, i64, i64 f, int u) { c = once(w + 128 * f + 16 * u); }
    __device__ __forceinline__ int times(const Rounded& x, int p, int u, int sum) const {
        const uint4 a = *(const uint4*)(x.codes + 128 * p + 16 * u);
        return dot4(c.x, a.x, dot4(c.y, a.y, dot4(c.z, a.z, dot4(c.w, a.w, sum))));
    }
};

// E4M3 codes with a scale a row: x is BF16, two bytes a code, of each step first the eights that begin a lane's sixteen.
template <>
struct Step<FP8> {
    static const int CODES = 128, BLOCK = 128, AHEAD = 6;
    uint4 c;
    static __device__ __forceinline__ int place(int c) { return 16 * (c / 16) + 128 * (c / 8 % 2); }
    __device__ __forceinline__ void load(const u8* w, i64, i64 f, int u) { c = once(w + 128 * f + 16 * u); }
    __device__ __forceinline__ float times(const Rounded& x, int p, int u, float sum) const {
        const u8* at = x.codes + 256 * p + 16 * u;
        return add_sixteen(c, *(const uint4*)at, *(const uint4*)(at + 128), sum);
    }
};

// BF16 on both sides.
#define WORDS (FP8 + 1)
template <>
struct Step<WORDS> {
    static const int CODES = 64, BLOCK = 64, AHEAD = 8;
    uint4 c;
    static __device__ __forceinline__ int place(int c) { return 2 * c; }
    __device__ __forceinline__ void load(const u8* w, i64, i64 f, int u) { c = once(w + 128 * f + 16 * u); }
    __device__ __forceinline__ float times(const Rounded& x, int p, int u, float sum) const {
        const uint4 v = *(const uint4*)(x.codes + 128 * p + 16 * u);
        const u32 w[4] = {c.x, c.y, c.z, c.w}, xs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(low_bf16(xs[i]), low_bf16(w[i]), sum);
            sum = fmaf(high_bf16(xs[i]), high_bf16(w[i]), sum);
        }
        return sum;
    }
};

template <int F>
struct Sum {
    typedef float T;
    static __device__ __forceinline__ float of(float sum, const u8*, i64, int, float) { return sum; }
};
template <>
struct Sum<INT8> {
    typedef int T;
    // `codes` bytes lie before the scales.
    static __device__ __forceinline__ float of(int sum, const u8* w, i64 codes, int n, float dx) {
        return __fmul_rn(__fmul_rn((float)sum, __ldg((const float*)(w + codes) + n)), dx);
    }
};
template <>
struct Sum<FP8> {
    typedef float T;
    static __device__ __forceinline__ float of(float sum, const u8* w, i64 codes, int n, float) {
        return __fmul_rn(sum, __ldg((const float*)(w + codes) + n));
    }
};

// K is whole steps.
template <int F, bool GATED>
__device__ __forceinline__ void row_blocks(const BlockRow& p) {
    extern __shared__ __align__(16) u8 room[];
    typedef Step<F> S;
    typedef typename Sum<F>::T T;
    const bool FLOATS = F == FP8 || F == WORDS; // x is BF16
    const int AHEAD = GATED ? S::AHEAD / 2 : S::AHEAD, B = S::BLOCK;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = threadIdx.x / 8, u = threadIdx.x % 8;
    const int steps = p.k / S::CODES, row0 = blockIdx.x * p.rows, rows = min(p.rows, p.n - row0);
    const int total = rows * steps, begin = team * p.share, end = min(begin + p.share, total);
    const i64 f0 = (i64)row0 * steps;
    S q[AHEAD], g[GATED ? AHEAD : 1];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
        if (begin + a < end) {
            q[a].load(p.w, p.blocks, f0 + begin + a, u);
            if (GATED) g[a].load(p.gate, p.blocks, f0 + begin + a, u);
        }
    const bool convolves = !GATED && p.after == CONVOLVE;
    if (convolves) near_windows(p.conv, row0, rows);
    BEGIN();
    float* windows = (float*)(room + p.windows);
    if (convolves) ask_windows(p.conv, row0, rows, windows);
    int* sums = (int*)(room + p.k);
    float* scales = (float*)(room + p.k + p.k / 4);
    const float* from = p.x.row(0);
    float whole = 0.0f, inverse = 0.0f;
    if (F == INT8) {
        __shared__ u32 most_of[THREADS / 32];
        u32 bits = 0;
        for (int c = threadIdx.x * 8; c < p.k; c += 8 * THREADS) {
            float v[8];
            take_eight(from, c, p.k, p.wide, v);
#pragma unroll
            for (int i = 0; i < 8; i++) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffffu);
        }
        bits = __reduce_max_sync(FULL, bits);
        if (lane == 0) most_of[warp] = bits;
        __syncthreads();
        inverse = inverse_of(__reduce_max_sync(FULL, most_of[lane % (THREADS / 32)]), whole);
    }
    for (int c0 = warp * 256; c0 < p.k; c0 += 8 * THREADS) {
        int c = c0 + 8 * lane, codes[8];
        float v[8], d = whole;
        take_eight(from, c, p.k, p.wide, v);
        if (FLOATS) {
            const int at = 2 * (c / S::CODES) * S::CODES + S::place(c % S::CODES);
            const uint4 x = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            if (c < p.k) *(uint4*)(room + at) = x;
            continue;
        }
        if (F == INT8) {
#pragma unroll
            for (int i = 0; i < 8; i++) codes[i] = code_of(v[i], inverse);
        } else {
            d = round_eight<B>(v, codes);
        }
        u32 low = pack_bytes(codes), high = pack_bytes(codes + 4);
        int sum = dot4(low, 0x01010101u, dot4(high, 0x01010101u, 0));
        sum += __shfl_xor_sync(FULL, sum, 1);
        if (c >= p.k) continue;
        const int at = c / S::CODES * S::CODES + S::place(c % S::CODES);
        *(uint2*)(room + at) = make_uint2(low, high);
        if (lane % 2 == 0) sums[at / 16] = sum;
        if (c % B == 0) scales[c / B] = d;
    }
    __syncthreads();
    T* parts = (T*)(room + (FLOATS ? 2 * p.k : (p.k + p.k / 4 + 4 * (p.k / B) + 15) & ~15));
    T* gate_parts = parts + TEAMS * p.places;
    const Rounded x = {room, sums, scales};
    const u32 mine = 255u << (lane & 24);
    int at = begin % steps, place = team * p.places;
    T sum = 0, gate_sum = 0;
#pragma unroll 1
    for (int i = begin; i < end; i += AHEAD) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a >= end) break;
            sum = q[a].times(x, at, u, sum);
            if (GATED) gate_sum = g[a].times(x, at, u, gate_sum);
            if (i + a + AHEAD < end) {
                q[a].load(p.w, p.blocks, f0 + i + a + AHEAD, u);
                if (GATED) g[a].load(p.gate, p.blocks, f0 + i + a + AHEAD, u);
            }
            if (++at < steps && i + a + 1 < end) continue;
#pragma unroll
            for (int o = 4; o; o >>= 1) {
                sum += __shfl_xor_sync(mine, sum, o);
                if (GATED) gate_sum += __shfl_xor_sync(mine, gate_sum, o);
            }
            if (u == 0) {
                parts[place] = sum;
                if (GATED) gate_parts[place] = gate_sum;
            }
            place++, at = 0, sum = gate_sum = 0;
        }
    }
    if (convolves) wait_copies<0>();
    __syncthreads();
    for (int r = threadIdx.x; r < rows; r += THREADS) {
        T ys = 0, gates = 0;
        for (int t = r * steps / p.share, last = ((r + 1) * steps - 1) / p.share; t <= last; t++) {
            const int i = t * p.places + r - t * p.share / steps;
            ys += parts[i];
            if (GATED) gates += gate_parts[i];
        }
        const int n = row0 + r;
        float y = Sum<F>::of(ys, p.w, (i64)p.n * p.k, n, scales[0]);
        y += p.bias ? p.bias[n] : 0.0f;
        p.y.row(0)[n] = y;
        if (GATED) {
            float gate = Sum<F>::of(gates, p.gate, (i64)p.n * p.k, n, scales[0]);
            gate += p.gate_bias ? p.gate_bias[n] : 0.0f;
            p.gate_y.row(0)[n] = gate;
            p.z.row(0)[n] = activation(gate, p.act) * y;
        } else if (p.after == ADD) {
            p.z.row(0)[n] = y + p.other.row(0)[n];
        } else if (convolves) {
            convolve(p.conv, windows, r, rows, n, y);
        }
    }
}

// Blocks that a processor holds at least: where all kernels keep within registers.
#if __CUDA_ARCH__ >= 1000
#define BLOCKS_HELD 1
#else
#define BLOCKS_HELD 2
#endif

#define OF_FORMAT_ROW(F, NAME)                                                                                        \
    KERNEL __launch_bounds__(THREADS, BLOCKS_HELD) row_##NAME(ARGS(BlockRow) p) { row_blocks<F, false>(p); }                     \
    KERNEL __launch_bounds__(THREADS, BLOCKS_HELD) row_##NAME##_gated(ARGS(BlockRow) p) { row_blocks<F, true>(p); }
OF_FORMAT_ROW(Q8_0, q8_0)
OF_FORMAT_ROW(Q6_K, q6_k)
OF_FORMAT_ROW(Q4_K, q4_k)
OF_FORMAT_ROW(INT8, int8)
OF_FORMAT_ROW(FP8, fp8)
OF_FORMAT_ROW(WORDS, bf16)

// Products with rows of whole numbers, one scale a row, of inputs that are rounded to bytes with one scale a row: the
// definition of rounded.rs to the bit, because sums of whole numbers are exact in any order.
//
// A matrix is its codes, row after row in a pitch of sixteen bytes, then a scale a row.

#include "blocks.cuh"
#include "experts.cuh"

__host__ __device__ __forceinline__ i64 pitch_of(int k) { return (k + 15) & ~15; }

// A row of x to bytes, zeros up to the pitch, and its scale.
KERNEL __launch_bounds__(256) round_int8(In x, u8* to, float* scales, int k) {
    BEGIN();
    __shared__ u32 most_of[8];
    const float* from = x.row(blockIdx.x);
    const int pitch = (int)pitch_of(k), tid = threadIdx.x;
    u32 bits = 0;
    for (int i = tid; i < k; i += 256) bits = max(bits, __float_as_uint(from[i]) & 0x7fffffffu);
    bits = __reduce_max_sync(FULL, bits);
    if (tid % 32 == 0) most_of[tid / 32] = bits;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) bits = max(bits, most_of[i]);
    float scale;
    const float inverse = inverse_of(bits, scale);
    u8* row = to + (i64)blockIdx.x * pitch;
    for (int c = tid * 4; c < pitch; c += 1024) {
        int codes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) codes[i] = c + i < k ? code_of(from[c + i], inverse) : 0;
        *(u32*)(row + c) = pack_bytes(codes);
    }
    if (tid == 0) scales[blockIdx.x] = scale;
}

// Rows as files have them, codes in fours and a scale, to that order.
KERNEL __launch_bounds__(256) arrange_int8(const u8* from, u8* to, i64 first, i64 count, i64 rows, int k) {
    BEGIN();
    const int fours = (k + 3) & ~3, bytes = fours + 4;
    const i64 pitch = pitch_of(k);
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < count * bytes; i += (i64)gridDim.x * 256) {
        const i64 r = i / bytes, at = i - r * bytes, row = first + r;
        if (at < fours) to[row * pitch + at] = from[i];
        else to[rows * pitch + 4 * row + at - fours] = from[i];
    }
}

// As `widen` in blocks.cuh; `blocks` is the rows of a matrix.
KERNEL __launch_bounds__(128) widen_int8(ARGS(Widen) p) {
    BEGIN();
    const u8* w = p.w;
    i64 to = (i64)blockIdx.x * p.stride;
    if (p.list) {
        w = p.list[blockIdx.z];
        const i64 place = (i64)blockIdx.z * gridDim.x * p.stride;
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) p.table[blockIdx.z] = (u64)p.to + place * 4;
        to += place;
    }
    const i64 row = p.ids ? p.ids[blockIdx.x] : p.first + blockIdx.x, pitch = pitch_of(p.k);
    const float scale = __ldg((const float*)(w + p.blocks * pitch) + row);
    const int end = min(p.k, (int)(blockIdx.y + 1) * 4096);
    for (int c = blockIdx.y * 4096 + threadIdx.x; c < end; c += 128)
        ((float*)p.to)[to + c] = (float)(signed char)__ldg(w + row * pitch + c) * scale;
}

struct Bytes {
    const u8* x;         // rounded rows
    const float* scales; // of each
    const u8* w;
    const u8* const* experts; // or of each expert
    const float* bias;
    Out y;
    int rows, k, n, x_div; // as in experts.cuh
};

// A tile: 128 rows by 128 outputs, 64 of K at a time. Eight warps take 64 by 32 each.
#define TILE 128
#define DEEP 64
#define STAGES 4
#define PITCH (DEEP + 16) // so that eight rows lie in different banks

__device__ __forceinline__ void load_four(u32* r, const u8* at) {
    u32 p = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}

template <bool CHOSEN>
__device__ __forceinline__ void bytes_by_units(const Bytes& p, const Sorted& s) {
    if (CHOSEN && (int)blockIdx.y >= *s.count) return;
    extern __shared__ __align__(16) u8 memory[];
    u8 *xs = memory, *ws = memory + STAGES * TILE * PITCH;
    const int* t = s.tiles + 3 * blockIdx.y;
    const int first = CHOSEN ? t[1] : blockIdx.y * TILE, rows = CHOSEN ? t[2] : min(TILE, p.rows - first);
    const u8* w = CHOSEN ? p.experts[t[0]] : p.w;
    auto choice = [&](int r) { return CHOSEN ? s.order[first + r] : first + r; };
    const i64 pitch = pitch_of(p.k);
    const int n0 = blockIdx.x * TILE, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    // Of each stage this thread brings a chunk of two rows of each.
    const u8 *x_at[2], *w_at[2];
    bool x_in[2], w_in[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = tid / 4 + 64 * i;
        x_in[i] = r < rows, w_in[i] = n0 + r < p.n;
        x_at[i] = p.x + (i64)(choice(x_in[i] ? r : 0) / p.x_div) * pitch;
        w_at[i] = w + (i64)(w_in[i] ? n0 + r : 0) * pitch;
    }
    auto stage = [&](int k0, int to) {
        const int c = tid % 4 * 16;
        const bool in = k0 + c < pitch;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int put = (to * TILE + tid / 4 + 64 * i) * PITCH + c;
            copy16(xs + put, x_at[i] + (in ? k0 + c : 0), in && x_in[i]);
            copy16(ws + put, w_at[i] + (in ? k0 + c : 0), in && w_in[i]);
        }
        copies_done();
    };
    int sums[4][4][4] = {};
    const int steps = (p.k + DEEP - 1) / DEEP, row0 = warp / 4 * 64, col0 = warp % 4 * 32;
    // Warps with no row to do only bring.
    const bool idle = row0 >= rows;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) stage(i * DEEP, i);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        stage((i + STAGES - 1) * DEEP, (i + STAGES - 1) % STAGES);
        if (idle) continue;
        const u8 *a0 = xs + i % STAGES * TILE * PITCH, *b0 = ws + i % STAGES * TILE * PITCH;
#pragma unroll
        for (int k = 0; k < DEEP; k += 32) {
            u32 b[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_four(b[n], b0 + (col0 + 16 * n + lane / 16 * 8 + lane % 8) * PITCH + k + lane / 8 % 2 * 16);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                if (row0 + 16 * m >= rows) break;
                u32 a[4];
                load_four(a, a0 + (row0 + 16 * m + lane % 16) * PITCH + k + lane / 16 * 16);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int* c = sums[m][n];
                    asm volatile(
                        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n / 2][n % 2 * 2]), "r"(b[n / 2][n % 2 * 2 + 1]));
                }
            }
        }
    }
    const float* of_w = (const float*)(w + p.n * pitch);
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row0 + 16 * m + lane / 4 + 8 * i;
            if (r >= rows) continue;
            const int row = choice(r);
            const float dx = p.scales[row / p.x_div];
            float* y = p.y.row(row) + n0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int c = col0 + 8 * n + lane % 4 * 2 + e;
                    if (n0 + c >= p.n) continue;
                    const float v = __fmul_rn(__fmul_rn((float)sums[m][n][2 * i + e], __ldg(of_w + n0 + c)), dx);
                    y[c] = __fadd_rn(v, p.bias ? p.bias[n0 + c] : 0.0f);
                }
        }
}

KERNEL __launch_bounds__(256, 2) units_int8(ARGS(Bytes) p) {
    BEGIN();
    const Sorted none = {};
    bytes_by_units<false>(p, none);
}
KERNEL __launch_bounds__(256, 2) units_int8_chosen(ARGS(Bytes) p, ARGS(Sorted) s) {
    BEGIN();
    bytes_by_units<true>(p, s);
}

// Sums of whole numbers, where y will be, to y.
KERNEL __launch_bounds__(256) scale_int8(ARGS(Bytes) p) {
    BEGIN();
    float* y = p.y.row(blockIdx.x);
    const float *of_w = (const float*)(p.w + p.n * pitch_of(p.k)), of_x = p.scales[blockIdx.x];
    FOR_COLUMNS(c, p.n) {
        const float v = __fmul_rn(__fmul_rn((float)__float_as_int(y[c]), __ldg(of_w + c)), of_x);
        y[c] = __fadd_rn(v, p.bias ? p.bias[c] : 0.0f);
    }
}

// Few rows, or few choices: a warp a row and an output, rows by the y of the grid.
__device__ __forceinline__ void by_warps(const Bytes& p, const u8* w, int row) {
    const int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= p.n) return;
    const int chunks = (int)(pitch_of(p.k) / 16);
    const uint4 *a = (const uint4*)p.x + (i64)(row / p.x_div) * chunks, *b = (const uint4*)w + (i64)n * chunks;
    int sum = 0;
#pragma unroll 4
    for (int i = lane; i < chunks; i += 32) {
        const uint4 c = __ldg(b + i), x = a[i];
        sum = dot4(c.x, x.x, dot4(c.y, x.y, dot4(c.z, x.z, dot4(c.w, x.w, sum))));
    }
    sum = __reduce_add_sync(FULL, sum);
    if (lane) return;
    const float scale = __ldg((const float*)((const uint4*)w + (i64)p.n * chunks) + n);
    const float v = __fmul_rn(__fmul_rn((float)sum, scale), p.scales[row / p.x_div]);
    p.y.row(row)[n] = __fadd_rn(v, p.bias ? p.bias[n] : 0.0f);
}
KERNEL __launch_bounds__(256) few_int8(ARGS(Bytes) p) {
    BEGIN();
    by_warps(p, p.w, blockIdx.y);
}
KERNEL __launch_bounds__(256) few_int8_chosen(ARGS(Bytes) p, const int* experts, i64 stride, int choices) {
    BEGIN();
    const int r = blockIdx.y;
    by_warps(p, p.experts[experts[(r / choices) * stride + r % choices]], r);
}

// Products with rows of E4M3 codes, one scale a row, of inputs in BF16: formats/fp8.rs has the formula.
//
// A matrix lies as one of int8.cu does: its codes, row after row in a pitch of sixteen bytes, then a scale a row. Rows of
// x have that pitch too, zeros up to it.

#include "blocks.cuh"
#include "experts.cuh"
#include "fp8.cuh"

__host__ __device__ __forceinline__ i64 pitch_of(int k) { return (k + 15) & ~15; }

// As `widen` in blocks.cuh; `blocks` is the rows of a matrix. F32 is code times scale, BF16 the codes alone, whose rows
// then are whole fours.
KERNEL __launch_bounds__(128) widen_fp8(ARGS(Widen) p) {
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
    const int end = min(p.k, (int)(blockIdx.y + 1) * 4096);
    const u8* from = w + row * pitch;
    const float scale = __ldg((const float*)(w + p.blocks * pitch) + row);
    for (int c = blockIdx.y * 4096 + 4 * threadIdx.x; c < end; c += 512) {
        const u32 codes = __ldg((const u32*)(from + c));
        if (p.type == BF16) {
            *(uint2*)((u16*)p.to + to + c) = bf16_of_four(codes);
            continue;
        }
        float v[4];
        widen_four(codes, v);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (c + i < end) ((float*)p.to)[to + c + i] = v[i] * scale;
    }
}

// Whole sums of codes to outputs.
KERNEL __launch_bounds__(256) scale_fp8(const float* scales, const float* bias, Out y, int n) {
    BEGIN();
    float* row = y.row(blockIdx.x);
    FOR_COLUMNS(c, n) row[c] = __fadd_rn(__fmul_rn(row[c], scales[c]), bias ? bias[c] : 0.0f);
}

struct Codes {
    const u16* x; // rounded rows
    const u8* w;
    const u8* const* experts; // or of each expert
    const float* bias;
    Out y;
    int rows, k, n, x_div; // as in experts.cuh
};

// Few rows, or few choices: a warp an output and R rows, by the y of the grid.
template <int R>
__device__ __forceinline__ void by_warps(const Codes& p, const u8* w, int first) {
    const int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= p.n) return;
    const int chunks = (int)(pitch_of(p.k) / 16);
    const uint4 *b = (const uint4*)w + (i64)n * chunks, *x[R];
    float sums[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        x[r] = (const uint4*)p.x + (i64)(min(first + r, p.rows - 1) / p.x_div) * 2 * chunks;
        sums[r] = 0.0f;
    }
#pragma unroll 2
    for (int i = lane; i < chunks; i += 32) {
        const uint4 c = __ldg(b + i);
#pragma unroll
        for (int r = 0; r < R; r++) sums[r] = add_sixteen(c, x[r][2 * i], x[r][2 * i + 1], sums[r]);
    }
#pragma unroll
    for (int r = 0; r < R; r++) sums[r] = warp_sum(sums[r]);
    if (lane) return;
    const float scale = __ldg((const float*)((const uint4*)w + (i64)p.n * chunks) + n);
#pragma unroll
    for (int r = 0; r < R; r++)
        if (first + r < p.rows) p.y.row(first + r)[n] = __fadd_rn(__fmul_rn(sums[r], scale), p.bias ? p.bias[n] : 0.0f);
}
#define FEW(R) \
    KERNEL __launch_bounds__(256) few_fp8_##R(ARGS(Codes) p) { \
        BEGIN(); \
        by_warps<R>(p, p.w, blockIdx.y * R); \
    }
FEW(1)
FEW(2)
FEW(4)
KERNEL __launch_bounds__(256) few_fp8_chosen(ARGS(Codes) p, const int* experts, i64 stride, int choices) {
    BEGIN();
    const int r = blockIdx.y;
    by_warps<1>(p, p.experts[experts[(r / choices) * stride + r % choices]], r);
}

// A tile: 128 rows by 128 outputs, 64 of K at a time. Eight warps take 64 by 32 each. Codes are widened on their way
// from shared memory: a lane has four neighbours of K, which are the units' pairs 2q and 2q + 8, of both factors.
#define TILE 128
#define DEEP 64
#define STAGES 3
#define X_PITCH (2 * DEEP + 32) // bytes, so that rows of what lanes read at once lie in different banks
#define W_PITCH (DEEP + 16)

template <bool CHOSEN>
__device__ __forceinline__ void by_units(const Codes& p, const Sorted& s) {
    if (CHOSEN && (int)blockIdx.y >= *s.count) return;
    extern __shared__ __align__(16) u8 memory[];
    u8 *xs = memory, *ws = memory + STAGES * TILE * X_PITCH;
    const int* t = s.tiles + 3 * blockIdx.y;
    const int first = CHOSEN ? t[1] : blockIdx.y * TILE, rows = CHOSEN ? t[2] : min(TILE, p.rows - first);
    const u8* w = CHOSEN ? p.experts[t[0]] : p.w;
    auto choice = [&](int r) { return CHOSEN ? s.order[first + r] : first + r; };
    const i64 pitch = pitch_of(p.k);
    const int n0 = blockIdx.x * TILE, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    // Of each stage this thread brings a chunk of two rows of w and of four rows of x.
    const u8 *x_at[4], *w_at[2];
    bool x_in[4], w_in[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = tid / 8 + 32 * i;
        x_in[i] = r < rows;
        x_at[i] = (const u8*)(p.x + (i64)(choice(x_in[i] ? r : 0) / p.x_div) * pitch);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = tid / 4 + 64 * i;
        w_in[i] = n0 + r < p.n;
        w_at[i] = w + (i64)(w_in[i] ? n0 + r : 0) * pitch;
    }
    auto stage = [&](int k0, int to) {
        const int of_x = tid % 8 * 16, of_w = tid % 4 * 16;
        const bool x_there = k0 + of_x / 2 < pitch, w_there = k0 + of_w < pitch;
#pragma unroll
        for (int i = 0; i < 4; i++)
            copy16(xs + (to * TILE + tid / 8 + 32 * i) * X_PITCH + of_x, x_at[i] + (x_there ? 2 * k0 + of_x : 0), x_there && x_in[i]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            copy16(ws + (to * TILE + tid / 4 + 64 * i) * W_PITCH + of_w, w_at[i] + (w_there ? k0 + of_w : 0), w_there && w_in[i]);
        copies_done();
    };
    float sums[4][4][4] = {};
    const int steps = (p.k + DEEP - 1) / DEEP, row0 = warp / 4 * 64, col0 = warp % 4 * 32, g = lane / 4, q = lane % 4;
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
        const u8 *a0 = xs + (i % STAGES * TILE + row0 + g) * X_PITCH + 8 * q, *b0 = ws + (i % STAGES * TILE + col0 + g) * W_PITCH + 4 * q;
#pragma unroll
        for (int k = 0; k < DEEP; k += 16) {
            uint2 b[4];
#pragma unroll
            for (int n = 0; n < 4; n++) b[n] = bf16_of_four(*(const u32*)(b0 + 8 * n * W_PITCH + k));
#pragma unroll
            for (int m = 0; m < 4; m++) {
                if (row0 + 16 * m >= rows) break;
                const uint2 low = *(const uint2*)(a0 + 16 * m * X_PITCH + 2 * k);
                const uint2 high = *(const uint2*)(a0 + (16 * m + 8) * X_PITCH + 2 * k);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    float* c = sums[m][n];
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b[n].x), "r"(b[n].y));
                }
            }
        }
    }
    const float* of_w = (const float*)(w + p.n * pitch);
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row0 + 16 * m + g + 8 * i;
            if (r >= rows) continue;
            float* y = p.y.row(choice(r)) + n0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int c = col0 + 8 * n + q * 2 + e;
                    if (n0 + c >= p.n) continue;
                    y[c] = __fadd_rn(__fmul_rn(sums[m][n][2 * i + e], __ldg(of_w + n0 + c)), p.bias ? p.bias[n0 + c] : 0.0f);
                }
        }
}

KERNEL __launch_bounds__(256, 2) units_fp8(ARGS(Codes) p) {
    BEGIN();
    const Sorted none = {};
    by_units<false>(p, none);
}
KERNEL __launch_bounds__(256, 2) units_fp8_chosen(ARGS(Codes) p, ARGS(Sorted) s) {
    BEGIN();
    by_units<true>(p, s);
}

// Products with the experts that a router chose, on matrix units: rows and weights in BF16, sums in f32.

#include "common.cuh"
#include "experts.cuh"

// A tile: 128 choices of an expert by 128 outputs, 32 of K at a time. Eight warps take 64 by 32 each.
#define TILE 128
#define DEEP 32
#define STAGES 4
#define PITCH (DEEP + 8) // so that eight rows lie in different banks

__device__ __forceinline__ void load_four(u32* r, const u16* at) {
    u32 p = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}

// `x` holds the rows in BF16, K adjacent.
KERNEL __launch_bounds__(256, 2) expert_units(ARGS(ExpertProduct) p, ARGS(Sorted) s, const u16* x) {
    BEGIN();
    if ((int)blockIdx.y >= *s.count) return;
    extern __shared__ __align__(16) u16 memory[];
    u16 *xs = memory, *ws = memory + STAGES * TILE * PITCH;
    const int *t = s.tiles + 3 * blockIdx.y, first = t[1], rows = t[2];
    const u16* w = (const u16*)p.w[t[0]];
    const int n0 = blockIdx.x * TILE, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    // Of each stage this thread brings two chunks of two rows.
    const u16 *x_at[2], *w_at[2];
    bool x_in[2], w_in[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = tid / 4 + 64 * i;
        x_in[i] = r < rows, w_in[i] = n0 + r < p.n;
        x_at[i] = x + (i64)(s.order[first + (x_in[i] ? r : 0)] / p.x_div) * p.k;
        w_at[i] = w + (i64)(w_in[i] ? n0 + r : 0) * p.k;
    }
    auto stage = [&](int k0, int to) {
        const int c = tid % 4 * 8;
        const bool in = k0 + c < p.k;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int put = (to * TILE + tid / 4 + 64 * i) * PITCH + c;
            copy16(xs + put, x_at[i] + (in ? k0 + c : 0), in && x_in[i]);
            copy16(ws + put, w_at[i] + (in ? k0 + c : 0), in && w_in[i]);
        }
        copies_done();
    };
    float sums[4][4][4] = {};
    const int steps = (p.k + DEEP - 1) / DEEP, row0 = warp / 4 * 64, col0 = warp % 4 * 32;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) stage(i * DEEP, i);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        stage((i + STAGES - 1) * DEEP, (i + STAGES - 1) % STAGES);
        const u16 *a0 = xs + i % STAGES * TILE * PITCH, *b0 = ws + i % STAGES * TILE * PITCH;
#pragma unroll
        for (int k = 0; k < DEEP; k += 16) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; m++) load_four(a[m], a0 + (row0 + 16 * m + lane % 16) * PITCH + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_four(b[n], b0 + (col0 + 16 * n + lane / 16 * 8 + lane % 8) * PITCH + k + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    float* c = sums[m][n];
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a[m][0]), "r"(a[m][1]), "r"(a[m][2]), "r"(a[m][3]), "r"(b[n / 2][n % 2 * 2]), "r"(b[n / 2][n % 2 * 2 + 1]));
                }
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = row0 + 16 * m + lane / 4 + 8 * i;
            if (r >= rows) continue;
            float* y = p.y.row(s.order[first + r]) + n0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int c = col0 + 8 * n + lane % 4 * 2 + e;
                    if (n0 + c < p.n) y[c] = sums[m][n][2 * i + e];
                }
        }
}

// What products with weights share: y = round(x) · Wᵀ in f32, for single rows, whose speed is that of
// memory, and in tiles for whatever the matrix units do not take.

// Sixteen bytes of weights, as floats.
template <int TYPE>
struct Chunk;
template <>
struct Chunk<BF16> {
    static const int SIZE = 8;
    static __device__ __forceinline__ void widen(uint4 q, float* w) {
        w[0] = low_bf16(q.x), w[1] = high_bf16(q.x), w[2] = low_bf16(q.y), w[3] = high_bf16(q.y);
        w[4] = low_bf16(q.z), w[5] = high_bf16(q.z), w[6] = low_bf16(q.w), w[7] = high_bf16(q.w);
    }
};
template <>
struct Chunk<F16> {
    static const int SIZE = 8;
    static __device__ __forceinline__ void widen(uint4 q, float* w) {
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) w[2 * i] = from_f16((u16)words[i]), w[2 * i + 1] = from_f16((u16)(words[i] >> 16));
    }
};
template <>
struct Chunk<F32> {
    static const int SIZE = 4;
    static __device__ __forceinline__ void widen(uint4 q, float* w) {
        w[0] = __uint_as_float(q.x), w[1] = __uint_as_float(q.y);
        w[2] = __uint_as_float(q.z), w[3] = __uint_as_float(q.w);
    }
};

// A part of one row of x, from chunk `first` on in steps of `step`, with R neighbouring rows of w.
template <int TYPE, int R>
__device__ __forceinline__ void dot(const float* x, const uint4* w, int chunks, int first, int step, bool round, float* sum) {
    const int SIZE = Chunk<TYPE>::SIZE;
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0.0f;
#pragma unroll 4
    for (int i = first; i < chunks; i += step) {
        uint4 q[R];
#pragma unroll
        for (int r = 0; r < R; r++) q[r] = __ldg(w + (i64)r * chunks + i);
#pragma unroll
        for (int j = 0; j < SIZE; j += 4) {
            float4 a = *(const float4*)(x + i * SIZE + j);
            if (round) {
                u32 low = pack_bf16(a.x, a.y), high = pack_bf16(a.z, a.w);
                a = make_float4(low_bf16(low), high_bf16(low), low_bf16(high), high_bf16(high));
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                float v[SIZE];
                Chunk<TYPE>::widen(q[r], v);
                sum[r] = fmaf(a.x, v[j], sum[r]);
                sum[r] = fmaf(a.y, v[j + 1], sum[r]);
                sum[r] = fmaf(a.z, v[j + 2], sum[r]);
                sum[r] = fmaf(a.w, v[j + 3], sum[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
}

// A tile of 64 rows by 64 outputs; each output is one chain over K. `order` lists the rows of y, or is
// null for all; `x_div` rows of y share a row of x.
#define TILE 64
#define DEEP 16
template <int TYPE>
__device__ __forceinline__ void tile(In x, const void* w, const float* bias, Out y, const int* order, int first,
                                     int rows, int k, int n, int x_div, bool round) {
    __shared__ float xs[DEEP][TILE + 4], ws[DEEP][TILE + 4];
    const int n0 = blockIdx.x * TILE, tid = threadIdx.x;
    const int tx = tid % 16, ty = tid / 16;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += DEEP) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = tid + 256 * i, d = at % DEEP, r = at / DEEP;
            bool in = k0 + d < k;
            float a = 0.0f, b = 0.0f;
            if (in && r < rows) {
                int row = order ? order[first + r] : first + r;
                a = x.row(row / x_div)[k0 + d];
            }
            if (in && n0 + r < n) b = load(w, (i64)(n0 + r) * k + k0 + d, TYPE);
            xs[d][r] = round ? round_bf16(a) : a;
            ws[d][r] = b;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEEP; d++) {
            float4 a = *(const float4*)&xs[d][ty * 4], b = *(const float4*)&ws[d][tx * 4];
            float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(av[i], bv[j], sum[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        if (r >= rows) continue;
        float* to = y.row(order ? order[first + r] : first + r);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int c = n0 + tx * 4 + j;
            if (c < n) to[c] = sum[i][j] + (bias ? bias[c] : 0.0f);
        }
    }
}

// Elementwise operations, lookups, conversions and draws. A block takes 1,024 columns of one row.

#include "common.cuh"

KERNEL __launch_bounds__(256) add(In a, In b, Out y, int cols, int wide) {
    BEGIN();
    const float *p = a.row(blockIdx.x), *q = b.row(blockIdx.x);
    float* to = y.row(blockIdx.x);
    if (wide) {
        int c = blockIdx.y * COLUMNS + 4 * threadIdx.x;
        if (c >= cols) return;
        float4 u = *(const float4*)(p + c), v = *(const float4*)(q + c);
        *(float4*)(to + c) = make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w);
        return;
    }
    FOR_COLUMNS(c, cols) to[c] = p[c] + q[c];
}

KERNEL __launch_bounds__(256) scale(In x, float by, Out y, int cols) {
    BEGIN();
    const float* from = x.row(blockIdx.x);
    float* to = y.row(blockIdx.x);
    FOR_COLUMNS(c, cols) to[c] = from[c] * by;
}

// y = act(gate) · x, or act(x) where gate.p is null.
KERNEL __launch_bounds__(256) activate(In x, In gate, int act, Out y, int cols, int wide) {
    BEGIN();
    const float* from = x.row(blockIdx.x);
    float* to = y.row(blockIdx.x);
    const float* g = gate.p ? gate.row(blockIdx.x) : nullptr;
    if (wide) {
        int c = blockIdx.y * COLUMNS + 4 * threadIdx.x;
        if (c >= cols) return;
        float4 u = *(const float4*)(from + c), r;
        if (g) {
            float4 v = *(const float4*)(g + c);
            r = make_float4(activation(v.x, act) * u.x, activation(v.y, act) * u.y,
                            activation(v.z, act) * u.z, activation(v.w, act) * u.w);
        } else {
            r = make_float4(activation(u.x, act), activation(u.y, act), activation(u.z, act),
                            activation(u.w, act));
        }
        *(float4*)(to + c) = r;
        return;
    }
    FOR_COLUMNS(c, cols) to[c] = g ? activation(g[c], act) * from[c] : activation(from[c], act);
}

// y[t] += bias.
KERNEL __launch_bounds__(256) add_bias(const float* bias, Out y, int cols) {
    BEGIN();
    float* to = y.row(blockIdx.x);
    FOR_COLUMNS(c, cols) to[c] += bias[c];
}

KERNEL __launch_bounds__(256) embed(const u32* ids, const void* table, i64 stride, int type, Out y, int cols) {
    BEGIN();
    i64 from = ids[blockIdx.x] * stride;
    float* to = y.row(blockIdx.x);
    FOR_COLUMNS(c, cols) to[c] = load(table, from + c, type);
}

KERNEL __launch_bounds__(256) gather(In x, const u32* rows, Out y, int cols) {
    BEGIN();
    const float* from = x.row(rows[blockIdx.x]);
    float* to = y.row(blockIdx.x);
    FOR_COLUMNS(c, cols) to[c] = from[c];
}

// y[t] = Σⱼ weights[t, j] · x[t·k + j], in order of j.
KERNEL __launch_bounds__(256) combine(In x, In weights, int choices, Out y, int cols) {
    BEGIN();
    const float* w = weights.row(blockIdx.x);
    float* to = y.row(blockIdx.x);
    FOR_COLUMNS(c, cols) {
        float sum = 0.0f;
        for (int j = 0; j < choices; j++) sum = fmaf(w[j], x.row((i64)blockIdx.x * choices + j)[c], sum);
        to[c] = sum;
    }
}

// Between types and strides.
KERNEL __launch_bounds__(256)
convert(const void* from, i64 from_stride, int from_type, void* to, i64 to_stride, int to_type, int cols) {
    BEGIN();
    i64 source = blockIdx.x * from_stride, target = blockIdx.x * to_stride;
    FOR_COLUMNS(c, cols) store(to, target + c, to_type, load(from, source + c, from_type));
}

// Rows of f32 as rows of bf16, for matrix units. `pitch` is even and at least cols; what lies
// between is zeroed.
KERNEL __launch_bounds__(256) round_rows(In x, u16* to, int pitch, int cols, int wide) {
    BEGIN();
    const float* from = x.row(blockIdx.x);
    u32* out = (u32*)(to + (i64)blockIdx.x * pitch);
    if (wide) {
        int c = blockIdx.y * COLUMNS + 4 * threadIdx.x;
        if (c >= cols) return;
        float4 u = *(const float4*)(from + c);
        *(uint2*)(out + c / 2) = make_uint2(pack_bf16(u.x, u.y), pack_bf16(u.z, u.w));
        return;
    }
    int end = min(pitch, (int)(blockIdx.y + 1) * COLUMNS);
    for (int c = blockIdx.y * COLUMNS + 2 * threadIdx.x; c < end; c += 512) {
        float low = c < cols ? from[c] : 0.0f, high = c + 1 < cols ? from[c + 1] : 0.0f;
        out[c / 2] = pack_bf16(low, high);
    }
}

__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The draws of random.rs: element (r, c) depends on seed, r and c only.
KERNEL __launch_bounds__(256) fill_normal(void* to, i64 stride, int type, u64 seed, float by, i64 cols) {
    BEGIN();
    u64 start = mix(seed ^ mix((u64)blockIdx.x ^ 0x9e3779b97f4a7c15ull));
    for (i64 c = (i64)blockIdx.y * 256 + threadIdx.x; c < cols; c += (i64)gridDim.y * 256) {
        u64 bits = mix(start + (u64)c * 0x9e3779b97f4a7c15ull);
        u32 sum = (u32)(bits & 0xffff) + (u32)((bits >> 16) & 0xffff) + (u32)((bits >> 32) & 0xffff) + (u32)(bits >> 48);
        store(to, blockIdx.x * stride + c, type, __fmul_rn(__fsub_rn((float)sum, 131070.0f), by));
    }
}

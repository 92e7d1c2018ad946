// E4M3 codes, widened: every one is a half, and a BF16 number, exactly.

// Two codes as halves. Before there was an instruction for it, by their bits: in the place of a half's they are 2^-8 of
// themselves, but for NaN.
__device__ __forceinline__ u32 halves_of(u32 two) {
    u32 r;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)two));
#else
    const u32 high = __byte_perm(two, 0, 0x1404), size = high & 0x7f007f00u;
    const u32 nan = (size + 0x01000100u) & 0x80008000u;
    const u32 bits = (high & 0x80008000u) | size >> 1 | nan >> 1;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(bits), "r"(0x5c005c00u));
#endif
    return r;
}

// Four codes, the first in the lowest byte.
__device__ __forceinline__ void widen_four(u32 codes, float* v) {
    const u32 a = halves_of(codes & 0xffffu), b = halves_of(codes >> 16);
    v[0] = from_f16((u16)a), v[1] = from_f16((u16)(a >> 16));
    v[2] = from_f16((u16)b), v[3] = from_f16((u16)(b >> 16));
}

// The same in BF16.
__device__ __forceinline__ uint2 bf16_of_four(u32 codes) {
    float v[4];
    widen_four(codes, v);
    auto pair = [](float low, float high) { return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632); };
    return make_uint2(pair(v[0], v[1]), pair(v[2], v[3]));
}

// The products of sixteen codes with as many BF16 numbers, added in order.
__device__ __forceinline__ float add_sixteen(const uint4& codes, const uint4& x0, const uint4& x1, float sum) {
    const u32 c[4] = {codes.x, codes.y, codes.z, codes.w}, x[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float v[4];
        widen_four(c[i], v);
        sum = fmaf(low_bf16(x[2 * i]), v[0], sum), sum = fmaf(high_bf16(x[2 * i]), v[1], sum);
        sum = fmaf(low_bf16(x[2 * i + 1]), v[2], sum), sum = fmaf(high_bf16(x[2 * i + 1]), v[3], sum);
    }
    return sum;
}

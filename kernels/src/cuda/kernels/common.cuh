// What all kernels share. No header of the toolkit is needed: NVRTC has none.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Element types, numbered as in launch.rs.
enum Type { F32 = 0, F16 = 1, BF16 = 2, I32 = 3, U8 = 4 };

#define FULL 0xffffffffu
#define KERNEL extern "C" __global__ void
// The beginning of every kernel. From Hopper on a kernel is started while the one before it still runs:
// it lets its own successor start, and waits until all of its predecessor's results are there. Only what
// no kernel writes may be read before, which is weights and the lists that the host sends: they are there before the
// kernel ahead of it begins. Others may be asked to come nearer, which reads nothing.
#if __CUDA_ARCH__ >= 900
#define BEGIN() asm volatile("griddepcontrol.launch_dependents;\n griddepcontrol.wait;" ::: "memory")
#else
#define BEGIN()
#endif
// Asks for a line of memory to be in the second-level cache, where all writes are seen.
__device__ __forceinline__ void come_near(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// A structure of arguments, as launch.rs lays it out.
#define ARGS(T) const __grid_constant__ T

// Rows of a tensor: `stride` elements from row to row.
template <class T>
struct Rows {
    T* p;
    i64 stride;
    __device__ __forceinline__ T* row(i64 r) const { return p + r * stride; }
};
typedef Rows<const float> In;
typedef Rows<float> Out;

// One sequence's rows in a batch, as lists.rs writes it.
struct Span {
    int start, len, position, slot;
    int pages, unused[3];
};

__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
// The two halves of a word.
__device__ __forceinline__ float low_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(u32 x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ u16 to_bf16(float x) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float from_f16(u16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}
__device__ __forceinline__ u16 to_f16(float x) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float round_bf16(float x) { return from_bf16(to_bf16(x)); }

// Element `i`, widened.
__device__ __forceinline__ float load(const void* p, i64 i, int type) {
    switch (type) {
        case F32: return ((const float*)p)[i];
        case F16: return from_f16(((const u16*)p)[i]);
        case BF16: return from_bf16(((const u16*)p)[i]);
        case U8: return (float)((const u8*)p)[i];
        default: return (float)((const int*)p)[i];
    }
}

// Element `i`, rounded to nearest even; whole numbers are cut.
__device__ __forceinline__ void store(void* p, i64 i, int type, float x) {
    switch (type) {
        case F32: ((float*)p)[i] = x; break;
        case F16: ((u16*)p)[i] = to_f16(x); break;
        case BF16: ((u16*)p)[i] = to_bf16(x); break;
        case U8: ((u8*)p)[i] = (u8)fminf(fmaxf(x, 0.0f), 255.0f); break;
        default: ((int*)p)[i] = (int)x;
    }
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
#define LOG2E 1.4426950408889634f

// Within two units of the last place.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-x * LOG2E)); }
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + exp2_fast(-x * LOG2E)); }
// ln(1 + eˣ) within some 2^-19 of it: by a series where eˣ is small.
__device__ __forceinline__ float softplus(float x) {
    const float e = exp2_fast(fminf(x, 20.0f) * LOG2E);
    float series = fmaf(e, fmaf(e, 0.14285715f, -0.16666667f), 0.2f), y;
    series = fmaf(e, fmaf(e, fmaf(e, series, -0.25f), 0.33333334f), -0.5f);
    series = e * fmaf(e, series, 1.0f);
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
    y = e < 0.125f ? series : y * 0.69314718f;
    return x > 20.0f ? x : y;
}

// The functions of `Activation`, in its order.
__device__ __forceinline__ float activation(float x, int act) {
    switch (act) {
        case 0: return silu(x);
        case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case 2: return 0.5f * x * (1.0f + tanhf(0.7978846f * (x + 0.044715f * x * x * x)));
        case 3: return fmaxf(x, 0.0f);
        case 4: { float r = fmaxf(x, 0.0f); return r * r; }
        case 5: return sigmoid(x);
        default: return x;
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
    return x;
}

// The sum over the first `threads` threads of a block, whole warps, for all of them; others have left.
// `room` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* room, int threads) {
    x = warp_sum(x);
    int warps = threads >> 5;
    if (warps == 1) return x;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    x = (threadIdx.x & 31) < warps ? room[threadIdx.x & 31] : 0.0f;
    return warp_sum(x);
}
__device__ __forceinline__ float block_sum(float x, float* room) { return block_sum(x, room, blockDim.x); }

// Copies to shared memory that go on behind the kernel's back; `ok` false writes zeros.
__device__ __forceinline__ void copy4(float* to, const float* from, bool ok) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int size = ok ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool ok) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int size = ok ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four neighbours of a row of `cols`, from column `c` on, to shared memory; zeros beyond the row.
__device__ __forceinline__ void copy_four(float* to, const float* row, int c, int cols, bool ok, bool wide) {
    if (wide) {
        bool in = ok && c < cols;
        copy16(to, in ? row + c : row, in);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            bool in = ok && c + e < cols;
            copy4(to + e, in ? row + c + e : row, in);
        }
    }
}
__device__ __forceinline__ bool is_wide(const float* p, i64 stride, int cols) {
    return (((u64)p & 15) | (u64)(stride & 3) | (u64)(cols & 3)) == 0;
}

// Of elementwise kernels: a block takes 1,024 columns of one row.
#define COLUMNS 1024

// Columns of a row that this thread takes: four neighbours where rows are aligned, else every 256th.
#define FOR_COLUMNS(c, cols) \
    for (int c = blockIdx.y * COLUMNS + threadIdx.x, c##_end = min((int)(cols), (int)(blockIdx.y + 1) * COLUMNS); c < c##_end; c += 256)

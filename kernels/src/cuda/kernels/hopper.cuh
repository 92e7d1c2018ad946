// Matrix units of Hopper (sm_90a): a warpgroup of 128 threads multiplies 64 rows by N columns, 16 deep, while
// it goes on. A comes from registers or shared memory, B from shared memory, sums are f32 in registers: thread
// `lane` of warp w has in d[4j + 2i + e] row 16w + lane / 4 + 8i, column 8j + lane % 4 * 2 + e. As A, registers
// a[2h + i] have of the same row the pairs of columns 8h + lane % 4 * 2, so that sums can be packed into A.
//
// Tiles lie in panels of 64 BF16 columns: rows of 128 bytes, whose eight chunks of 16 stand at (chunk ^ row % 8).
// Panels begin at multiples of 1,024 bytes.

#define PANEL 64

// Where column `c`, a multiple of eight, of row `r` stands in a tile whose panels are `rows` long, in bytes.
__device__ __forceinline__ int place_in_tile(int r, int c, int rows) {
    return c / PANEL * rows * 128 + r * 128 + ((c / 8 % 8) ^ (r & 7)) * 16;
}

// A tile as an operand. Where it is multiplied along its rows, `leading` means nothing; across them it is the
// distance of panels.
__device__ __forceinline__ u64 operand(const void* at, int leading) {
    u64 p = __cvta_generic_to_shared(at);
    return (p & 0x3ffff) >> 4 | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// How much more an operand is that begins so many bytes further on.
__device__ __forceinline__ u64 further(int bytes) { return (u64)(bytes >> 4); }

// Before the first product, and after registers were written that one uses.
__device__ __forceinline__ void units_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void units_go() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void units_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from moving what is done with sums to the other side of a wait.
template <int N>
__device__ __forceinline__ void settle(float* d) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// Shared memory that threads wrote is about to be read by the units.
__device__ __forceinline__ void for_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d = a · b, added to d where `add` is not zero. From registers `a` has 64 rows, b is multiplied along its rows,
// or across them: (16, N) with N adjacent.
template <int N>
struct Units;
template <>
struct Units<16> {
    template <bool ACROSS>
    static __device__ __forceinline__ void registers(float* d, const u32* a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7"
        "}, {%8,%9,%10,%11}, %12, p, 1, 1, %14;\n}"
        : EIGHT(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS ? 1 : 0));
    }
    static __device__ __forceinline__ void shared(float* d, u64 a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7"
        "}, %8, %9, p, 1, 1, 0, 0;\n}"
        : EIGHT(d, 0)
        : "l"(a), "l"(b), "r"(add));
    }
};
template <>
struct Units<32> {
    template <bool ACROSS>
    static __device__ __forceinline__ void registers(float* d, const u32* a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
        "}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;\n}"
        : EIGHT(d, 0), EIGHT(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS ? 1 : 0));
    }
    static __device__ __forceinline__ void shared(float* d, u64 a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
        "}, %16, %17, p, 1, 1, 0, 0;\n}"
        : EIGHT(d, 0), EIGHT(d, 8)
        : "l"(a), "l"(b), "r"(add));
    }
};
template <>
struct Units<64> {
    template <bool ACROSS>
    static __device__ __forceinline__ void registers(float* d, const u32* a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS ? 1 : 0));
    }
    static __device__ __forceinline__ void shared(float* d, u64 a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, %32, %33, p, 1, 1, 0, 0;\n}"
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
        : "l"(a), "l"(b), "r"(add));
    }
};
template <>
struct Units<128> {
    template <bool ACROSS>
    static __device__ __forceinline__ void registers(float* d, const u32* a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS ? 1 : 0));
    }
    static __device__ __forceinline__ void shared(float* d, u64 a, u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)
        : "l"(a), "l"(b), "r"(add));
    }
};

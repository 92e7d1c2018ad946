// Products with weights in blocks of 32, and how the blocks of any format are laid out.

#include "blocks.cuh"

OF_FORMAT(Q8_0, q8_0)
OF_FORMAT(Q4_0, q4_0)
OF_FORMAT(IQ4_NL, iq4_nl)

KERNEL __launch_bounds__(256) round_blocks_32(In x, void* to, int type, int k, int wide) { BEGIN(); round_rows<32>(x, to, type, k, wide); }

struct Arrange {
    const u8* from;
    u8* to;
    i64 first, count, blocks; // blocks of this part, and of the matrix
    int bytes;
    int offset[4], size[4]; // of each field; none has a size of zero
};

// Blocks as files have them, to fields one after the other.
KERNEL __launch_bounds__(256) arrange(ARGS(Arrange) p) {
    BEGIN();
    i64 total = p.count * p.bytes;
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < total; i += (i64)gridDim.x * 256) {
        i64 block = i / p.bytes;
        int at = (int)(i - block * p.bytes);
        i64 before = 0;
#pragma unroll
        for (int f = 0; f < 4; f++) {
            int in = at - p.offset[f];
            if (in >= 0 && in < p.size[f]) p.to[before * p.blocks + (p.first + block) * p.size[f] + in] = p.from[i];
            before += p.size[f];
        }
    }
}

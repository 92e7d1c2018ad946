// Products with weights in blocks of 256.

#include "blocks.cuh"

OF_FORMAT(Q6_K, q6_k)
OF_FORMAT(Q5_K, q5_k)
OF_FORMAT(Q4_K, q4_k)

KERNEL __launch_bounds__(256) round_blocks_256(In x, void* to, int type, int k, int wide) { BEGIN(); round_rows<256>(x, to, type, k, wide); }

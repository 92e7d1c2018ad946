// Products with weights in blocks of 256 of the coarser kinds.

#include "blocks.cuh"

OF_FORMAT(IQ4_XS, iq4_xs)
OF_FORMAT(Q3_K, q3_k)
OF_FORMAT(Q2_K, q2_k)

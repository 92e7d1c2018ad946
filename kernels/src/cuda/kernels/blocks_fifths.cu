// Products with weights in blocks of 32 that have minima, or codes of five bits.

#include "blocks.cuh"

OF_FORMAT(Q5_1, q5_1)
OF_FORMAT(Q5_0, q5_0)
OF_FORMAT(Q4_1, q4_1)

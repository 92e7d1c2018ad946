// Norms of rows, or of equal parts of them. A block takes one part; how many threads it has depends on
// the width alone, and so does the order of the sums.

#include "common.cuh"
#include "norm.cuh"

// By the first `step` threads of the block.
__device__ __forceinline__ void rms(const Norm& n, int step) {
    __shared__ float room[32];
    const int first = blockIdx.y * n.width, tid = threadIdx.x;
    const float* x = n.x.row(blockIdx.x) + first;
    float* y = n.y.row(blockIdx.x) + first;
    const float* weight = n.weight ? n.weight + (n.weight_cols == n.width ? 0 : first) : nullptr;
    // What fits stays in registers, and is asked for all at once.
    const int HELD = 8;
    float v[HELD], w[HELD], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = tid + k * step;
        v[k] = i < n.width ? x[i] : 0.0f;
        w[k] = weight && i < n.width ? weight[i] : 1.0f;
    }
#pragma unroll
    for (int k = 0; k < HELD; k++) sum = fmaf(v[k], v[k], sum);
    for (int i = tid + HELD * step; i < n.width; i += step) sum = fmaf(x[i], x[i], sum);
    float by = 1.0f / sqrtf(block_sum(sum, room, step) / n.width + n.eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = tid + k * step;
        if (i < n.width) y[i] = v[k] * by * w[k];
    }
    for (int i = tid + HELD * step; i < n.width; i += step) y[i] = x[i] * by * (weight ? weight[i] : 1.0f);
}

KERNEL __launch_bounds__(512) rms_norm(ARGS(Norm) n) {
    BEGIN();
    rms(n, blockDim.x);
}

// Several norms that do not read each other's results.
struct Norms {
    Norm norms[4];
    int threads[4];
};

KERNEL __launch_bounds__(512) rms_norms(ARGS(Norms) p) {
    BEGIN();
    const int threads = p.threads[blockIdx.z];
    if (threadIdx.x < threads) rms(p.norms[blockIdx.z], threads);
}

KERNEL __launch_bounds__(512) layer_norm(ARGS(Norm) n) {
    BEGIN();
    __shared__ float room[32];
    const int first = blockIdx.y * n.width;
    const float* x = n.x.row(blockIdx.x) + first;
    float* y = n.y.row(blockIdx.x) + first;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n.width; i += blockDim.x) sum += x[i];
    float mean = block_sum(sum, room) / n.width;
    sum = 0.0f;
    for (int i = threadIdx.x; i < n.width; i += blockDim.x) sum = fmaf(x[i] - mean, x[i] - mean, sum);
    float by = 1.0f / sqrtf(block_sum(sum, room) / n.width + n.eps);
    const float* weight = n.weight ? n.weight + (n.weight_cols == n.width ? 0 : first) : nullptr;
    const float* bias = n.bias ? n.bias + (n.bias_cols == n.width ? 0 : first) : nullptr;
    for (int i = threadIdx.x; i < n.width; i += blockDim.x)
        y[i] = (x[i] - mean) * by * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

// What may be done in the same kernel before and after a product of one row, while a step is recorded: the
// same bits as by kernels of its own, so sums are in their order.

// A norm whose result is the row: every block does it again, and the first one writes it.
struct RowNorm {
    In x;
    const float* weight; // may be null
    Out y;
    float eps;
    int width;
    int threads; // of the norm's own kernel, which are the order of its sum; 0 where there is no norm
};

// A step of a convolution with four taps, of `cols` outputs from `first` on.
struct RowConv {
    In w;
    const float* bias;
    float* state;
    i64 state_stride;
    Out y; // null where there is none
    const Span* spans;
    int first, cols, act;
};

// A norm's weights come to shared memory while the kernel before still runs, its row once that is done: both are then
// behind each other in `room`, all of them asked for at once.
template <int THREADS>
__device__ __forceinline__ void norm_weights(const RowNorm& n, float* room) {
    if (!n.threads || !n.weight) return;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < n.width; i += THREADS * 4) copy16(room + n.width + i, n.weight + i, true);
}
template <int THREADS>
__device__ __forceinline__ void norm_row(const RowNorm& n, float* room) {
    if (!n.threads) return;
    const float* x = n.x.row(0);
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < n.width; i += THREADS * 4) copy16(room + i, x + i, true);
    copies_done();
}

// Waits for both, but not for the copies that follow as one more group; what the elements of the row are times beside their weights. All of a block's THREADS take part.
template <int THREADS>
__device__ __forceinline__ float norm_by(const RowNorm& n, const float* room) {
    __shared__ float parts[16];
    const int lane = threadIdx.x % 32;
    wait_copies<1>();
    __syncthreads();
#pragma unroll 1
    for (int v = threadIdx.x; v < n.threads; v += THREADS) {
        float sum = 0.0f;
#pragma unroll 1
        for (int i = v; i < n.width; i += n.threads) sum = fmaf(room[i], room[i], sum);
        sum = warp_sum(sum);
        if (lane == 0) parts[v / 32] = sum;
    }
    __syncthreads();
    const float sum = warp_sum(lane < n.threads / 32 ? parts[lane] : 0.0f);
    return 1.0f / sqrtf(sum / n.width + n.eps);
}

// Two neighbours of the norm's result.
__device__ __forceinline__ float2 norm_two(const RowNorm& n, const float* room, int i, float by) {
    float2 v = ((const float2*)room)[i];
    v.x *= by, v.y *= by;
    if (n.weight) {
        const float2 w = ((const float2*)(room + n.width))[i];
        v.x *= w.x, v.y *= w.y;
    }
    if (blockIdx.x == 0) ((float2*)n.y.row(0))[i] = v;
    return v;
}

// Where item `i` of eight is that a convolution's channel takes beside its input: three inputs, four weights and
// the bias; null for a bias of zero.
__device__ __forceinline__ const float* conv_item(const RowConv& p, int i, int channel) {
    if (i < 3) return p.state + p.spans[0].slot * p.state_stride + (i64)i * p.cols + channel;
    if (i < 7) return p.w.row(i - 3) + channel;
    return p.bias ? p.bias + channel : nullptr;
}

// One channel, with those items and its input.
__device__ __forceinline__ void conv_step(const RowConv& p, int channel, const float* items, float e) {
    const float a = items[0], b = items[1], d = items[2];
    const float sum = fmaf(items[6], e, fmaf(items[5], d, fmaf(items[4], b, fmaf(items[3], a, 0.0f))));
    p.y.row(0)[channel] = activation(sum + items[7], p.act);
    float* past = p.state + p.spans[0].slot * p.state_stride + channel;
    past[0] = b, past[p.cols] = d, past[2 * (i64)p.cols] = e;
}

// What follows a product of one row in its kernel.

enum After { NOTHING = 0, ADD = 1, CONVOLVE = 2 };

// A step of a causal convolution with four taps, of `cols` neighbours of the outputs from `first` on.
struct Convolution {
    In w;
    const float* bias;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    int first, cols, act;
};

// What the channels of `count` outputs from `n0` on need beside them, eight numbers each, asked for early, while weights
// are on their way: three inputs before, four taps, a bias. All threads of a block are here.
#define WINDOW 8
// Before all results are there: inputs from before may come nearer.
__device__ __forceinline__ void near_windows(const Convolution& p, int n0, int count) {
    const float* state = p.state + p.spans[0].slot * p.state_stride;
    for (int i = threadIdx.x; i < 3 * count; i += blockDim.x) {
        const int c = n0 + i % count - p.first;
        if (c >= 0 && c < p.cols) come_near(state + (i64)(i / count) * p.cols + c);
    }
}
__device__ __forceinline__ void ask_windows(const Convolution& p, int n0, int count, float* to) {
    const float* state = p.state + p.spans[0].slot * p.state_stride;
    for (int i = threadIdx.x; i < WINDOW * count; i += blockDim.x) {
        const int e = i / count, c = n0 + i % count - p.first;
        const bool in = c >= 0 && c < p.cols && (e < 7 || p.bias);
        const float* from = e < 3 ? state + (i64)e * p.cols : e < 7 ? p.w.row(e - 3) : p.bias;
        copy4(to + i, in ? from + c : state, in);
    }
    copies_done();
}

// Output `n`, whose window is number `i` of `count`; in the order of `conv1d_step`.
__device__ __forceinline__ void convolve(const Convolution& p, const float* windows, int i, int count, int n, float x) {
    const int c = n - p.first;
    if (c < 0 || c >= p.cols) return;
    const float* v = windows + i;
    const float sum = fmaf(v[6 * count], x, fmaf(v[5 * count], v[2 * count], fmaf(v[4 * count], v[count], fmaf(v[3 * count], v[0], 0.0f))));
    const Span& span = p.spans[0];
    p.y.row(span.start)[c] = activation(sum + v[7 * count], p.act);
    float* state = p.state + span.slot * p.state_stride + c;
    state[0] = v[count], state[p.cols] = v[2 * count], state[2 * (i64)p.cols] = x;
}

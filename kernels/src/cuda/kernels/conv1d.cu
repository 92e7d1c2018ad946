// Causal depthwise convolution. A thread takes a channel.

#include "common.cuh"

struct Conv {
    In x, w;
    const float* bias;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    const int* span_of; // of each row
    int cols, taps, act, rows;
};

// Input `i` of the window that begins taps - 1 inputs before the span.
__device__ __forceinline__ float input(const Conv& p, const Span& s, const float* state, int i, int c) {
    return i < p.taps - 1 ? state[(i64)i * p.cols + c] : p.x.row(s.start + i - (p.taps - 1))[c];
}

__device__ __forceinline__ float output(const Conv& p, float sum, int c) {
    return activation(sum + (p.bias ? p.bias[c] : 0.0f), p.act);
}

// All rows of short spans, and their states: one thread a channel and span.
KERNEL __launch_bounds__(128, 8) conv1d_step(ARGS(Conv) p) {
    const int c = blockIdx.x * 128 + threadIdx.x;
    const Span s = p.spans[blockIdx.y];
    float* state = p.state + s.slot * p.state_stride;
    BEGIN();
    if (c >= p.cols) return;
    if (p.taps == 4 && s.len == 1) {
        // A step of generation: all is asked for at once.
        float* past = state + c;
        float a = past[0], b = past[p.cols], d = past[2 * (i64)p.cols], e = p.x.row(s.start)[c];
        float w0 = p.w.row(0)[c], w1 = p.w.row(1)[c], w2 = p.w.row(2)[c], w3 = p.w.row(3)[c];
        float sum = fmaf(w3, e, fmaf(w2, d, fmaf(w1, b, fmaf(w0, a, 0.0f))));
        p.y.row(s.start)[c] = output(p, sum, c);
        past[0] = b, past[p.cols] = d, past[2 * (i64)p.cols] = e;
        return;
    }
    for (int t = 0; t < s.len; t++) {
        float sum = 0.0f;
        for (int k = 0; k < p.taps; k++) sum = fmaf(p.w.row(k)[c], input(p, s, state, t + k, c), sum);
        p.y.row(s.start + t)[c] = output(p, sum, c);
    }
    for (int i = 0; i < p.taps - 1; i++) state[(i64)i * p.cols + c] = input(p, s, state, s.len + i, c);
}

// Sixteen rows of any spans; states are left alone.
#define ROWS 16
KERNEL __launch_bounds__(128, 8) conv1d_rows(ARGS(Conv) p) {
    BEGIN();
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= p.cols) return;
    int first = blockIdx.y * ROWS, end = min(first + ROWS, p.rows);
    if (p.taps == 4) {
        // The window moves through registers.
        float w0 = p.w.row(0)[c], w1 = p.w.row(1)[c], w2 = p.w.row(2)[c], w3 = p.w.row(3)[c];
        float a = 0.0f, b = 0.0f, d = 0.0f;
        int of = -1;
        Span s = {};
#pragma unroll 4
        for (int t = first; t < end; t++) {
            if (p.span_of[t] != of) {
                of = p.span_of[t];
                s = p.spans[of];
                const float* state = p.state + s.slot * p.state_stride;
                a = input(p, s, state, t - s.start, c);
                b = input(p, s, state, t - s.start + 1, c);
                d = input(p, s, state, t - s.start + 2, c);
            }
            float e = p.x.row(t)[c];
            float sum = fmaf(w3, e, fmaf(w2, d, fmaf(w1, b, fmaf(w0, a, 0.0f))));
            p.y.row(t)[c] = output(p, sum, c);
            a = b, b = d, d = e;
        }
        return;
    }
    for (int t = first; t < end; t++) {
        const Span s = p.spans[p.span_of[t]];
        const float* state = p.state + s.slot * p.state_stride;
        float sum = 0.0f;
        for (int k = 0; k < p.taps; k++) sum = fmaf(p.w.row(k)[c], input(p, s, state, t - s.start + k, c), sum);
        p.y.row(t)[c] = output(p, sum, c);
    }
}

// The last inputs of each span, for the next batch.
KERNEL __launch_bounds__(128, 8) conv1d_state(ARGS(Conv) p) {
    BEGIN();
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= p.cols) return;
    const Span s = p.spans[blockIdx.y];
    float* state = p.state + s.slot * p.state_stride;
    for (int i = 0; i < p.taps - 1; i++) state[(i64)i * p.cols + c] = input(p, s, state, s.len + i, c);
}

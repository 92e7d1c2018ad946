// The scan of S4D: a thread takes a channel of a sequence, with its states where they live.

#include "common.cuh"

struct S4dScan {
    In x, a_re, a_im, c_re, c_im;
    const float* d;
    float* state;
    i64 state_stride;
    Out y;
    const Span* spans;
    int inner, states;
};

KERNEL __launch_bounds__(64) s4d_scan(ARGS(S4dScan) p) {
    BEGIN();
    int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= p.inner) return;
    const Span s = p.spans[blockIdx.y];
    float* re = p.state + s.slot * p.state_stride + i;
    float* im = re + (i64)p.states * p.inner;
    for (int t = s.start; t < s.start + s.len; t++) {
        float x = p.x.row(t)[i], sum = 0.0f;
        for (int n = 0; n < p.states; n++) {
            i64 at = (i64)n * p.inner;
            float r = re[at], m = im[at], ar = p.a_re.row(n)[i], am = p.a_im.row(n)[i];
            float nr = fmaf(ar, r, fmaf(-am, m, x)), nm = fmaf(ar, m, am * r);
            re[at] = nr, im[at] = nm;
            sum = fmaf(p.c_re.row(n)[i], nr, fmaf(-p.c_im.row(n)[i], nm, sum));
        }
        p.y.row(t)[i] = fmaf(2.0f, sum, p.d[i] * x);
    }
}

// The scan of Mamba-3: a block takes a head of a sequence, token by token.

#include "common.cuh"

struct Mamba3Scan {
    In x, z, b, c, dt, a, trap, angle;
    const float *dt_bias, *b_bias, *c_bias, *d;
    const float *x_in, *z_in, *y_out; // null without a mimo
    const float* norm;                // null without one
    float eps, a_floor;
    int heads, groups, rank, width, states, pairs, softplus_decay;
    float *angle_state, *ssm_state, *b_state, *x_state;
    i64 angle_stride, ssm_stride, b_stride, x_stride;
    Out y;
    const Span* spans;
};

// Adds a bias to b or c of this head's group and turns it by the angles, into `to` (rank, N).
__device__ void rotated(const Mamba3Scan& p, const float* row, const float* bias, const float* theta, int head, float* to) {
    int group = head / (p.heads / p.groups), N = p.states;
    for (int i = threadIdx.x; i < p.rank * N; i += blockDim.x) {
        int r = i / N, n = i % N;
        const float* v = row + (r * p.groups + group) * N;
        const float* w = bias + (head * p.rank + r) * N;
        int k, other;
        float sign;
        if (p.x_in) {
            k = n < N / 2 ? n : n - N / 2;
            other = n < N / 2 ? n + N / 2 : n - N / 2;
            sign = n < N / 2 ? -1.0f : 1.0f;
        } else {
            k = n / 2;
            other = n ^ 1;
            sign = n % 2 ? 1.0f : -1.0f;
        }
        float own = v[n] + w[n];
        if (k < p.pairs) {
            float sine, cosine;
            sincosf(theta[k], &sine, &cosine);
            own = own * cosine + sign * (v[other] + w[other]) * sine;
        }
        to[i] = own;
    }
}

// Shared memory: B, C and B of the row before, (rank, N) each.
KERNEL __launch_bounds__(128, 2) mamba3_scan(ARGS(Mamba3Scan) p) {
    BEGIN();
    extern __shared__ float room[];
    __shared__ float sums[32];
    const int head = blockIdx.x, N = p.states, P = p.width, ranked = p.rank * N;
    const Span s = p.spans[blockIdx.y];
    float *b_now = room, *c_now = room + ranked, *b_before = room + 2 * ranked;
    float* theta = p.angle_state + s.slot * p.angle_stride + head * p.pairs;
    float* ssm = p.ssm_state + s.slot * p.ssm_stride + (i64)head * N * P;
    float* b_state = p.b_state + s.slot * p.b_stride + head * ranked;
    float* x_state = p.x_state + s.slot * p.x_stride + head * P;
    for (int i = threadIdx.x; i < ranked; i += blockDim.x) b_before[i] = b_state[i];
    for (int t = s.start; t < s.start + s.len; t++) {
        float delta = softplus(p.dt.row(t)[head] + p.dt_bias[head]), raw = p.a.row(t)[head];
        float rate = p.softplus_decay ? softplus(raw) : fmaxf(raw, 0.0f) + 1.0f / (1.0f - fminf(raw, 0.0f));
        float alpha = expf(-delta * fmaxf(rate, p.a_floor)), lambda = sigmoid(p.trap.row(t)[head]);
        float before = (1.0f - lambda) * delta * alpha, now = lambda * delta;
        for (int k = threadIdx.x; k < p.pairs; k += blockDim.x) {
            float sum = theta[k] + 3.14159265358979f * tanhf(p.angle.row(t)[k]) * delta;
            theta[k] = sum - 6.28318530717959f * floorf(sum / 6.28318530717959f);
        }
        __syncthreads();
        rotated(p, p.b.row(t), p.b_bias, theta, head, b_now);
        rotated(p, p.c.row(t), p.c_bias, theta, head, c_now);
        __syncthreads();
        const float *x = p.x.row(t) + head * P, *z = p.z.row(t) + head * P;
        for (int c = threadIdx.x; c < P; c += blockDim.x) {
            float x_before = x_state[c], x_now = x[c];
            for (int n = 0; n < N; n++) {
                float v = ssm[(i64)n * P + c] * alpha;
                for (int r = 0; r < p.rank; r++) {
                    float by = p.x_in ? p.x_in[(head * p.rank + r) * P + c] : 1.0f;
                    v += before * b_before[r * N + n] * x_before * by + now * b_now[r * N + n] * x_now * by;
                }
                ssm[(i64)n * P + c] = v;
            }
        }
        float* y = p.y.row(t) + head * P;
        for (int r = 0; r < p.rank; r++) {
            int first = (head * p.rank + r) * P;
            float square = 0.0f;
            auto out = [&](int c) {
                float sum = 0.0f;
                for (int n = 0; n < N; n++) sum = fmaf(c_now[r * N + n], ssm[(i64)n * P + c], sum);
                return sum + p.d[head] * x[c] * (p.x_in ? p.x_in[first + c] : 1.0f);
            };
            float by = 1.0f;
            if (p.norm) {
                for (int c = threadIdx.x; c < P; c += blockDim.x) {
                    float v = out(c);
                    square = fmaf(v, v, square);
                }
                by = 1.0f / sqrtf(block_sum(square, sums) / P + p.eps);
            }
            for (int c = threadIdx.x; c < P; c += blockDim.x) {
                float v = out(c) * by * (p.norm ? p.norm[head * P + c] : 1.0f);
                v *= silu(z[c] * (p.z_in ? p.z_in[first + c] : 1.0f)) * (p.y_out ? p.y_out[first + c] : 1.0f);
                y[c] = r ? y[c] + v : v;
            }
        }
        for (int c = threadIdx.x; c < P; c += blockDim.x) x_state[c] = x[c];
        __syncthreads();
        for (int i = threadIdx.x; i < ranked; i += blockDim.x) b_before[i] = b_now[i];
    }
    for (int i = threadIdx.x; i < ranked; i += blockDim.x) b_state[i] = b_before[i];
}

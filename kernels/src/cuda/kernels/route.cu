// A row's experts and their weights, by one warp. Room in shared memory: what experts are chosen by,
// and the scores of groups.

#include "common.cuh"

// Columns of a block of `likeliest`, where several share a row: a multiple of four.
#define LIKELIEST_COLUMNS 4096

struct Route {
    In logits;
    const float* bias;
    int* experts;
    i64 experts_stride;
    Out weights;
    int count, top_k, score, groups, top_groups, normalize;
    float scale;
};

enum Score { SOFTMAX = 0, SOFTMAX_TOP_K = 1, SIGMOID = 2 };
#define BARRED __int_as_float(0x7f800000)

// The place of the largest of a warp's values, of equal ones the first.
__device__ __forceinline__ int first_largest(float value, int place) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        float v = __shfl_xor_sync(FULL, value, o);
        int p = __shfl_xor_sync(FULL, place, o);
        if (v > value || (v == value && p < place)) value = v, place = p;
    }
    return place;
}

KERNEL __launch_bounds__(32) route(ARGS(Route) p) {
    BEGIN();
    extern __shared__ float by[];
    float* group = by + p.count;
    const int lane = threadIdx.x;
    const float* logits = p.logits.row(blockIdx.x);
    int* experts = p.experts + blockIdx.x * p.experts_stride;
    float* weights = p.weights.row(blockIdx.x);
    const float NONE = __int_as_float(0xff800000);

    float most = NONE;
    for (int e = lane; e < p.count; e += 32) most = fmaxf(most, logits[e]);
    most = warp_max(most);
    float sum = 0.0f;
    for (int e = lane; e < p.count; e += 32) sum += expf(logits[e] - most);
    sum = warp_sum(sum);

    bool scored = p.bias || p.groups;
    for (int e = lane; e < p.count; e += 32) {
        float v = logits[e];
        if (scored && p.score == SOFTMAX) v = expf(v - most) / sum;
        if (scored && p.score == SIGMOID) v = sigmoid(v);
        if (p.bias) v += p.bias[e];
        by[e] = v;
    }
    __syncwarp();
    int size = p.groups ? p.count / p.groups : p.count;
    if (p.groups) {
        for (int g = lane; g < p.groups; g += 32) {
            float first = NONE, second = NONE;
            for (int e = g * size; e < (g + 1) * size; e++) {
                if (by[e] > first) second = first, first = by[e];
                else if (by[e] > second) second = by[e];
            }
            group[g] = fminf(size == 1 ? first : first + second, 3.402823466e38f);
        }
        __syncwarp();
        // The worst are barred one by one: of equal ones the last.
        if (lane == 0) {
            for (int i = p.top_groups; i < p.groups; i++) {
                int worst = -1;
                for (int g = 0; g < p.groups; g++)
                    if (group[g] != BARRED && (worst < 0 || group[g] <= group[worst])) worst = g;
                if (worst >= 0) group[worst] = BARRED;
            }
        }
        __syncwarp();
    }
    for (int k = 0; k < p.top_k; k++) {
        float best = NONE;
        int place = p.count;
        for (int e = lane; e < p.count; e += 32) {
            bool barred = p.groups && group[e / size] == BARRED;
            for (int i = 0; i < k; i++) barred |= experts[i] == e;
            // What is no number counts as the least that can be chosen.
            float v = by[e] == by[e] ? by[e] : NONE;
            if (!barred && (place == p.count || v > best)) best = v, place = e;
        }
        place = first_largest(best, place);
        if (lane == 0) experts[k] = min(place, p.count - 1);
        __syncwarp();
    }
    if (p.score == SOFTMAX_TOP_K) {
        most = NONE, sum = 0.0f;
        for (int k = 0; k < p.top_k; k++) most = fmaxf(most, logits[experts[k]]);
        for (int k = 0; k < p.top_k; k++) sum += expf(logits[experts[k]] - most);
    }
    auto weight = [&](int k) {
        float v = logits[experts[k]];
        return p.score == SIGMOID ? sigmoid(v) : expf(v - most) / sum;
    };
    float total = 1.0f;
    if (p.normalize) {
        total = 0.0f;
        for (int k = 0; k < p.top_k; k++) total += weight(k);
        total += 1e-20f;
    }
    for (int k = lane; k < p.top_k; k += 32) weights[k] = weight(k) / total * p.scale;
}

// The largest of some columns and where it first stands, which is -1 where one is NaN.
struct Top {
    float value;
    int place;
};
__device__ __forceinline__ int likeliest_of(float top, int place) {
    return place < 0 || !(fabsf(top) < __uint_as_float(0x7f800000u)) ? -1 : place;
}

// y[t] = the first i with the largest x[t, i] · by; -1 where one is NaN or the largest is not finite. Where several blocks
// share a row, they leave their parts for `likeliest_parts`.
KERNEL __launch_bounds__(1024) likeliest(In x, float by, Rows<int> y, int cols, Top* parts) {
    BEGIN();
    __shared__ float tops[32];
    __shared__ int places[32];
    const float* from = x.row(blockIdx.x);
    const float lowest = __uint_as_float(0xff800000u);
    const int begin = blockIdx.y * LIKELIEST_COLUMNS, end = gridDim.y == 1 ? cols : min(cols, begin + LIKELIEST_COLUMNS);
    float top = lowest;
    int place = 0x7fffffff, nan = 0;
    // A thread's own come in order: only a larger one takes the place.
    auto look = [&](float v, int i) {
        v = __fmul_rn(v, by);
        nan |= v != v;
        if (v > top) top = v, place = i;
    };
    if (is_wide(from, 0, 0)) {
#pragma unroll 4
        for (int c = begin + 4 * threadIdx.x; c + 3 < end; c += 4096) {
            float4 v = *(const float4*)(from + c);
            look(v.x, c), look(v.y, c + 1), look(v.z, c + 2), look(v.w, c + 3);
        }
        int c = (end & ~3) + threadIdx.x;
        if (c < end) look(from[c], c);
    } else {
        for (int c = begin + threadIdx.x; c < end; c += 1024) look(from[c], c);
    }
    auto join = [&](float v, int i) {
        if (v > top || (v == top && i < place)) top = v, place = i;
    };
#pragma unroll
    for (int o = 16; o; o >>= 1) join(__shfl_xor_sync(FULL, top, o), __shfl_xor_sync(FULL, place, o));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, places[threadIdx.x / 32] = place;
    nan = __syncthreads_or(nan);
    if (threadIdx.x >= 32) return;
    top = tops[threadIdx.x], place = places[threadIdx.x];
#pragma unroll
    for (int o = 16; o; o >>= 1) join(__shfl_xor_sync(FULL, top, o), __shfl_xor_sync(FULL, place, o));
    if (threadIdx.x) return;
    if (nan) place = -1;
    if (gridDim.y == 1) y.row(blockIdx.x)[0] = likeliest_of(top, place);
    else parts[blockIdx.x * gridDim.y + blockIdx.y] = {top, place};
}

// The same from `count` parts of each row, in their order.
KERNEL __launch_bounds__(32) likeliest_parts(const Top* parts, int count, Rows<int> y) {
    BEGIN();
    float top = __uint_as_float(0xff800000u);
    int place = 0x7fffffff;
    bool nan = false;
    for (int i = threadIdx.x; i < count; i += 32) {
        const Top part = parts[blockIdx.x * count + i];
        nan |= part.place < 0;
        if (part.value > top || (part.value == top && part.place < place)) top = part.value, place = part.place;
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float v = __shfl_xor_sync(FULL, top, o);
        const int i = __shfl_xor_sync(FULL, place, o);
        if (v > top || (v == top && i < place)) top = v, place = i;
    }
    nan = __any_sync(FULL, nan);
    if (threadIdx.x == 0) y.row(blockIdx.x)[0] = likeliest_of(top, nan ? -1 : place);
}

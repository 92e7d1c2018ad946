// What the scans share. A block takes sixteen channels: four warps of four. Eight lanes share the
// states of a channel; each adds its part of eight tokens' outputs, and the parts are then summed so
// that each lane is left with one token's sum. The order of those sums is the same for every token, so
// that no cut of a sequence changes a bit.

#define CHANNELS 16

// Number of the state that a lane keeps in place `s` of S: neighbours in fours, so that eight lanes
// read 128 bytes at once.
template <int S>
__device__ __forceinline__ int state_of(int lane, int s) {
    return S < 4 ? lane * S + s : s / 4 * 32 + lane * 4 + s % 4;
}

// S numbers of a row in shared memory that belong to a lane.
template <int S>
__device__ __forceinline__ void take(const float* row, int lane, float* to) {
    if (S == 1) {
        to[0] = row[lane];
    } else if (S == 2) {
        float2 v = *(const float2*)(row + 2 * lane);
        to[0] = v.x, to[S - 1] = v.y;
    } else {
#pragma unroll
        for (int s = 0; s < S; s += 4) {
            float4 v = *(const float4*)(row + s * 8 + 4 * lane);
            to[s] = v.x, to[(s + 1) % S] = v.y, to[(s + 2) % S] = v.z, to[(s + 3) % S] = v.w;
        }
    }
}

// Sums eight values over eight lanes: lane j is left with value j.
__device__ __forceinline__ float sum_scattered(float* v, int lane) {
#pragma unroll
    for (int o = 4; o; o >>= 1) {
        bool up = lane & o;
#pragma unroll
        for (int i = 0; i < o; i++) {
            float give = up ? v[i] : v[i + o], keep = up ? v[i + o] : v[i];
            v[i] = keep + __shfl_xor_sync(FULL, give, o);
        }
    }
    return v[0];
}

// A step of generation: one token a sequence. A warp takes one of the eight parts of the states, a lane a
// channel, so that memory is read in whole lines; all is added in the order above.
#define STEP_CHANNELS 32
// From so many sequences on blocks wait for their turn, and their states need not be asked for before it.
#define MANY_SPANS 8

// The sum of a lane's eight parts.
__device__ __forceinline__ float eight_parts(const float (*parts)[STEP_CHANNELS], int lane) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = parts[i][lane];
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The eight parts of each channel's sum, for the warp that has part 0.
__device__ __forceinline__ float sum_parts(float part, int warp, int lane) {
    __shared__ float parts[8][STEP_CHANNELS];
    parts[warp][lane] = part;
    __syncthreads();
    return eight_parts(parts, lane);
}

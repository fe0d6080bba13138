// Generalised advantage estimation: Schulman et al. 2016, arXiv 1506.02438, equations 12 and 16.
//
// With X_t = γ V_t + γλ A_t for a token of the mask, and X_t = X_{t+1} for any other,
//     A_t = (r_t - V_t) + X_{t+1},   X_t = [γ V_t + γλ (r_t - V_t)] + γλ X_{t+1},   X_T = γ bootstrap,
// so a stretch of tokens maps the X behind it to the X before it by a straight line, a token outside the mask by the
// identity, and lines compose: a scan (Blelloch 1990, "Prefix sums and their applications", section 1.4). In float64.
//
// A warp takes a tile of 32 lanes times LANE_TOKENS tokens, CHUNK_TILES tiles make a chunk. Many rows: a warp runs
// through its row, chunk after chunk. Few long rows: all chunks' lines first, then the X behind every chunk, then the
// chunks. Both add up in the same order, so the bits do not depend on the number of rows.
#include "device.cuh"
#include "kernels.h"

namespace rlhf {
namespace {

constexpr int LANE_TOKENS = 4;
constexpr int TILE = WARP * LANE_TOKENS;
constexpr int CHUNK_TILES = 16;
constexpr int64_t CHUNK = TILE * CHUNK_TILES;
constexpr int64_t MANY_ROWS = 1024;  // enough warps to keep a GPU busy
constexpr int WARPS_A_BLOCK = 2;
// Blocks that a multiprocessor can hold: at most 64 or 128 registers a thread.
template <bool ALIGNED>
constexpr int BLOCKS = ALIGNED ? 16 : 8;

// X before = add + by * (X behind).
struct line {
    double add, by;
};

__device__ inline line identity() { return {0.0, 1.0}; }
__device__ inline double through(line stretch, double behind) { return fma(stretch.by, behind, stretch.add); }
// Of two neighbouring stretches.
__device__ inline line joined(line before, line behind) { return {through(before, behind.add), before.by * behind.by}; }

__device__ inline line of_token(double reward, double value, double gamma, double decay) {
    return {fma(gamma, value, decay * (reward - value)), decay};
}

__device__ inline line from_lane(line x, int lane) {
    return {__shfl_sync(ALL_LANES, x.add, lane), __shfl_sync(ALL_LANES, x.by, lane)};
}

// Of the lanes behind this one.
__device__ inline line behind_lane(line own, int lane, line& whole_tile) {
    line from_here = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        line next = {__shfl_down_sync(ALL_LANES, from_here.add, step), __shfl_down_sync(ALL_LANES, from_here.by, step)};
        if (lane + step < WARP) from_here = joined(from_here, next);
    }
    whole_tile = from_lane(from_here, 0);
    line next = {__shfl_down_sync(ALL_LANES, from_here.add, 1), __shfl_down_sync(ALL_LANES, from_here.by, 1)};
    return lane + 1 < WARP ? next : identity();
}

// A tile in memory order and in lane order, where lane l holds tokens LANE_TOKENS*l and on. Rows whose tiles are 16-byte
// aligned go straight between memory and lanes; others through shared memory, so that a warp still touches 32 neighbours.
template <typename T>
__device__ inline int padded(int i) {
    return i + i / LANE_TOKENS;  // so that lanes reading their own tokens meet different banks
}
constexpr int STAGE = TILE + WARP;

template <typename T>
struct lane_tokens {
    T token[LANE_TOKENS];
};

template <bool ALIGNED, typename T>
__device__ lane_tokens<T> read_tile(const T* tile, int size, int lane) {
    lane_tokens<T> x;
    if constexpr (ALIGNED) {
        constexpr int BYTES = LANE_TOKENS * sizeof(T);
        if (lane * LANE_TOKENS < size) {  // a row's size is a multiple of LANE_TOKENS
            if constexpr (BYTES == sizeof(unsigned)) {
                unsigned word = __ldg(reinterpret_cast<const unsigned*>(tile) + lane);
                memcpy(&x, &word, sizeof x);
            } else {
                uint4 words[BYTES / 16];
#pragma unroll
                for (int k = 0; k < BYTES / 16; k++)
                    words[k] = __ldg(reinterpret_cast<const uint4*>(tile) + lane * (BYTES / 16) + k);
                memcpy(&x, words, sizeof x);
            }
        } else {
#pragma unroll
            for (int j = 0; j < LANE_TOKENS; j++) x.token[j] = T{0};
        }
    } else {
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) x.token[j] = j * WARP + lane < size ? __ldg(tile + j * WARP + lane) : T{0};
    }
    return x;
}

// From memory order to lane order; all lanes of the warp take part.
template <bool ALIGNED, typename T>
__device__ void to_lanes(lane_tokens<T>& x, T* stage, int lane) {
    if constexpr (!ALIGNED) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) stage[padded<T>(j * WARP + lane)] = x.token[j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) x.token[j] = stage[padded<T>(lane * LANE_TOKENS + j)];
    }
}

template <bool ALIGNED, typename T>
__device__ void write_tile(T* tile, int size, const lane_tokens<T>& x, T* stage, int lane) {
    if constexpr (ALIGNED) {
        constexpr int VECTORS = LANE_TOKENS * sizeof(T) / 16;
        if (lane * LANE_TOKENS >= size) return;
        uint4 words[VECTORS];
        memcpy(words, &x, sizeof x);
#pragma unroll
        for (int k = 0; k < VECTORS; k++) __stcs(reinterpret_cast<uint4*>(tile) + lane * VECTORS + k, words[k]);
    } else {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) stage[padded<T>(lane * LANE_TOKENS + j)] = x.token[j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++)
            if (j * WARP + lane < size) tile[j * WARP + lane] = stage[padded<T>(j * WARP + lane)];
    }
}

// One chunk of one row from its end; returns its line. With WRITE, `behind` is the X behind the chunk.
template <bool WRITE, bool ALIGNED, typename real>
__device__ line run_chunk(const gae_batch<real>& batch, int64_t row, int64_t chunk, double behind, real* stage) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const double decay = batch.gamma * batch.lam;
    const int64_t first = chunk * CHUNK;
    const int length = static_cast<int>(batch.tokens - first < CHUNK ? batch.tokens - first : CHUNK);
    line so_far = identity();
    for (int tile = (length - 1) / TILE; tile >= 0; tile--) {
        const int64_t at = row * batch.tokens + first + tile * TILE;
        const int size = length - tile * TILE;
        lane_tokens<real> reward = read_tile<ALIGNED>(batch.rewards + at, size, lane);
        lane_tokens<real> value = read_tile<ALIGNED>(batch.values + at, size, lane);
        lane_tokens<uint8_t> inside = read_tile<ALIGNED>(batch.mask + at, size, lane);
        to_lanes<ALIGNED>(reward, stage, lane);
        to_lanes<ALIGNED>(value, stage, lane);
        to_lanes<ALIGNED>(inside, reinterpret_cast<uint8_t*>(stage), lane);
        line own = identity();
#pragma unroll
        for (int j = LANE_TOKENS - 1; j >= 0; j--)
            if (inside.token[j]) own = joined(of_token(reward.token[j], value.token[j], batch.gamma, decay), own);
        line whole_tile;
        const line rest_of_tile = behind_lane(own, lane, whole_tile);
        if constexpr (WRITE) {
            double x = through(rest_of_tile, through(so_far, behind));
            lane_tokens<real> advantages, returns;
#pragma unroll
            for (int j = LANE_TOKENS - 1; j >= 0; j--) {
                const double v = static_cast<double>(value.token[j]);
                const double advantage = (static_cast<double>(reward.token[j]) - v) + x;
                const real rounded = static_cast<real>(advantage);
                advantages.token[j] = inside.token[j] ? rounded : real{0};
                returns.token[j] = inside.token[j] ? rounded + value.token[j] : real{0};
                x = inside.token[j] ? fma(batch.gamma, v, decay * advantage) : x;
            }
            write_tile<ALIGNED>(batch.advantages + at, size, advantages, stage, lane);
            write_tile<ALIGNED>(batch.returns + at, size, returns, stage, lane);
        }
        so_far = joined(whole_tile, so_far);
    }
    return so_far;
}

__device__ inline int64_t warp_id() {
    return static_cast<int64_t>(blockIdx.x) * WARPS_A_BLOCK + threadIdx.x / WARP;
}

template <typename real>
__device__ double behind_row(const gae_batch<real>& batch, int64_t row) {
    return batch.bootstrap == nullptr ? 0.0 : batch.gamma * static_cast<double>(batch.bootstrap[row]);
}

template <bool ALIGNED, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED>) rows_kernel(gae_batch<real> batch) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t row = warp_id();
    if (row >= batch.rows) return;
    double behind = behind_row(batch, row);
    for (int64_t chunk = divide_up(batch.tokens, CHUNK) - 1; chunk >= 0; chunk--)
        behind = through(run_chunk<true, ALIGNED>(batch, row, chunk, behind, stage[threadIdx.x / WARP]), behind);
}

template <bool ALIGNED, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED>)
    lines_kernel(gae_batch<real> batch, int64_t chunks, line* lines) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t id = warp_id();
    if (id >= batch.rows * chunks) return;
    const line whole = run_chunk<false, ALIGNED>(batch, id / chunks, id % chunks, 0.0, stage[threadIdx.x / WARP]);
    if (threadIdx.x % WARP == 0) lines[id] = whole;
}

// behind[row, chunk] = the X behind it: one warp a row, a lane's worth of lines read at once and gone through in turn.
template <typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<true>)
    behind_kernel(gae_batch<real> batch, int64_t chunks, const line* lines, double* behind) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int64_t row = warp_id();
    if (row >= batch.rows) return;
    double x = behind_row(batch, row);
    for (int64_t last = chunks - 1; last >= 0; last -= WARP) {
        const int64_t mine = last - lane;
        const line own = mine >= 0 ? lines[row * chunks + mine] : identity();
        double behind_mine = 0.0;
        for (int k = 0; k < WARP; k++) {
            if (lane == k) behind_mine = x;
            x = through(from_lane(own, k), x);
        }
        if (mine >= 0) behind[row * chunks + mine] = behind_mine;
    }
}

template <bool ALIGNED, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED>)
    chunks_kernel(gae_batch<real> batch, int64_t chunks, const double* behind) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t id = warp_id();
    if (id >= batch.rows * chunks) return;
    run_chunk<true, ALIGNED>(batch, id / chunks, id % chunks, behind[id], stage[threadIdx.x / WARP]);
}

bool splits_rows(int64_t rows, int64_t tokens) { return rows < MANY_ROWS && tokens > CHUNK; }

template <bool ALIGNED, typename real>
cudaError_t run(const gae_batch<real>& batch, void* scratch, cudaStream_t stream) {
    constexpr int threads = WARPS_A_BLOCK * WARP;
    const int64_t row_blocks = divide_up(batch.rows, WARPS_A_BLOCK);
    if (!splits_rows(batch.rows, batch.tokens))
        return launch(rows_kernel<ALIGNED, real>, row_blocks, threads, stream, batch);
    const int64_t chunks = divide_up(batch.tokens, CHUNK), blocks = divide_up(batch.rows * chunks, WARPS_A_BLOCK);
    line* lines = static_cast<line*>(scratch);
    double* behind = reinterpret_cast<double*>(lines + batch.rows * chunks);
    cudaError_t error = launch(lines_kernel<ALIGNED, real>, blocks, threads, stream, batch, chunks, lines);
    if (error == cudaSuccess)
        error = launch(behind_kernel<real>, row_blocks, threads, stream, batch, chunks, lines, behind);
    if (error == cudaSuccess)
        error = launch(chunks_kernel<ALIGNED, real>, blocks, threads, stream, batch, chunks, behind);
    return error;
}

bool is_aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace

size_t gae_scratch_bytes(int64_t rows, int64_t tokens) {
    return splits_rows(rows, tokens) ? rows * divide_up(tokens, CHUNK) * (sizeof(line) + sizeof(double)) : 0;
}

template <typename real>
cudaError_t gae(const gae_batch<real>& batch, void* scratch, cudaStream_t stream) {
    if (batch.rows == 0 || batch.tokens == 0) return cudaSuccess;
    const bool aligned = batch.tokens % LANE_TOKENS == 0 && is_aligned(batch.rewards, 16) &&
                         is_aligned(batch.values, 16) && is_aligned(batch.mask, LANE_TOKENS) && is_aligned(batch.advantages, 16) &&
                         is_aligned(batch.returns, 16);
    return aligned ? run<true>(batch, scratch, stream) : run<false>(batch, scratch, stream);
}

template cudaError_t gae(const gae_batch<float>&, void*, cudaStream_t);
template cudaError_t gae(const gae_batch<double>&, void*, cudaStream_t);

}  // namespace rlhf

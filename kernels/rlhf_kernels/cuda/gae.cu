// Generalised advantage estimation: gae_scan.cuh over rows, tiles and chunks.
//
// A warp takes a tile of 32 lanes times LANE_TOKENS tokens, CHUNK_TILES tiles make a chunk. Many rows: a warp runs
// through its row, chunk after chunk. Few long rows: all chunks' maps first, then the state behind every chunk, then the
// chunks. Both add up in the same order, so the bits do not depend on the number of rows.
#include "device.cuh"
#include "gae_scan.cuh"
#include "kernels.h"

#include <type_traits>

namespace rlhf {
namespace {

constexpr int LANE_TOKENS = 4;
constexpr int TILE = WARP * LANE_TOKENS;
constexpr int CHUNK_TILES = 16;
constexpr int64_t CHUNK = TILE * CHUNK_TILES;
constexpr int64_t MANY_ROWS = 1024;  // enough warps to keep a GPU busy
constexpr int WARPS_A_BLOCK = 2;
// Blocks that a multiprocessor can hold: at most 64, 128 or 255 registers a thread.
template <bool ALIGNED, typename recursion>
constexpr int BLOCKS = ALIGNED ? 16 : std::is_same_v<recursion, steady> ? 8 : 4;

// A tile in memory order and in lane order, where lane l holds tokens LANE_TOKENS*l and on. Rows whose tiles are 16-byte
// aligned go straight between memory and lanes; others through shared memory, so that a warp still touches 32 neighbours.
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
        for (int j = 0; j < LANE_TOKENS; j++) stage[padded(j * WARP + lane)] = x.token[j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) x.token[j] = stage[padded(lane * LANE_TOKENS + j)];
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
        for (int j = 0; j < LANE_TOKENS; j++) stage[padded(lane * LANE_TOKENS + j)] = x.token[j];
        __syncwarp();
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++)
            if (j * WARP + lane < size) tile[j * WARP + lane] = stage[padded(j * WARP + lane)];
    }
}

// γ or λ of a tile's tokens: read where there is a tensor, else one number.
template <typename real>
__device__ lane_tokens<real> per_token(const real* all, int64_t at, int size, real* stage, int lane) {
    lane_tokens<real> x = read_tile<false>(all + at, size, lane);
    to_lanes<false>(x, stage, lane);
    return x;
}

// One chunk of one row from its end; returns its map. With WRITE, `behind` is the state behind the chunk.
template <bool WRITE, bool ALIGNED, typename recursion, typename real>
__device__ typename recursion::map run_chunk(const gae_batch<real>& batch, int64_t row, int64_t chunk,
                                             typename recursion::state behind, real* stage) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int64_t first = chunk * CHUNK;
    const int length = static_cast<int>(batch.tokens - first < CHUNK ? batch.tokens - first : CHUNK);
    typename recursion::map so_far = recursion::identity();
    for (int tile = (length - 1) / TILE; tile >= 0; tile--) {
        const int64_t at = row * batch.tokens + first + tile * TILE;
        const int size = length - tile * TILE;
        lane_tokens<real> reward = read_tile<ALIGNED>(batch.rewards + at, size, lane);
        lane_tokens<real> value = read_tile<ALIGNED>(batch.values + at, size, lane);
        lane_tokens<uint8_t> inside = read_tile<ALIGNED>(batch.mask + at, size, lane);
        to_lanes<ALIGNED>(reward, stage, lane);
        to_lanes<ALIGNED>(value, stage, lane);
        to_lanes<ALIGNED>(inside, reinterpret_cast<uint8_t*>(stage), lane);
        double gamma[LANE_TOKENS], lam[LANE_TOKENS];
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; j++) gamma[j] = batch.gamma, lam[j] = batch.lam;
        if constexpr (std::is_same_v<recursion, varying>) {
            if (batch.gammas != nullptr) {
                const auto gammas = per_token(batch.gammas, at, size, stage, lane);
#pragma unroll
                for (int j = 0; j < LANE_TOKENS; j++) gamma[j] = gammas.token[j];
            }
            if (batch.lams != nullptr) {
                const auto lams = per_token(batch.lams, at, size, stage, lane);
#pragma unroll
                for (int j = 0; j < LANE_TOKENS; j++) lam[j] = lams.token[j];
            }
        }
        typename recursion::map own = recursion::identity(), whole_tile;
#pragma unroll
        for (int j = LANE_TOKENS - 1; j >= 0; j--)
            if (inside.token[j])
                own = recursion::joined(recursion::of_token(reward.token[j], value.token[j], gamma[j], lam[j]), own);
        const auto rest_of_tile = behind_lane<recursion>(own, lane, whole_tile);
        if constexpr (WRITE) {
            auto state = recursion::through(rest_of_tile, recursion::through(so_far, behind));
            lane_tokens<real> advantages, returns;
#pragma unroll
            for (int j = LANE_TOKENS - 1; j >= 0; j--) {
                const double v = static_cast<double>(value.token[j]), r = static_cast<double>(reward.token[j]);
                const double advantage = recursion::advantage(r, v, state, gamma[j], lam[j]);
                const real rounded = static_cast<real>(advantage);
                advantages.token[j] = inside.token[j] ? rounded : real{0};
                returns.token[j] = inside.token[j] ? rounded + value.token[j] : real{0};
                if (inside.token[j]) state = recursion::before_token(v, advantage, gamma[j], lam[j]);
            }
            write_tile<ALIGNED>(batch.advantages + at, size, advantages, stage, lane);
            write_tile<ALIGNED>(batch.returns + at, size, returns, stage, lane);
        }
        so_far = recursion::joined(whole_tile, so_far);
    }
    return so_far;
}

__device__ inline int64_t warp_id() {
    return static_cast<int64_t>(blockIdx.x) * WARPS_A_BLOCK + threadIdx.x / WARP;
}

template <typename recursion, typename real>
__device__ typename recursion::state behind_row(const gae_batch<real>& batch, int64_t row) {
    return recursion::behind_row(batch.bootstrap == nullptr ? 0.0 : static_cast<double>(batch.bootstrap[row]),
                                 batch.gamma);
}

template <bool ALIGNED, typename recursion, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED, recursion>) rows_kernel(gae_batch<real> batch) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t row = warp_id();
    if (row >= batch.rows) return;
    auto behind = behind_row<recursion>(batch, row);
    for (int64_t chunk = divide_up(batch.tokens, CHUNK) - 1; chunk >= 0; chunk--)
        behind = recursion::through(
            run_chunk<true, ALIGNED, recursion>(batch, row, chunk, behind, stage[threadIdx.x / WARP]), behind);
}

template <bool ALIGNED, typename recursion, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED, recursion>)
    maps_kernel(gae_batch<real> batch, int64_t chunks, typename recursion::map* maps) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t id = warp_id();
    if (id >= batch.rows * chunks) return;
    const auto whole =
        run_chunk<false, ALIGNED, recursion>(batch, id / chunks, id % chunks, {}, stage[threadIdx.x / WARP]);
    if (threadIdx.x % WARP == 0) maps[id] = whole;
}

// behind[row, chunk] = the state behind it: one warp a row, a lane's worth of maps read at once and gone through in turn.
template <typename recursion, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP)
    behind_kernel(gae_batch<real> batch, int64_t chunks, const typename recursion::map* maps,
                  typename recursion::state* behind) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int64_t row = warp_id();
    if (row >= batch.rows) return;
    auto state = behind_row<recursion>(batch, row);
    for (int64_t last = chunks - 1; last >= 0; last -= WARP) {
        const int64_t mine = last - lane;
        const auto own = mine >= 0 ? maps[row * chunks + mine] : recursion::identity();
        auto behind_mine = state;
#pragma unroll 1
        for (int k = 0; k < WARP; k++) {
            if (lane == k) behind_mine = state;
            state = recursion::through(from_lane(own, k), state);
        }
        if (mine >= 0) behind[row * chunks + mine] = behind_mine;
    }
}

template <bool ALIGNED, typename recursion, typename real>
__global__ void __launch_bounds__(WARPS_A_BLOCK* WARP, BLOCKS<ALIGNED, recursion>)
    chunks_kernel(gae_batch<real> batch, int64_t chunks, const typename recursion::state* behind) {
    __shared__ real stage[WARPS_A_BLOCK][STAGE];
    const int64_t id = warp_id();
    if (id >= batch.rows * chunks) return;
    run_chunk<true, ALIGNED, recursion>(batch, id / chunks, id % chunks, behind[id], stage[threadIdx.x / WARP]);
}

bool splits_rows(int64_t rows, int64_t tokens) { return rows < MANY_ROWS && tokens > CHUNK; }

template <bool ALIGNED, typename recursion, typename real>
cudaError_t run(const gae_batch<real>& batch, void* scratch, cudaStream_t stream) {
    constexpr int threads = WARPS_A_BLOCK * WARP;
    const int64_t row_blocks = divide_up(batch.rows, WARPS_A_BLOCK);
    if (!splits_rows(batch.rows, batch.tokens))
        return launch(rows_kernel<ALIGNED, recursion, real>, row_blocks, threads, stream, batch);
    const int64_t chunks = divide_up(batch.tokens, CHUNK), blocks = divide_up(batch.rows * chunks, WARPS_A_BLOCK);
    auto* maps = static_cast<typename recursion::map*>(scratch);
    auto* behind = reinterpret_cast<typename recursion::state*>(maps + batch.rows * chunks);
    cudaError_t error = launch(maps_kernel<ALIGNED, recursion, real>, blocks, threads, stream, batch, chunks, maps);
    if (error == cudaSuccess)
        error = launch(behind_kernel<recursion, real>, row_blocks, threads, stream, batch, chunks, maps, behind);
    if (error == cudaSuccess)
        error = launch(chunks_kernel<ALIGNED, recursion, real>, blocks, threads, stream, batch, chunks, behind);
    return error;
}

bool is_aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace

size_t gae_scratch_bytes(int64_t rows, int64_t tokens) {
    return splits_rows(rows, tokens) ? rows * divide_up(tokens, CHUNK) * (sizeof(varying::map) + sizeof(varying::state))
                                     : 0;
}

template <typename real>
cudaError_t gae(const gae_batch<real>& batch, void* scratch, cudaStream_t stream) {
    if (batch.rows == 0 || batch.tokens == 0) return cudaSuccess;
    if (batch.gammas != nullptr || batch.lams != nullptr) return run<false, varying>(batch, scratch, stream);
    const bool aligned = batch.tokens % LANE_TOKENS == 0 && is_aligned(batch.rewards, 16) &&
                         is_aligned(batch.values, 16) && is_aligned(batch.mask, LANE_TOKENS) &&
                         is_aligned(batch.advantages, 16) && is_aligned(batch.returns, 16);
    return aligned ? run<true, steady>(batch, scratch, stream) : run<false, steady>(batch, scratch, stream);
}

template cudaError_t gae(const gae_batch<float>&, void*, cudaStream_t);
template cudaError_t gae(const gae_batch<double>&, void*, cudaStream_t);

}  // namespace rlhf

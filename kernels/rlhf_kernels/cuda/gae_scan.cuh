// The recursion of generalised advantage estimation as maps that compose, in float64: Schulman et al. 2016, arXiv
// 1506.02438, equations 12 and 16. A stretch of tokens maps what lies behind it (`state`) to what lies before it, a token
// outside the mask is the identity, and a map of two neighbouring stretches is the composition of theirs: a scan (Blelloch
// 1990, "Prefix sums and their applications", section 1.4).
#pragma once

#include "device.cuh"

namespace rlhf {

// A map, as its coefficients.
template <int N>
struct map_of {
    double c[N];
};

template <int N>
__device__ map_of<N> from_lane(const map_of<N>& x, int lane) {
    map_of<N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.c[i] = __shfl_sync(ALL_LANES, x.c[i], lane);
    return y;
}

template <int N>
__device__ map_of<N> from_lane_behind(const map_of<N>& x, int step) {
    map_of<N> y;
#pragma unroll
    for (int i = 0; i < N; i++) y.c[i] = __shfl_down_sync(ALL_LANES, x.c[i], step);
    return y;
}

// One γ and one λ. With X_t = γ V_t + γλ A_t for a token of the mask, and X_t = X_{t+1} for any other,
//     A_t = (r_t - V_t) + X_{t+1},   X_t = [γ V_t + γλ (r_t - V_t)] + γλ X_{t+1},   X_T = γ bootstrap,
// so that one number is the whole state and a map is X -> c0 + c1 X.
struct steady {
    using state = double;
    using map = map_of<2>;

    static __device__ state behind_row(double bootstrap, double gamma) { return gamma * bootstrap; }
    static __device__ map identity() { return {{0.0, 1.0}}; }
    static __device__ state through(const map& m, state behind) { return fma(m.c[1], behind, m.c[0]); }
    static __device__ map joined(const map& before, const map& behind) {
        return {{through(before, behind.c[0]), before.c[1] * behind.c[1]}};
    }
    static __device__ map of_token(double reward, double value, double gamma, double lam) {
        return {{fma(gamma, value, gamma * lam * (reward - value)), gamma * lam}};
    }
    static __device__ double advantage(double reward, double value, state behind, double, double) {
        return (reward - value) + behind;
    }
    static __device__ state before_token(double value, double advantage, double gamma, double lam) {
        return fma(gamma, value, gamma * lam * advantage);
    }
};

// γ and λ of each token. The state is the next value and the next advantage; a map is
// (V, A) -> (c3, c0 + c1 V + c2 A) where c4 is 1, and the identity where c4 is 0: no token of the mask.
struct varying {
    struct state {
        double value, advantage;
    };
    using map = map_of<5>;

    static __device__ state behind_row(double bootstrap, double) { return {bootstrap, 0.0}; }
    static __device__ map identity() { return {{0.0, 0.0, 1.0, 0.0, 0.0}}; }
    static __device__ state through(const map& m, state behind) {
        if (m.c[4] == 0.0) return behind;
        return {m.c[3], fma(m.c[2], behind.advantage, fma(m.c[1], behind.value, m.c[0]))};
    }
    static __device__ map joined(const map& before, const map& behind) {
        if (before.c[4] == 0.0) return behind;
        if (behind.c[4] == 0.0) return before;
        const state constant = through(before, {behind.c[3], behind.c[0]});
        return {{constant.advantage, before.c[2] * behind.c[1], before.c[2] * behind.c[2], constant.value, 1.0}};
    }
    static __device__ map of_token(double reward, double value, double gamma, double lam) {
        return {{reward - value, gamma, gamma * lam, value, 1.0}};
    }
    static __device__ double advantage(double reward, double value, state behind, double gamma, double lam) {
        return (reward + gamma * behind.value - value) + gamma * lam * behind.advantage;
    }
    static __device__ state before_token(double value, double advantage, double, double) { return {value, advantage}; }
};

// The map of the lanes behind this one, and that of the whole warp.
template <typename recursion>
__device__ typename recursion::map behind_lane(const typename recursion::map& own, int lane,
                                               typename recursion::map& whole) {
    typename recursion::map from_here = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const auto next = from_lane_behind(from_here, step);
        if (lane + step < WARP) from_here = recursion::joined(from_here, next);
    }
    whole = from_lane(from_here, 0);
    const auto next = from_lane_behind(from_here, 1);
    return lane + 1 < WARP ? next : recursion::identity();
}

}  // namespace rlhf

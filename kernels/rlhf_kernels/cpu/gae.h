/* Generalised advantage estimation over one row: Schulman et al. 2016, arXiv 1506.02438, equations 12 and 16.
 *
 * The recursion runs in float64 for both element types; the return is the sum of the rounded advantage and the value, so
 * that returns == advantages + values holds bit for bit.
 */
#ifndef RLHF_GAE_H
#define RLHF_GAE_H

#include <stdint.h>

#define GAE_ROW(name, real)                                                                                             \
    static void name(const real *rewards, const real *values, const uint8_t *mask, int64_t tokens, double bootstrap,   \
                     double gamma, double lam, real *advantages, real *returns) {                                      \
        double next_value = bootstrap, next_advantage = 0.0;                                                           \
        const double decay = gamma * lam;                                                                              \
        for (int64_t t = tokens - 1; t >= 0; t--) {                                                                    \
            double value = (double)values[t];                                                                          \
            double advantage = ((double)rewards[t] + gamma * next_value - value) + decay * next_advantage;             \
            int inside = mask[t] != 0;                                                                                 \
            real rounded = (real)advantage;                                                                            \
            advantages[t] = inside ? rounded : (real)0;                                                                \
            returns[t] = inside ? rounded + values[t] : (real)0;                                                       \
            next_value = inside ? value : next_value;                                                                  \
            next_advantage = inside ? advantage : next_advantage;                                                      \
        }                                                                                                              \
    }

GAE_ROW(gae_float, float)
GAE_ROW(gae_double, double)

#endif

/* One draw from softmax(logits / temperature) by inverting its cumulative distribution, with top-k and top-p.
 *
 * Tokens are ranked by logit and equal logits by id, lower first; top-k applies first, then top-p to the mass that top-k
 * left. The ranking is never sorted: a radix selection over the bits of the logits finds the border (2048 bins a level).
 */
#ifndef RLHF_SAMPLING_H
#define RLHF_SAMPLING_H

#include <stdlib.h>

#include "moments.h"

#define BIN_BITS 11
#define BINS (1 << BIN_BITS)

/* 2^t of n logits, as float32 in units where the row's largest has 1. */
INLINE void weights(const void *x, int64_t n, enum element_type type, float largest, float scale, float *out) {
    const lanes ref = lanes_set(largest), by = lanes_set(scale);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes t = lanes_mul(lanes_sub(lanes_load_as(element_at(x, i, type), type), ref), by);
        lanes_store(out + i, lanes_exp2(lanes_clamp_exponent(t)));
    }
    if (i < n) {
        float padded[LANES];
        lanes t = lanes_mul(lanes_sub(lanes_load_some(element_at(x, i, type), n - i, type), ref), by);
        lanes_store(padded, lanes_exp2(lanes_clamp_exponent(t)));
        memcpy(out + i, padded, (size_t)(n - i) * sizeof(float));
    }
}

/* The first index whose cumulative weight exceeds `target`, which is reduced by what was passed; -1 if none does. */
INLINE int64_t first_above(const float *weight, int64_t n, double *target) {
    const int64_t group = 64;
    for (int64_t start = 0; start < n; start += group) {
        int64_t end = n - start < group ? n : start + group;
        double part[4] = {0};
        int64_t i = start;
        for (; i + 4 <= end; i += 4)
            for (int j = 0; j < 4; j++) part[j] += (double)weight[i + j];
        for (; i < end; i++) part[0] += (double)weight[i];
        double sum = (part[0] + part[2]) + (part[1] + part[3]);
        if (!(sum > *target)) {
            *target -= sum;
            continue;
        }
        double left = *target;
        int64_t last = -1;
        for (i = start; i < end; i++) {
            if (weight[i] > 0.0f) last = i;
            if ((double)weight[i] > left) return i;
            left -= (double)weight[i];
        }
        return last; /* the group's sum was rounded the other way */
    }
    return -1;
}

/* Without a filter only the block that holds the answer is read a second time. */
INLINE int64_t draw_from_blocks(const void *logits, int64_t vocabulary, enum element_type type, float largest,
                                float scale, const block_record *records, double uniform) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++)
        total += records[b].sum * double_exp2(((double)records[b].reference - (double)largest) * (double)scale);
    double target = uniform * total;
    float weight[BLOCK];
    int64_t last_possible = 0;
    for (int64_t b = 0; b < blocks; b++) {
        double mass = records[b].sum * double_exp2(((double)records[b].reference - (double)largest) * (double)scale);
        if (mass <= target && b + 1 < blocks) {
            target -= mass;
            continue;
        }
        int64_t start = b * BLOCK, n = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
        weights(element_at(logits, start, type), n, type, largest, scale, weight);
        int64_t found = first_above(weight, n, &target);
        if (found >= 0) return start + found;
        for (int64_t i = 0; i < n; i++)
            if (weight[i] > 0.0f) last_possible = start + i;
        if (last_possible >= start) return last_possible; /* rounding left the target at this block's very end */
    }
    /* Rounding left the target beyond the last block that has mass: the last token with mass is the answer. */
    for (int64_t b = blocks - 1; b >= 0; b--) {
        int64_t start = b * BLOCK, n = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
        weights(element_at(logits, start, type), n, type, largest, scale, weight);
        for (int64_t i = n - 1; i >= 0; i--)
            if (weight[i] > 0.0f) return start + i;
    }
    return last_possible;
}

/* Unsigned integers in the order of the numbers; −0 counts as +0. */
INLINE uint32_t rank_key(float x) {
    float without_minus_zero = x + 0.0f;
    uint32_t bits;
    memcpy(&bits, &without_minus_zero, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

typedef struct {
    uint32_t key;  /* keep the tokens above this key, */
    int64_t equal; /* and the first so many that have it */
    double mass;   /* what is kept, in the units of the weights */
} border;

typedef struct {
    double mass;
    int64_t count;
} bin;

/* The shortest prefix of the ranking that holds `most` tokens or a mass of `enough`, whichever is shorter.
 * `keys` and `mass` are reordered: each level keeps only the bin that the border is in. */
INLINE border find_border(uint32_t *keys, float *mass, int64_t n, int64_t most, double enough) {
    bin bins[BINS];
    double mass_above = 0.0;
    int64_t count_above = 0;
    for (int shift = 32 - BIN_BITS, width = BIN_BITS;;) {
        const uint32_t low_bits = (1u << width) - 1;
        memset(bins, 0, sizeof bins);
        for (int64_t i = 0; i < n; i++) {
            bin *b = &bins[keys[i] >> shift & low_bits];
            b->mass += (double)mass[i];
            b->count++;
        }
        uint32_t at = low_bits, lowest = 0;
        while (!bins[lowest].count) lowest++;
        while (at > lowest && count_above + bins[at].count < most && mass_above + bins[at].mass < enough) {
            mass_above += bins[at].mass;
            count_above += bins[at].count;
            at--;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++)
            if ((keys[i] >> shift & low_bits) == at) {
                keys[kept] = keys[i];
                mass[kept++] = mass[i];
            }
        n = kept;
        if (shift == 0) break;
        width = shift < BIN_BITS ? shift : BIN_BITS;
        shift -= width;
    }
    border found = {keys[0], 0, mass_above};
    do { /* all that are left are equal */
        found.equal++;
        found.mass += (double)mass[0];
    } while (found.equal < n && count_above + found.equal < most && found.mass < enough);
    return found;
}

typedef struct {
    uint32_t *keys, *scratch_keys;
    float *weight, *scratch_weight;
    int64_t *ids;
} filter_memory;

INLINE border top_k_top_p(filter_memory m, int64_t vocabulary, int64_t top_k, double top_p) {
    const size_t bytes = (size_t)vocabulary * 4;
    border found = {0, 0, 0.0};
    if (top_k > 0) {
        memcpy(m.scratch_keys, m.keys, bytes);
        memcpy(m.scratch_weight, m.weight, bytes);
        found = find_border(m.scratch_keys, m.scratch_weight, vocabulary, top_k, __builtin_inf());
    }
    if (top_p < 1.0) {
        double whole = found.mass;
        if (top_k == 0)
            for (int64_t i = 0; i < vocabulary; i++) whole += (double)m.weight[i];
        memcpy(m.scratch_keys, m.keys, bytes);
        memcpy(m.scratch_weight, m.weight, bytes);
        found = find_border(m.scratch_keys, m.scratch_weight, vocabulary, top_k > 0 ? top_k : vocabulary, top_p * whole);
    }
    return found;
}

INLINE int64_t draw_filtered(filter_memory m, int64_t vocabulary, border at, double uniform, double *kept_mass) {
    int64_t kept = 0, equal = 0;
    double total = 0.0;
    for (int64_t i = 0; i < vocabulary; i++) {
        if (m.keys[i] < at.key || m.weight[i] == 0.0f) continue;
        if (m.keys[i] == at.key && equal++ >= at.equal) continue;
        m.ids[kept++] = i;
        total += (double)m.weight[i];
    }
    *kept_mass = total;
    double target = uniform * total, cumulative = 0.0;
    for (int64_t i = 0; i + 1 < kept; i++) {
        cumulative += (double)m.weight[m.ids[i]];
        if (cumulative > target) return m.ids[i];
    }
    return m.ids[kept - 1];
}

INLINE int sample_typed(const void *logits, int64_t vocabulary, enum element_type type, double uniform,
                        double inverse_temperature, int64_t top_k, double top_p, int64_t *id, float *logp,
                        float *filtered_logp) {
    const float scale = scale_from(inverse_temperature);
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    const int filtered = top_k > 0 || top_p < 1.0;
    const size_t v = (size_t)vocabulary;
    char *memory = malloc((size_t)blocks * sizeof(block_record) + (filtered ? v * (4 * 4 + sizeof(int64_t)) : 0));
    if (!memory) return -2;
    block_record *records = (block_record *)memory;
    const moments m = row_moments(NO_MOMENTS, logits, vocabulary, type, scale, 0, records);
    if (!is_distribution(m)) {
        free(memory);
        return -1;
    }
    double log2_kept = double_log2(m.sum);
    const double log2_sum = log2_kept;
    if (filtered) {
        filter_memory f;
        f.ids = (int64_t *)(records + blocks);
        f.keys = (uint32_t *)(f.ids + vocabulary);
        f.scratch_keys = f.keys + vocabulary;
        f.weight = (float *)(f.scratch_keys + vocabulary);
        f.scratch_weight = f.weight + vocabulary;
        weights(logits, vocabulary, type, m.largest, scale, f.weight);
        float widened[LANES];
        for (int64_t i = 0; i < vocabulary; i += LANES) {
            const int64_t n = vocabulary - i < LANES ? vocabulary - i : LANES;
            lanes_store(widened, n == LANES ? lanes_load_as(element_at(logits, i, type), type)
                                            : lanes_load_some(element_at(logits, i, type), n, type));
            for (int64_t j = 0; j < n; j++) f.keys[i + j] = rank_key(widened[j]);
        }
        double kept_mass;
        *id = draw_filtered(f, vocabulary, top_k_top_p(f, vocabulary, top_k, top_p), uniform, &kept_mass);
        log2_kept = double_log2(kept_mass);
    } else {
        *id = draw_from_blocks(logits, vocabulary, type, m.largest, scale, records, uniform);
    }
    free(memory);
    const float logit = element_load(element_at(logits, *id, type), type);
    *logp = logp_of(logit, m.largest, log2_sum, inverse_temperature);
    *filtered_logp = logp_of(logit, m.largest, log2_kept, inverse_temperature);
    return 0;
}

static int sample(const void *logits, int64_t vocabulary, int type, double uniform, double inverse_temperature,
                  int64_t top_k, double top_p, int64_t *id, float *logp, float *filtered_logp) {
    if (type == F32)
        return sample_typed(logits, vocabulary, F32, uniform, inverse_temperature, top_k, top_p, id, logp,
                            filtered_logp);
    if (type == BF16)
        return sample_typed(logits, vocabulary, BF16, uniform, inverse_temperature, top_k, top_p, id, logp,
                            filtered_logp);
    return sample_typed(logits, vocabulary, F16, uniform, inverse_temperature, top_k, top_p, id, logp, filtered_logp);
}

#endif

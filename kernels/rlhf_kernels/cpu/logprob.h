/* Log-probability of a label and entropy of a row of logits, and their gradient. */
#ifndef RLHF_LOGPROB_H
#define RLHF_LOGPROB_H

#include "moments.h"

/* What is known of a row when some of its vocabulary has been read. */
typedef struct {
    double largest, sum, weighted, label_logit;
} row_state;

INLINE void logprob_read_typed(const void *logits, int64_t n, enum element_type type, int64_t label,
                               double inverse_temperature, int weighted, row_state *state) {
    const float scale = scale_from(inverse_temperature);
    moments m = {(float)state->largest, state->sum, state->weighted};
    m = weighted ? row_moments(m, logits, n, type, scale, 1, 0) : row_moments(m, logits, n, type, scale, 0, 0);
    if (label >= 0 && label < n) state->label_logit = (double)element_load(element_at(logits, label, type), type);
    state->largest = (double)m.largest;
    state->sum = m.sum;
    state->weighted = m.weighted;
}

static void logprob_read(const void *logits, int64_t n, int type, int64_t label, double inverse_temperature,
                         int weighted, double *state) {
    row_state *row = (row_state *)state;
    if (type == F32) logprob_read_typed(logits, n, F32, label, inverse_temperature, weighted, row);
    else if (type == BF16) logprob_read_typed(logits, n, BF16, label, inverse_temperature, weighted, row);
    else logprob_read_typed(logits, n, F16, label, inverse_temperature, weighted, row);
}

static void logprob_finish(const double *state, double inverse_temperature, float *logp, float *entropy,
                           float *statistics) {
    const row_state *row = (const row_state *)state;
    const moments m = {(float)row->largest, row->sum, row->weighted};
    if (!is_distribution(m)) {
        *logp = statistics[0] = statistics[1] = CANONICAL_NAN;
        if (entropy) *entropy = CANONICAL_NAN;
        return;
    }
    double log2_sum = double_log2(m.sum);
    *logp = logp_of((float)row->label_logit, m.largest, log2_sum, inverse_temperature);
    if (entropy) *entropy = entropy_of(log2_sum, m.sum, m.weighted);
    statistics[0] = m.largest;
    statistics[1] = (float)log2_sum;
}

static void logprob_forward(const void *logits, int64_t vocabulary, int type, int64_t label, double inverse_temperature,
                            float *logp, float *entropy, float *statistics) {
    row_state row = {-__builtin_inf(), 0.0, 0.0, 0.0};
    logprob_read(logits, vocabulary, type, label, inverse_temperature, entropy != 0, (double *)&row);
    logprob_finish((const double *)&row, inverse_temperature, logp, entropy, statistics);
}

INLINE void logprob_forward_short_typed(const void *const *logits, int64_t rows, int64_t vocabulary,
                                        enum element_type type, const int64_t *labels, double inverse_temperature,
                                        float *logp, float *entropy, float *statistics) {
    const float scale = scale_from(inverse_temperature);
    moments m[SHORT_ROWS];
    if (entropy) moments_of_short_rows(logits, rows, vocabulary, type, scale, 1, m);
    else moments_of_short_rows(logits, rows, vocabulary, type, scale, 0, m);
    for (int64_t r = 0; r < rows; r++) {
        const double label_logit = (double)element_load(element_at(logits[r], labels[r], type), type);
        const row_state state = {(double)m[r].largest, m[r].sum, m[r].weighted, label_logit};
        logprob_finish((const double *)&state, inverse_temperature, logp + r, entropy ? entropy + r : 0,
                       statistics + 2 * r);
    }
}

static void logprob_forward_short(const void *const *logits, int64_t rows, int64_t vocabulary, int type,
                                  const int64_t *labels, double inverse_temperature, float *logp, float *entropy,
                                  float *statistics) {
    if (type == F32)
        logprob_forward_short_typed(logits, rows, vocabulary, F32, labels, inverse_temperature, logp, entropy,
                                    statistics);
    else if (type == BF16)
        logprob_forward_short_typed(logits, rows, vocabulary, BF16, labels, inverse_temperature, logp, entropy,
                                    statistics);
    else
        logprob_forward_short_typed(logits, rows, vocabulary, F16, labels, inverse_temperature, logp, entropy,
                                    statistics);
}

/* grad_j = −p_j (at_zero + slope t_j), t_j = log2 p_j: see gradient_line_of */
typedef struct {
    lanes largest, scale, minus_log2_sum, at_zero, slope;
} gradient_terms;

INLINE lanes gradient_of(lanes x, const gradient_terms *g) {
    lanes t = lanes_clamp_exponent(lanes_fma(lanes_sub(x, g->largest), g->scale, g->minus_log2_sum));
    lanes minus_p = lanes_sub(lanes_set(0.0f), lanes_exp2(t));
    return lanes_mul(minus_p, lanes_fma(g->slope, t, g->at_zero));
}

INLINE void gradient_some(const void *x, int64_t n, enum element_type type, const gradient_terms *g, void *out) {
    char padded[LANES * sizeof(float)];
    lanes_store_as(padded, gradient_of(lanes_load_some(x, n, type), g), type);
    memcpy(out, padded, (size_t)(n * element_bytes(type)));
}

INLINE void gradient_range(const void *x, int64_t n, enum element_type type, const gradient_terms *terms, int stream,
                           void *out) {
    const gradient_terms g = *terms;
    int64_t i = 0;
    if (type == F32 && stream) { /* whole cache lines only: the elements before the first one go the ordinary way */
        int64_t head = (int64_t)((-(uintptr_t)out & 63) / sizeof(float));
        head = head < n ? head : n;
        if (head) gradient_some(x, head, type, &g, out);
        for (i = head; i + LANES <= n; i += LANES)
            lanes_stream((float *)out + i, gradient_of(lanes_load((const float *)x + i), &g));
    } else {
        for (; i + LANES <= n; i += LANES)
            lanes_store_as((void *)element_at(out, i, type),
                           gradient_of(lanes_load_as(element_at(x, i, type), type), &g), type);
    }
    if (i < n) gradient_some(element_at(x, i, type), n - i, type, &g, (void *)element_at(out, i, type));
}

INLINE void fill_with_nan(void *out, int64_t n, enum element_type type) {
    static const uint16_t half_nan[3] = {0, 0x7FC0, 0x7E00};
    for (int64_t i = 0; i < n; i++) {
        if (type == F32) ((float *)out)[i] = CANONICAL_NAN;
        else ((uint16_t *)out)[i] = half_nan[type];
    }
}

INLINE void logprob_backward_typed(const void *logits, int64_t vocabulary, enum element_type type, int64_t label,
                                   double inverse_temperature, const float *statistics, float entropy, float grad_logp,
                                   float grad_entropy, int stream, void *grad_logits) {
    if (grad_logp == 0.0f && grad_entropy == 0.0f) { /* nothing under a mask is read, NaN neither */
        memset(grad_logits, 0, (size_t)(vocabulary * element_bytes(type)));
        return;
    }
    if (statistics[1] != statistics[1] || grad_logp != grad_logp || grad_entropy != grad_entropy) {
        fill_with_nan(grad_logits, vocabulary, type);
        return;
    }
    const gradient_line line = gradient_line_of(grad_logp, grad_entropy, entropy, inverse_temperature);
    const gradient_terms g = {
        lanes_set(statistics[0]), lanes_set(scale_from(inverse_temperature)), lanes_set(-statistics[1]),
        lanes_set(line.at_zero), lanes_set(line.slope),
    };
    if (label < 0 || label >= vocabulary) { /* it is in another part of the row */
        gradient_range(logits, vocabulary, type, &g, stream, grad_logits);
        return;
    }
    lanes at_label = gradient_of(lanes_load_some(element_at(logits, label, type), 1, type), &g);
    gradient_range(logits, label, type, &g, stream, grad_logits);
    gradient_range(element_at(logits, label + 1, type), vocabulary - label - 1, type, &g, stream,
                   (void *)element_at(grad_logits, label + 1, type));
    at_label = lanes_add(at_label, lanes_set(line.at_label));
    char padded[LANES * sizeof(float)];
    lanes_store_as(padded, at_label, type);
    memcpy((void *)element_at(grad_logits, label, type), padded, (size_t)element_bytes(type));
}

static void logprob_backward(const void *logits, int64_t vocabulary, int type, int64_t label, double inverse_temperature,
                             const float *statistics, float entropy, float grad_logp, float grad_entropy, int stream,
                             void *grad_logits) {
    if (type == F32)
        logprob_backward_typed(logits, vocabulary, F32, label, inverse_temperature, statistics, entropy, grad_logp,
                               grad_entropy, stream, grad_logits);
    else if (type == BF16)
        logprob_backward_typed(logits, vocabulary, BF16, label, inverse_temperature, statistics, entropy, grad_logp,
                               grad_entropy, stream, grad_logits);
    else
        logprob_backward_typed(logits, vocabulary, F16, label, inverse_temperature, statistics, entropy, grad_logp,
                               grad_entropy, stream, grad_logits);
}

#endif

/* The table of row kernels that each instruction set fills (unit.c) and the choice between them (isa.c).
 *
 * A row kernel works on one row (or one chunk) in one thread; the loops over rows are in the .pyx files. Arguments are
 * checked there: a kernel trusts its pointers and sizes. `type` is an enum element_type of lanes.h.
 */
#ifndef RLHF_ROWS_H
#define RLHF_ROWS_H

#include <stdint.h>

#define LANES 16
#define SHORT 1024
#define SHORT_ROWS 8
#define QUERIES 4                   /* of attention, whose gradients are computed side by side */
#define WIDEST_TILE 32              /* columns of a product's tile, over all instruction sets */
#define PRODUCT_SCRATCH (272 * 384) /* floats, for all instruction sets */

typedef struct {
    /* logp[1]; entropy[1] or NULL; statistics[2] = largest logit and log2 of Σ 2^((x - largest) log2(e) / temperature). */
    void (*logprob_forward)(const void *logits, int64_t vocabulary, int type, int64_t label, double inverse_temperature,
                            float *logp, float *entropy, float *statistics);
    /* The same of at most SHORT_ROWS rows of at most SHORT elements: logits[rows], labels[rows], logp[rows] and so on. */
    void (*logprob_forward_short)(const void *const *logits, int64_t rows, int64_t vocabulary, int type,
                                  const int64_t *labels, double inverse_temperature, float *logp, float *entropy,
                                  float *statistics);
    /* The same with the vocabulary in parts. state[4] starts as {-inf, 0, 0, 0}; the label counts from the part's start. */
    void (*logprob_read)(const void *logits, int64_t n, int type, int64_t label, double inverse_temperature,
                         int with_entropy, double *state);
    void (*logprob_finish)(const double *state, double inverse_temperature, float *logp, float *entropy,
                           float *statistics);
    /* grad_logits[vocabulary], of the type of the logits, may be the logits. `stream` bypasses the cache. A label outside
     * the part is in another part of the row. */
    void (*logprob_backward)(const void *logits, int64_t vocabulary, int type, int64_t label,
                             double inverse_temperature, const float *statistics, float entropy, float grad_logp,
                             float grad_entropy, int stream, void *grad_logits);
    /* 0; -1 where the row is no distribution; -2 where memory is short. */
    int (*sample)(const void *logits, int64_t vocabulary, int type, double uniform, double inverse_temperature,
                  int64_t top_k, double top_p, int64_t *id, float *logp, float *filtered_logp);
    /* At most sixteen rows. bootstrap[rows], gammas[rows, tokens] and lams[rows, tokens], where NULL, are 0, gamma, lam. */
    void (*gae_float)(const float *rewards, const float *values, const uint8_t *mask, int64_t rows, int64_t tokens,
                      const float *bootstrap, const float *gammas, const float *lams, double gamma, double lam,
                      int stream, float *advantages, float *returns);
    void (*gae_double)(const double *rewards, const double *values, const uint8_t *mask, int64_t rows, int64_t tokens,
                       const double *bootstrap, const double *gammas, const double *lams, double gamma, double lam,
                       int stream, double *advantages, double *returns);
    /* Sums over the masked elements of a chunk: count and Σ x, then Σ (x - mean)². */
    void (*sum_float)(const float *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum);
    void (*sum_double)(const double *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum);
    double (*squares_float)(const float *x, const uint8_t *mask, int64_t n, double mean);
    double (*squares_double)(const double *x, const uint8_t *mask, int64_t n, double mean);
    void (*scale_float)(const float *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,
                        float *out);
    void (*scale_double)(const double *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,
                         double *out);
    /* out[n] = x σ(z), or, where grad is not NULL, grad times its derivative; float32 or bfloat16, out may be grad.
     * `kind` is an enum activation of activation.h. */
    void (*activation)(const void *x, const void *grad, int64_t n, int type, int kind, void *out);
    /* c[rows, columns] = a b + bias + residual, or c + a b + residual: see product.h. */
    void (*multiply)(const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, int64_t b_n, int64_t rows,
                     int64_t depth, int64_t columns, int add, const float *bias, const float *residual,
                     int64_t residual_row, float *scratch, float *c, int64_t c_row);
    double (*sum_of_squares)(const float *x, int64_t n);
    /* Layer norm, or RMS norm where not `centered`; gradients are added to sums[2, width]: see norm.h. */
    void (*norm)(const float *x, int64_t rows, int64_t width, const float *weight, const float *bias, double epsilon,
                 int centered, float *out);
    void (*norm_gradients)(const float *x, const float *grad, int64_t rows, int64_t width, const float *weight,
                           double epsilon, int centered, float *grad_x, float *sums);
    void (*column_sums)(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out);
    /* Attention of one query, and the gradients of up to four: see attention.h. */
    void (*turn)(const float *rows, int64_t count, int64_t stride, int64_t width, float *turned);
    void (*attend)(const float *query, int64_t width, const float *keys, const float *values, int64_t value_stride,
                   int64_t count, double scale, float *scratch, float *out, float *softmax);
    void (*attend_backward)(const float *queries, const float *grads, const float *softmax, int64_t softmax_stride,
                            int64_t count, int64_t first, int64_t width, int64_t padded, const float *turned_keys,
                            const float *turned_values, const float *keys, double scale, int64_t room, float *weights,
                            float *slopes, float *grad_queries, float *grad_keys, float *grad_values);
    /* Element by element, and rotary embeddings of one head, forward and back: see elementwise.h. */
    void (*combine)(const float *a, const float *b, int64_t n, int product, float *out);
    void (*rotate)(const float *x, int64_t width, const float *cos, const float *sin, int back, float *out);
} row_kernels;

enum instruction_set { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

/* The best set that this processor and operating system have. */
int best_instruction_set(void);

/* The kernels of a set that the processor has. */
const row_kernels *kernels_for(int instruction_set);

/* Rounding to nearest and no flushing of subnormals in the calling thread, whatever its owner set; and back. */
uint32_t enter_default_rounding(void);
void leave_default_rounding(uint32_t saved);

#endif

"""The row kernels of rows.h, for the other extension modules."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uintptr_t


cdef extern from "rows.h":
    enum:
        LANES
        SHORT
        SHORT_ROWS
        QUERIES
        WIDEST_TILE
        PRODUCT_SCRATCH

    ctypedef struct row_kernels:
        void (*logprob_forward)(
            const void *logits, int64_t vocabulary, int type, int64_t label, double inverse_temperature,
            float *logp, float *entropy, float *statistics) noexcept nogil
        void (*logprob_forward_short)(
            const void *const *logits, int64_t rows, int64_t vocabulary, int type, const int64_t *labels,
            double inverse_temperature, float *logp, float *entropy, float *statistics) noexcept nogil
        void (*logprob_read)(
            const void *logits, int64_t n, int type, int64_t label, double inverse_temperature, int with_entropy,
            double *state) noexcept nogil
        void (*logprob_finish)(
            const double *state, double inverse_temperature, float *logp, float *entropy,
            float *statistics) noexcept nogil
        void (*logprob_backward)(
            const void *logits, int64_t vocabulary, int type, int64_t label, double inverse_temperature,
            const float *statistics, float entropy, float grad_logp, float grad_entropy, int stream,
            void *grad_logits) noexcept nogil
        int (*sample)(
            const void *logits, int64_t vocabulary, int type, double uniform, double inverse_temperature,
            int64_t top_k, double top_p, int64_t *id, float *logp, float *filtered_logp) noexcept nogil
        void (*gae_float)(
            const float *rewards, const float *values, const uint8_t *mask, int64_t rows, int64_t tokens,
            const float *bootstrap, const float *gammas, const float *lams, double gamma, double lam,
            int stream, float *advantages, float *returns) noexcept nogil
        void (*gae_double)(
            const double *rewards, const double *values, const uint8_t *mask, int64_t rows, int64_t tokens,
            const double *bootstrap, const double *gammas, const double *lams, double gamma, double lam,
            int stream, double *advantages, double *returns) noexcept nogil
        void (*sum_float)(
            const float *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum) noexcept nogil
        void (*sum_double)(
            const double *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum) noexcept nogil
        double (*squares_float)(const float *x, const uint8_t *mask, int64_t n, double mean) noexcept nogil
        double (*squares_double)(const double *x, const uint8_t *mask, int64_t n, double mean) noexcept nogil
        void (*scale_float)(
            const float *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,
            float *out) noexcept nogil
        void (*scale_double)(
            const double *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,
            double *out) noexcept nogil
        void (*activation)(
            const void *x, const void *grad, int64_t n, int type, int kind, void *out) noexcept nogil
        void (*multiply)(
            const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, int64_t b_n, int64_t rows,
            int64_t depth, int64_t columns, int add, const float *bias, const float *residual, int64_t residual_row,
            float *scratch, float *c, int64_t c_row) noexcept nogil
        double (*sum_of_squares)(const float *x, int64_t n) noexcept nogil
        void (*norm)(
            const float *x, int64_t rows, int64_t width, const float *weight, const float *bias, double epsilon,
            int centered, float *out) noexcept nogil
        void (*norm_gradients)(
            const float *x, const float *grad, int64_t rows, int64_t width, const float *weight, double epsilon,
            int centered, float *grad_x, float *sums) noexcept nogil
        void (*column_sums)(
            const float *x, int64_t rows, int64_t columns, int64_t stride, float *out) noexcept nogil
        void (*turn)(
            const float *rows, int64_t count, int64_t stride, int64_t width, float *turned) noexcept nogil
        void (*attend)(
            const float *query, int64_t width, const float *keys, const float *values, int64_t value_stride,
            int64_t count, double scale, float *scratch, float *out, float *softmax) noexcept nogil
        void (*attend_backward)(
            const float *queries, const float *grads, const float *softmax, int64_t softmax_stride,
            int64_t count, int64_t first, int64_t width, int64_t padded, const float *turned_keys,
            const float *turned_values, const float *keys, double scale, int64_t room, float *weights, float *slopes,
            float *grad_queries, float *grad_keys, float *grad_values) noexcept nogil
        void (*combine)(const float *a, const float *b, int64_t n, int product, float *out) noexcept nogil
        void (*rotate)(
            const float *x, int64_t width, const float *cos, const float *sin, int back, float *out) noexcept nogil


cdef const row_kernels *kernels(int instruction_set) noexcept nogil
cdef uint32_t enter_rounding() noexcept nogil
cdef void leave_rounding(uint32_t saved) noexcept nogil
cdef int threads_for(int64_t rows, int64_t elements, int threads) noexcept nogil

# Memory that a kernel works with, for the caller to free; MemoryError where there is none.
cdef float *floats(int64_t count) except NULL

# Whether an output has pages that are not there yet; and how a thread brings those that it is about to write, at once.
cdef bint untouched(uintptr_t start, int64_t bytes) noexcept nogil
cdef void bring(uintptr_t start, int64_t bytes) noexcept nogil

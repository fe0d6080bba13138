/* All row kernels for one instruction set: setup.py compiles this file once for each, with its flags and -DUNIT_KERNELS. */
#include "rows.h"

#include "activation.h"
#include "attention.h"
#include "elementwise.h"
#include "gae.h"
#include "logprob.h"
#include "norm.h"
#include "product.h"
#include "sampling.h"
#include "squares.h"
#include "whiten.h"

extern const row_kernels UNIT_KERNELS;
const row_kernels UNIT_KERNELS = {
    .logprob_forward = logprob_forward,
    .logprob_forward_short = logprob_forward_short,
    .logprob_read = logprob_read,
    .logprob_finish = logprob_finish,
    .logprob_backward = logprob_backward,
    .sample = sample,
    .gae_float = gae_float,
    .gae_double = gae_double,
    .sum_float = sum_float,
    .sum_double = sum_double,
    .squares_float = squares_float,
    .squares_double = squares_double,
    .scale_float = scale_float,
    .scale_double = scale_double,
    .activation = activation,
    .multiply = multiply,
    .sum_of_squares = sum_of_squares,
    .norm = norm,
    .norm_gradients = norm_gradients,
    .column_sums = column_sums,
    .turn = turn,
    .attend = attend,
    .attend_backward = attend_backward,
    .combine = combine,
    .rotate = rotate,
};

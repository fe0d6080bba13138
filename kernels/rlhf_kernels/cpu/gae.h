/* Generalised advantage estimation over up to sixteen rows at once, one row a lane: Schulman et al. 2016, arXiv
 * 1506.02438, equations 12 and 16.
 *
 * The recursion runs in float64 for both element types, every lane in the same order, so a row does not depend on the
 * rows beside it. The return is the sum of the rounded advantage and the value: returns == advantages + values holds bit
 * for bit. The recursion runs along the rows, so tiles of 16 rows by 16 tokens are turned over on the way in and out.
 */
#ifndef RLHF_GAE_H
#define RLHF_GAE_H

#include "transpose.h"

/* Two vectors of eight lanes are the sixteen rows. */
#define HALVES 2

#define REAL float
#define NAMED(name) name##_float
#define WIDE_LOAD wide_load_float
#define WIDE_STORE wide_store_float
#include "gae_block.h"
#undef REAL
#undef NAMED
#undef WIDE_LOAD
#undef WIDE_STORE

#define REAL double
#define NAMED(name) name##_double
#define WIDE_LOAD wide_load
#define WIDE_STORE wide_store
#include "gae_block.h"
#undef REAL
#undef NAMED
#undef WIDE_LOAD
#undef WIDE_STORE

#endif

"""Matrix products over threads. Tensors arrive as addresses and strides; products.py owns shapes."""

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free

from rlhf_kernels.cpu._rows cimport (
    PRODUCT_SCRATCH, WIDEST_TILE, enter_rounding, floats, kernels, leave_rounding, row_kernels,
)

# Below this many products a second thread costs more than it saves.
cdef int64_t PRODUCTS_A_THREAD = 524288


cpdef void multiply(
    uintptr_t a, int64_t a_row, int64_t a_k, uintptr_t b, int64_t b_k, int64_t b_n, int64_t rows, int64_t depth,
    int64_t columns, bint add, uintptr_t bias, uintptr_t residual, int64_t residual_row, uintptr_t out, int64_t out_row,
    int instruction_set, int threads,
) except *:
    """Fill out[rows, columns] from a[rows, depth] b[depth, columns] as product.h does; strides in floats."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t panels = (columns + WIDEST_TILE - 1) // WIDEST_TILE
    cdef int64_t worthwhile = max(1, min(<int64_t>threads, rows * depth * columns // PRODUCTS_A_THREAD))
    # Threads side by side each lay out all rows of a that do not lie so already; below each other, all columns of b.
    cdef bint below = a_k != 1 and rows > columns
    cdef int64_t first = min(rows if below else panels, worthwhile)
    cdef int64_t second = max(1, min(panels if below else rows, worthwhile // max(first, 1)))
    cdef int64_t across = second if below else first, down = first if below else second
    cdef int64_t pieces = across * down, p, row, end, column, last
    cdef uint32_t saved = 0
    if rows == 0 or columns == 0:
        return
    cdef float *memory = floats(pieces * PRODUCT_SCRATCH + 16)
    cdef float *aligned = <float *>((<uintptr_t>memory + 63) // 64 * 64)
    with nogil:
        with parallel(num_threads=<int>pieces):
            saved = enter_rounding()
            for p in prange(pieces, schedule="static"):
                row = p // across * rows // down
                end = (p // across + 1) * rows // down
                column = p % across * panels // across * WIDEST_TILE
                last = min(columns, (p % across + 1) * panels // across * WIDEST_TILE)
                k.multiply(
                    <const float *>a + row * a_row, a_row, a_k, <const float *>b + column * b_n, b_k, b_n, end - row,
                    depth, last - column, add, (<const float *>bias + column) if bias else NULL,
                    (<const float *>residual + row * residual_row + column) if residual else NULL, residual_row,
                    aligned + p * PRODUCT_SCRATCH, <float *>out + row * out_row + column, out_row)
            leave_rounding(saved)
        free(memory)

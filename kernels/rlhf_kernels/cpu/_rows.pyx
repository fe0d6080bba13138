"""Links the row kernels of all instruction sets and hands them to the other extension modules."""

from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport malloc


cdef extern from "rows.h":
    int best_instruction_set() noexcept nogil
    const row_kernels *kernels_for(int instruction_set) noexcept nogil
    uint32_t enter_default_rounding() noexcept nogil
    void leave_default_rounding(uint32_t saved) noexcept nogil

cdef extern from "pages.h":
    void ask_for_huge_pages(uintptr_t start, int64_t bytes) noexcept nogil
    int pages_are_missing(uintptr_t start, int64_t bytes) noexcept nogil
    void bring_pages(uintptr_t start, int64_t bytes) noexcept nogil


# Below this many elements a second thread costs more than it saves.
cdef int64_t ELEMENTS_A_THREAD = 16384


cdef const row_kernels *kernels(int instruction_set) noexcept nogil:
    return kernels_for(instruction_set)


cdef uint32_t enter_rounding() noexcept nogil:
    return enter_default_rounding()


cdef void leave_rounding(uint32_t saved) noexcept nogil:
    leave_default_rounding(saved)


cdef int threads_for(int64_t rows, int64_t elements, int threads) noexcept nogil:
    cdef int64_t worthwhile = min(rows, elements // ELEMENTS_A_THREAD)
    return <int>max(1, min(worthwhile, threads))


cdef float *floats(int64_t count) except NULL:
    cdef float *memory = <float *>malloc(<size_t>max(1, count) * sizeof(float))
    if memory == NULL:
        raise MemoryError(f"no memory for {count} numbers that a kernel works with")
    return memory


cdef bint untouched(uintptr_t start, int64_t bytes) noexcept nogil:
    return pages_are_missing(start, bytes)


cdef void bring(uintptr_t start, int64_t bytes) noexcept nogil:
    bring_pages(start, bytes)


def expect_writes(uintptr_t start, int64_t byte_count) -> None:
    """Let the operating system add memory that is about to be written as a whole in large pieces."""
    ask_for_huge_pages(start, byte_count)


def best() -> int:
    """The best instruction set of this processor: 0 portable (SSE2), 1 AVX2, 2 AVX-512."""
    return best_instruction_set()

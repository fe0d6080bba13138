/* The run-time choice of instruction set. Compiled for the oldest processor. */
#include "rows.h"

#if defined(__x86_64__)
#include <xmmintrin.h>

extern const row_kernels portable_kernels, avx2_kernels, avx512_kernels;

int best_instruction_set(void) {
    __builtin_cpu_init(); /* asks the operating system too: it must save the wide registers */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
    if (!__builtin_cpu_supports("avx512f")) return AVX2; /* F16C came before AVX2 on every processor */
    return AVX512;
}

const row_kernels *kernels_for(int instruction_set) {
    if (instruction_set == AVX512) return &avx512_kernels;
    return instruction_set == AVX2 ? &avx2_kernels : &portable_kernels;
}

uint32_t enter_default_rounding(void) {
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(0x1F80); /* the power-on state: exceptions masked, round to nearest, subnormals kept */
    return saved;
}
void leave_default_rounding(uint32_t saved) { _mm_setcsr(saved); }

#else
extern const row_kernels portable_kernels;

int best_instruction_set(void) { return PORTABLE; }
const row_kernels *kernels_for(int instruction_set) {
    (void)instruction_set;
    return &portable_kernels;
}
uint32_t enter_default_rounding(void) { return 0; }
void leave_default_rounding(uint32_t saved) { (void)saved; }
#endif

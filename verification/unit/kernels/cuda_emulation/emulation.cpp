// Fibres for cuda_runtime.h beside this, and the functions of torch that only a CUDA build has.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx;

namespace emulation {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t WIDEST = 16;

// What threads wait at: everybody arrives, then everybody goes on.
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    // Two buffers in turn: a lane may write its next value while another still reads the last.
    alignas(16) char values[2][32 * WIDEST];
    unsigned size = 0;
};
struct Fibre {
    ucontext_t start;
    jmp_buf resume;  // unlike swapcontext, a jump asks nothing of the system
    std::vector<char> stack;
    bool started = false, done = false;
    unsigned turn = 0;
};

std::vector<Fibre> fibres;
std::vector<Warp> warps;
Barrier whole_block;
jmp_buf scheduler;
unsigned running, block_size, order_seed, launches;
uint64_t arrivals;
const std::function<void()>* body_of_all;

// What a kernel prints is seen even where the process dies of what it does next, as on a device.
[[maybe_unused]] const int unbuffered = setvbuf(stdout, nullptr, _IONBF, 0);

void fail(const char* what) {
    fprintf(stderr, "emulated CUDA: %s in block %u, thread %u\n", what, blockIdx.x, running);
    abort();
}

void entry() {
    (*body_of_all)();
    fibres[running].done = true;
    _longjmp(scheduler, 1);
}

void run_fibre(unsigned t) {
    running = t;
    threadIdx = dim3(t);
    if (_setjmp(scheduler) != 0) return;
    if (fibres[t].started) _longjmp(fibres[t].resume, 1);
    fibres[t].started = true;
    setcontext(&fibres[t].start);
}

void run_others() {
    if (_setjmp(fibres[running].resume) == 0) _longjmp(scheduler, 1);
}

void wait_at(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    arrivals++;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == generation) run_others();
}

std::vector<std::pair<uintptr_t, uintptr_t>> allowed;

unsigned next_random(unsigned& state) { return state = state * 1664525u + 1013904223u; }

void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; t++) {
        Fibre& fibre = fibres[t];
        fibre.started = fibre.done = false;
        fibre.turn = 0;
        fibre.stack.resize(STACK_BYTES);
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.data();
        fibre.start.uc_stack.ss_size = STACK_BYTES;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, entry, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (order_seed == 1) std::reverse(order.begin(), order.end());
    unsigned state = order_seed, left = threads;
    while (left > 0) {
        if (order_seed > 1)
            for (unsigned i = threads - 1; i > 0; i--) std::swap(order[i], order[(next_random(state) >> 8) % (i + 1)]);
        const unsigned left_before = left;
        const uint64_t arrivals_before = arrivals;
        for (unsigned t : order) {
            if (fibres[t].done) continue;
            run_fibre(t);
            left -= fibres[t].done;
        }
        if (left == left_before && arrivals == arrivals_before) fail("threads wait for others that never come");
    }
    if (whole_block.arrived != 0) fail("a thread left while others wait for it");
}

}  // namespace

void run(dim3 grid, dim3 threads, const std::function<void()>& body) {
    launches++;
    body_of_all = &body;
    block_size = threads.x;
    fibres.resize(std::max<size_t>(fibres.size(), threads.x));
    for (unsigned b = 0; b < grid.x; b++) {
        blockIdx = dim3(order_seed == 0 ? b : grid.x - 1 - b);
        warps.assign((threads.x + 31) / 32, Warp());
        whole_block = Barrier();
        run_block(threads.x);
    }
}

void check_read(const void* address, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + size;
    if (begin % size != 0) fail("a misaligned read");
    for (const auto& range : allowed)
        if (range.first <= begin && end <= range.second) return;
    if (!allowed.empty()) fail("a read outside of the tensors");
}

void block_barrier() { wait_at(whole_block, block_size); }

const void* warp_exchange(const void* mine, size_t size) {
    if (size > WIDEST) fail("a value too wide to exchange");
    Warp& warp = warps[running / 32];
    char* buffer = warp.values[fibres[running].turn++ % 2];
    memcpy(buffer + running % 32 * size, mine, size);
    if (warp.barrier.arrived != 0 && warp.size != size) fail("lanes of a warp meet at different instructions");
    warp.size = static_cast<unsigned>(size);
    wait_at(warp.barrier, 32);
    return buffer;
}

}  // namespace emulation

extern "C" {

void emulation_set_order(unsigned seed) { emulation::order_seed = seed; }
void emulation_allow(uintptr_t begin, uintptr_t end) { emulation::allowed.emplace_back(begin, end); }
unsigned emulation_launches() { return emulation::launches; }

// A CPU build of torch lacks these.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
    *guard = &emulation::launches;
    return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
void torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
    if (error != 0 && asprintf(message, "CUDA error %d", error) < 0) abort();
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
}

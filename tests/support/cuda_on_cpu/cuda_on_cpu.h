// CUDA kernels on one CPU thread, to be checked without a GPU: the threads of a block are fibers, and each runs up to
// the next barrier before the next one runs at all. That is one order of the many that a GPU may take, and the one
// that shows a missing barrier best, if it is tried from both ends.
#pragma once
#include <cstddef>
#include <functional>
#include <math.h>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 { unsigned x, y, z, w; };
static int min(int a, int b) { return a < b ? a : b; }

namespace cuda_on_cpu {
struct Index { int x, y; };
constexpr std::size_t STACK = 1 << 15;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    bool finished;
};

static ucontext_t scheduler;
static Fiber* running;
static std::function<void()> body;
static std::vector<Fiber> fibers;  // kept, for making their stacks takes longer than most kernels

static void start() {
    body();
    running->finished = true;  // and on to `scheduler`
}

// Run one block. Returns false where some threads ended while others wait at a barrier: a GPU would hang.
static bool run_block(int n, int width, bool backwards, Index& thread) {
    for (int i = 0; i < n; i++) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        fiber.finished = false;
        makecontext(&fiber.context, start, 0);
    }
    for (int ended = 0; ended < n;) {
        ended = 0;
        for (int i = 0; i < n; i++) {
            const int index = backwards ? n - 1 - i : i;
            thread = {index % width, index / width};
            running = &fibers[index];
            swapcontext(&scheduler, &running->context);
            ended += running->finished;
        }
        if (0 < ended && ended < n)
            return false;
    }
    return true;
}
}  // namespace cuda_on_cpu

static cuda_on_cpu::Index threadIdx, blockIdx, gridDim;

static void __syncthreads() {
    swapcontext(&cuda_on_cpu::running->context, &cuda_on_cpu::scheduler);
}

// Threads of one row that all come here together, as those of the kernels here do.
template <class T>
static T __shfl_xor_sync(unsigned, T value, int lanes) {
    static T values[1024];
    values[threadIdx.x] = value;
    __syncthreads();
    const T other = values[threadIdx.x ^ lanes];
    __syncthreads();
    return other;
}

namespace cuda_on_cpu {
// Launch a kernel as cuLaunchKernel does: `arguments` points to each of them. Returns 0, or 1 for a hang.
template <class... P, std::size_t... I>
int launch(void (*kernel)(P...), const int* grid, const int* block, bool backwards, void** arguments,
           std::index_sequence<I...>) {
    const int n = block[0] * block[1];
    if ((int)fibers.size() < n)
        fibers.resize(n);
    body = [=] { kernel(*(P*)arguments[I]...); };
    gridDim = {grid[0], grid[1]};
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++)
            if (!run_block(n, block[0], backwards, threadIdx))
                return 1;
    return 0;
}

template <class... P>
int launch(void (*kernel)(P...), const int* grid, const int* block, bool backwards, void** arguments) {
    return launch(kernel, grid, block, backwards, arguments, std::index_sequence_for<P...>());
}
}  // namespace cuda_on_cpu

// The rows of a small batch sorted by target, by a kernel that has a block a row anyway.
#pragma once

#include "block.cuh"

namespace lsoftmax {

struct AddCounts {
  __device__ int operator()(int p, int q) const { return p + q; }
};

// Puts row i in its place: after those with a smaller target, and earlier ones with the same. Each
// block reads all targets, N^2 reads in all; above some thousand rows a sort is faster.
__device__ inline void write_order(int64_t* order, const int64_t* target, int64_t n, int64_t i) {
  const int64_t y = target[i];
  int before = 0;
  constexpr int kInFlight = 4;
  for (int64_t first = threadIdx.x; first < n; first += int64_t{kInFlight} * blockDim.x) {
    int64_t others[kInFlight];
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int64_t k = first + int64_t{m} * blockDim.x;
      if (k < n) others[m] = target[k];
    }
#pragma unroll
    for (int m = 0; m < kInFlight; ++m) {
      const int64_t k = first + int64_t{m} * blockDim.x;
      if (k < n) before += others[m] < y || (others[m] == y && k < i) ? 1 : 0;
    }
  }
  before = block_reduce(before, AddCounts{});
  if (threadIdx.x == 0) order[before] = i;
}

}  // namespace lsoftmax

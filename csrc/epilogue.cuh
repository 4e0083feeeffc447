// What a warp does with finished sums of a tile: exponentials, written to E and summed by row.
#pragma once

#include "block.cuh"
#include "hopper.cuh"
#include "hopper.h"

namespace lsoftmax {

// Each multiplying warp turns its accumulators into rows by way of shared memory of its own: 16
// rows by 64 classes at a time, in 16-byte pieces of 8 classes, swizzled like a tile.
constexpr int kChunkClasses = 64, kPieceClasses = 8, kPieceWords = 4;
constexpr int kPieces = kChunkClasses / kPieceClasses;
constexpr int kWarpRows = 16, kWarpPieces = kWarpRows * kPieces;
constexpr int kMultiplyingWarps = kTileRows / kWarpRows;
constexpr int kStagingBytes = kMultiplyingWarps * kWarpPieces * 16;

struct Tile {
  int64_t row, first_class, number;  // number: of its column of tiles
};

// What is loaded of a row before the products: nothing waits for it until they are done.
struct LoadedRow {
  int64_t y;
  float reference;

  __device__ LoadedRow(const GemmExponentials& p, int64_t row) {
    const int64_t i = row < p.n ? row : p.n - 1;  // beyond the last nothing is stored
    y = p.target[i];
    reference = p.reference[i];
  }
};

// Of one of the two rows of a tile that a thread has sums of, what concerns their exponentials.
struct RowOfTile {
  float reference;
  int end = kTileClasses;  // classes of this tile from here on count as 0: there are none, or the
                           // row is ignored
  int target = -1;         // among this tile's classes, or not

  __device__ RowOfTile(const GemmExponentials& p, const LoadedRow& row, int64_t first_class)
      : reference(row.reference) {
    const int64_t place = row.y - p.first_class - first_class;
    if (p.c - first_class < end) end = static_cast<int>(p.c - first_class);
    if (row.y == p.ignore_index) end = 0;
    if (place >= 0 && place < kTileClasses) target = static_cast<int>(place);
  }
  __device__ bool plain() const { return end == kTileClasses && target < 0; }

  // Two comparisons a logit are a third of the epilogue: most warps have no need of them. The
  // difference first: log2(e) z of a huge z would be off by many units.
  template <bool kPlain, bool kClamp>
  __device__ float exponential(float z, int column) const {
    float above = (z - reference) * kLog2E;
    if (kClamp && above > kSafe) above = kSafe;  // NaN stays
    const float e = hopper::exp2_fast(above);
    return kPlain || (column < end && column != target) ? e : 0.0f;
  }
};

// What one warp does with its 16 rows by 256 classes of finished sums.
struct Epilogue {
  const GemmExponentials& p;
  Tile tile;
  int64_t first_row;       // of the warp
  int warp, lane;          // warp: among the multiplying ones
  LoadedRow upper, lower;  // rows lane / 4 and lane / 4 + 8 of the warp

  __device__ Epilogue(const GemmExponentials& params, const Tile& t, int multiplying_warp)
      : p(params),
        tile(t),
        first_row(t.row + multiplying_warp * kWarpRows),
        warp(multiplying_warp),
        lane(threadIdx.x % kWarp),
        upper(p, first_row + lane / 4),
        lower(p, first_row + lane / 4 + 8) {}

  // A warp has no other to run while it waits: what can be decided once is decided here, so that
  // exponentials, packing and stores are one block of code that hides its own latencies.
  __device__ void finish(const float (&sums)[hopper::kAccumulators]) const {
    const RowOfTile u(p, upper, tile.first_class), l(p, lower, tile.first_class);
    const bool plain = __all_sync(kFullMask, u.plain() && l.plain());
    if (p.e == nullptr) {
      plain ? take<true, false, false>(sums, u, l) : take<false, false, false>(sums, u, l);
    } else if (p.partial != nullptr) {
      plain ? take<true, true, false>(sums, u, l) : take<false, true, false>(sums, u, l);
    } else {  // without sums nobody would see that an exponential is too large
      plain ? take<true, true, true>(sums, u, l) : take<false, true, true>(sums, u, l);
    }
  }

  template <bool kPlain, bool kStore, bool kClamp>
  __device__ void take(const float (&sums)[hopper::kAccumulators], const RowOfTile& u,
                       const RowOfTile& l) const {
    const auto words = hopper::dynamic_shared<uint32_t>() + warp * kWarpPieces * kPieceWords;
    float upper_sum = 0, lower_sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < kTileClasses; chunk += kChunkClasses) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int i = (chunk / kPieceClasses + piece) * 4;  // see kAccumulators
        const int column = chunk + piece * kPieceClasses + lane % 4 * 2;
        const float u0 = u.exponential<kPlain, kClamp>(sums[i], column);
        const float u1 = u.exponential<kPlain, kClamp>(sums[i + 1], column + 1);
        const float l0 = l.exponential<kPlain, kClamp>(sums[i + 2], column);
        const float l1 = l.exponential<kPlain, kClamp>(sums[i + 3], column + 1);
        upper_sum += u0 + u1;
        lower_sum += l0 + l1;
        if (!kStore) continue;
        words[place(lane / 4, piece) * kPieceWords + lane % 4] = hopper::pack_bfloat16(u0, u1);
        words[place(lane / 4 + 8, piece) * kPieceWords + lane % 4] = hopper::pack_bfloat16(l0, l1);
      }
      if (kStore) store<kPlain>(chunk);
    }
    if (p.partial == nullptr) return;
    store_sum(upper_sum, first_row + lane / 4);
    store_sum(lower_sum, first_row + lane / 4 + 8);
  }

  // Of piece `piece` of row `row` of the warp's chunk, in pieces.
  __device__ static int place(int row, int piece) {
    return row * kPieces + (piece ^ row % kPieces);
  }

  // The warp's chunk, to classes from `chunk` of the tile on: 128 bytes of 4 rows at a time. Not to
  // be kept in the L2, which x and w need.
  template <bool kPlain>
  __device__ void store(int chunk) const {
    const auto pieces = hopper::dynamic_shared<uint4>() + warp * kWarpPieces;
    constexpr int kRows = kWarp / kPieces, kTimes = kWarpRows / kRows;
    const int row = lane / kPieces, piece = lane % kPieces;
    const int64_t i = first_row + row, j = tile.first_class + chunk + piece * kPieceClasses;
    uint4 values[kTimes];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kTimes; ++k) values[k] = pieces[place(row + k * kRows, piece)];
    __syncwarp();  // before the next chunk overwrites this one
#pragma unroll
    for (int k = 0; k < kTimes; ++k) {
      if (i + k * kRows < p.n && (kPlain || j < p.c)) {
        __stcs(reinterpret_cast<uint4*>(p.e + (i + k * kRows) * p.e_stride + j), values[k]);
      }
    }
  }

  // The four lanes of a row add what they have, in an order that is always the same.
  __device__ void store_sum(float sum, int64_t row) const {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0 && row < p.n) p.partial[row * class_tiles(p.c) + tile.number] = sum;
  }
};

}  // namespace lsoftmax

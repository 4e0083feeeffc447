// Device functions that <math.h> lacks, and the built-in vector types.
#pragma once

#include <math.h>

#include <type_traits>

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {

inline float rsqrt_(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt_(double x) { return 1.0 / sqrt(x); }

template <typename T>
T load_(const T* address) {
  return *address;
}
template <typename T>
void store_(T* address, std::common_type_t<T> value) {
  *address = value;
}

}  // namespace emulation

// Macros, because a C library may declare functions of some of these names.
#define rsqrt ::emulation::rsqrt_
#define rsqrtf ::emulation::rsqrt_
#define __expf expf
#define __logf logf
#define __ldg ::emulation::load_
#define __ldcs ::emulation::load_
#define __ldcg ::emulation::load_
#define __stcs ::emulation::store_
#define __stcg ::emulation::store_

inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

// CUDA has ::min and ::max for every mix of arithmetic types.
template <typename A, typename B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

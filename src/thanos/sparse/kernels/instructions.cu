// Products of packed matrices (docs/formats.md), compiled at run time. cuda.py says which files make up a kernel.
//
// Macros set by the caller. N: values per row of each tile, 0 if tiles differ (bitmap). B: tokens of a pass. U: tiles that a warp
// loads at the same time. SPLITS: parts of the columns, each processed by a block of a cluster. HALF: 1 for float16, 0 for
// bfloat16.
//
// This file: conversion of numbers, and instructions that C++ lacks, in inline assembly.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define ALL 0xffffffffu

__device__ __forceinline__ float widen(u16 v) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((u32)v << 16);
#endif
}
__device__ __forceinline__ float low(u32 q) {
#if HALF
  return widen((u16)(q & 0xffffu));
#else
  return __uint_as_float(q << 16);
#endif
}
__device__ __forceinline__ float high(u32 q) {
#if HALF
  return widen((u16)(q >> 16));
#else
  return __uint_as_float(q & 0xffff0000u);
#endif
}
__device__ __forceinline__ u16 narrow(float f) {
  u16 v;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// Weights are read once, so they are not cached in L1.
__device__ __forceinline__ uint4 load16(const char* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load8(const char* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load4(const char* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

#if SPLITS > 1
#define CLUSTER __cluster_dims__(1, SPLITS, 1)
// Wait for all blocks of the cluster. Afterwards all that they wrote is visible.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Return the value at the same address of shared memory in another block of the cluster.
__device__ __forceinline__ float remote(const float* p, int rank) {
  u32 here = (u32)__cvta_generic_to_shared(p), there;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
  return v;
}
#else
#define CLUSTER
__device__ __forceinline__ float remote(const float* p, int) { return *p; }
#endif

// c += a · b for a (16 × 16) and b (16 × 8), in the lanes' layout of the mma instruction.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
  asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

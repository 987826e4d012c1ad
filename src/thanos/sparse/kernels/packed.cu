// Products of packed matrices (docs/formats.md), compiled at run time. A lane is a row of a strip of 32 rows.
//
// Macros set by the caller: N values a row of each tile, 0 if tiles differ (bitmap); B tokens at once; U tiles of a warp in
// flight; HALF 1 for float16, 0 for bfloat16. Sums are float32. Their order depends on the shape alone: a warp adds its tiles
// from left to right, then the warps' sums are added, then those of the splits. No float atomics.

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

// Weights are read once: they need no place in the first cache.
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

struct Tile {
  u32 mask;
  uint4 eights[4];
  uint2 four;
  u32 two;
  u16 one;
};

// Where a tile is, and how many values a row it stores.
__device__ __forceinline__ const char* find(const char* words, const int* offsets, i64 index, int& n) {
#if N
  n = N;
  return words + index * (128 + 64 * N);
#else
  int first = offsets[index];
  n = offsets[index + 1] - first - 2;
  return words + (i64)first * 64;
#endif
}

__device__ __forceinline__ void fetch(Tile& t, const char* p, int n, int lane) {
  t.mask = load4(p + 4 * lane);
  p += 128;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < (n >> 3)) t.eights[i] = load16(p + 512 * i + 16 * lane);
  p += 512 * (n >> 3);
  if (n & 4) {
    t.four = load8(p + 8 * lane);
    p += 256;
  }
  if (n & 2) {
    t.two = load4(p + 4 * lane);
    p += 128;
  }
  if (n & 1) t.one = *(const u16*)(p + 2 * lane);
}

// The column of the next value is the highest bit of the mask that is left.
#define STEP(value, which)                                                     \
  {                                                                            \
    int c = __clz(m);                                                          \
    m ^= 0x80000000u >> c;                                                     \
    float v = value;                                                           \
    _Pragma("unroll") for (int b = 0; b < B; b++) a[b][which] += v * __shfl_sync(ALL, x[b], c); \
  }
#define PAIR(q) { STEP(low(q), 0) STEP(high(q), 1) }

__device__ __forceinline__ void add(float (&a)[B][2], const Tile& t, int n, const float (&x)[B]) {
  u32 m = t.mask;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < (n >> 3)) {
      PAIR(t.eights[i].x) PAIR(t.eights[i].y) PAIR(t.eights[i].z) PAIR(t.eights[i].w)
    }
  if (n & 4) {
    PAIR(t.four.x) PAIR(t.four.y)
  }
  if (n & 2) PAIR(t.two)
  if (n & 1) STEP(widen(t.one), 0)
}

__device__ __forceinline__ void store(u16* y, const u16* bias, int has_bias, float sum, int row, int token, int rows, int tokens) {
  if (row < rows && token < tokens) {
    if (has_bias) sum += widen(bias[row]);
    y[(i64)token * rows + row] = narrow(sum);
  }
}

// Grid: strips × splits of the columns × groups of B tokens. At most 16 warps a block.
extern "C" __global__ void __launch_bounds__(512)
multiply(const char* words, const int* offsets, const u16* x, const u16* bias, u16* y, float* parts, u32* counts,
         int rows, int columns, int tokens, int tiles, int splits, int has_bias) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int strip = blockIdx.x, split = blockIdx.y, first = blockIdx.z * B;
  __shared__ float sums[16][B][32];
  __shared__ u32 done;
  const int each = (tiles + splits - 1) / splits, end = min(tiles, (split + 1) * each);
  float a[B][2];
#pragma unroll
  for (int b = 0; b < B; b++) a[b][0] = a[b][1] = 0.0f;
  for (int g = split * each + w * U; g < end; g += warps * U) {
    Tile t[U];
    int n[U];
    float xs[U][B];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        const char* p = find(words, offsets, (i64)strip * tiles + g + u, n[u]);
        fetch(t[u], p, n[u], lane);
        int column = (g + u) * 32 + lane;
#pragma unroll
        for (int b = 0; b < B; b++)
          xs[u][b] = column < columns ? widen(x[(i64)min(first + b, tokens - 1) * columns + column]) : 0.0f;
      }
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) add(a, t[u], n[u], xs[u]);
  }
#pragma unroll
  for (int b = 0; b < B; b++) sums[w][b][lane] = a[b][0] + a[b][1];
  __syncthreads();
  const i64 group = (i64)strip * gridDim.z + blockIdx.z;
  for (int b = w; b < B; b += warps) {
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += sums[i][b][lane];
    if (splits == 1)
      store(y, bias, has_bias, sum, strip * 32 + lane, first + b, rows, tokens);
    else
      parts[((group * splits + split) * B + b) * 32 + lane] = sum;
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) done = atomicAdd(counts + group, 1u);
  __syncthreads();
  if (done != splits - 1) return;  // the last block of these rows adds the parts, always in the same order
  __threadfence();
  for (int b = w; b < B; b += warps) {
    float sum = 0.0f;
    for (int i = 0; i < splits; i++) sum += __ldcg(parts + ((group * splits + i) * B + b) * 32 + lane);
    store(y, bias, has_bias, sum, strip * 32 + lane, first + b, rows, tokens);
  }
}

// The dense matrix. A warp is a tile; 8 warps a block.
#define PUT(value)               \
  {                              \
    int c = __clz(m);            \
    m ^= 0x80000000u >> c;       \
    row[c] = (u16)(value);       \
  }
#define PUT2(q) { PUT((q) & 0xffffu) PUT((q) >> 16) }

extern "C" __global__ void __launch_bounds__(256)
expand(const char* words, const int* offsets, u16* out, int rows, int columns, int tiles, int count) {
  __shared__ u16 dense[8][32][34];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const int index = blockIdx.x * 8 + w;
  if (index >= count) return;
  u16* row = dense[w][lane];
  for (int i = 0; i < 32; i++) row[i] = 0;
  int n;
  const char* p = find(words, offsets, index, n);
  Tile t;
  fetch(t, p, n, lane);
  u32 m = t.mask;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < (n >> 3)) {
      PUT2(t.eights[i].x) PUT2(t.eights[i].y) PUT2(t.eights[i].z) PUT2(t.eights[i].w)
    }
  if (n & 4) {
    PUT2(t.four.x) PUT2(t.four.y)
  }
  if (n & 2) PUT2(t.two)
  if (n & 1) PUT(t.one)
  __syncwarp();
  const int top = index / tiles * 32, column = index % tiles * 32 + lane;
  for (int i = 0; i < 32; i++)
    if (top + i < rows && column < columns) out[(i64)(top + i) * columns + column] = dense[w][i][lane];
}

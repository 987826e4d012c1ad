// Products of packed matrices (docs/formats.md), compiled at run time.
//
// Macros set by the caller: N values a row of each tile, 0 if tiles differ (bitmap); B tokens of a pass; U tiles of a warp whose
// loads are under way; SPLITS parts of the columns, each a block of a cluster; HALF 1 for float16, 0 for bfloat16.
//
// A block multiplies one strip of 32 rows. Sums are float32, and their order depends on the shape and the macros alone, not on
// the number of tokens: a warp adds its tiles from left to right, then the warps' sums are added, then those of the splits. No
// atomics. Up to four matrices that share their input are multiplied in one launch: a strip belongs to one of them.

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

// An offset: a block reads neighbours, which the first cache may keep.
__device__ __forceinline__ int load_offset(const int* p) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

#if SPLITS > 1
#define CLUSTER __cluster_dims__(1, SPLITS, 1)
// All blocks of the cluster have come here, and what they wrote can be read.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The value that another block of the cluster has at this place of its shared memory.
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

// c += a · b for a 16 × 16 and b 16 × 8, as the lanes hold them.
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

struct Tile {
  u32 mask;
  uint4 eights[4];
  uint2 four;
  u32 two;
  u16 one;
  u32 rest;     // two values of the tail, in the lanes that it reaches
  int n, tail;  // values a row, units of the tail
};

#if N
#define VALUES(t) N
#define TAIL(t) 0
#else
#define VALUES(t) (t).n
#define TAIL(t) (t).tail
#endif

// Where a warp's next tiles begin, read a round of U tiles before they are. ``first``: the strip's first tile.
struct Ahead {
  const char* words;
  const int* offsets;
  i64 first;
  int tiles;
  int ends[U + 1];

  __device__ __forceinline__ Ahead(const char* words, const int* offsets, i64 first, int tiles)
      : words(words), offsets(offsets), first(first), tiles(tiles) {}

  __device__ __forceinline__ void look(int tile) {
#if !N
#pragma unroll
    for (int u = 0; u <= U; u++) ends[u] = load_offset(offsets + first + min(tile + u, tiles));
#endif
  }

  // A lane reads its row of a tile, the u-th from where ``look`` looked: every load of the warp is one contiguous range.
  __device__ __forceinline__ void fetch(Tile& t, int tile, int u, int lane) const {
#if N
    const int n = N;
    const char* p = words + (first + tile) * (128 + 64 * N);
#else
    const int begin = ends[u] >> 2;
    const int tail = ends[u] & 3, n = (ends[u + 1] >> 2) - begin - 2 - tail;
    const char* p = words + (i64)begin * 64;
    t.n = n;
    t.tail = tail;
#endif
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
#if !N
    if (lane < 16 * tail) t.rest = load4(p + 64 * (n & 1) + 4 * lane);
#endif
  }
};

// Put a tile's tail into shared memory, 32 words of the warp; return where the lane's ``more`` values begin: behind those of the
// lanes below, at most 32 each.
__device__ __forceinline__ const u16* spread(u32* to, const Tile& t, int more, int lane) {
  __syncwarp();
  to[lane] = t.rest;
  __syncwarp();
  const u32 below = (1u << lane) - 1;
  int sum = 0;
#pragma unroll
  for (int bit = 0; bit < 3; bit++) sum += __popc(__ballot_sync(ALL, more >> bit & 1) & below) << bit;
  if (__any_sync(ALL, more > 7))
#pragma unroll
    for (int bit = 3; bit < 6; bit++) sum += __popc(__ballot_sync(ALL, more >> bit & 1) & below) << bit;
  return (const u16*)to + sum;
}

// The matrices of a launch: their tiles, offsets, biases (null: none), outputs, rows, and (from the second on) first strips.
#define MATRICES                                                                                                  \
  const char *w0, const char *w1, const char *w2, const char *w3, const int *o0, const int *o1, const int *o2,    \
      const int *o3, const u16 *b0, const u16 *b1, const u16 *b2, const u16 *b3, u16 *y0, u16 *y1, u16 *y2,       \
      u16 *y3, int r0, int r1, int r2, int r3, int s1, int s2, int s3

struct Matrix {
  const char* words;
  const int* offsets;
  const u16* bias;  // null: none
  u16* y;
  int rows, strip;
};

__device__ __forceinline__ Matrix choose(int strip, MATRICES) {
  if (strip >= s3) return {w3, o3, b3, y3, r3, strip - s3};
  if (strip >= s2) return {w2, o2, b2, y2, r2, strip - s2};
  if (strip >= s1) return {w1, o1, b1, y1, r1, strip - s1};
  return {w0, o0, b0, y0, r0, strip};
}
#define CHOOSE choose(blockIdx.x, w0, w1, w2, w3, o0, o1, o2, o3, b0, b1, b2, b3, y0, y1, y2, y3, r0, r1, r2, r3, s1, s2, s3)

__device__ __forceinline__ void store(const Matrix& m, float sum, int lane, int token, int tokens) {
  const int row = m.strip * 32 + lane;
  if (row < m.rows && token < tokens) {
    if (m.bias) sum += widen(m.bias[row]);
    m.y[(i64)token * m.rows + row] = narrow(sum);
  }
}

// Add the totals of the splits, B × 32 of each block of the cluster in shared memory, and store the result.
__device__ __forceinline__ void finish(const Matrix& m, const float* totals, int first, int tokens) {
#if SPLITS > 1
  cluster_wait();
#else
  __syncthreads();
#endif
  if (blockIdx.y == 0)
    for (int i = threadIdx.x; i < B * 32; i += blockDim.x) {
      float sum = totals[i];
#pragma unroll
      for (int rank = 1; rank < SPLITS; rank++) sum += remote(totals + i, rank);
      store(m, sum, i & 31, first + (i >> 5), tokens);
    }
#if SPLITS > 1
  cluster_wait();  // the other blocks keep their totals until they are read
#endif
}

#if B % 8
// Few tokens: a lane is a row. The column of its next value is the highest bit of the mask that is left; the lane of that column
// holds the entry of x.
#define STEP(value, which)                                                                      \
  {                                                                                             \
    int c = __clz(m);                                                                           \
    m ^= 0x80000000u >> c;                                                                      \
    float v = value;                                                                            \
    _Pragma("unroll") for (int b = 0; b < B; b++) a[b][which] += v * __shfl_sync(ALL, x[b], c); \
  }
#define PAIR(q) { STEP(low(q), 0) STEP(high(q), 1) }

// One of the values in the tail, for the lanes that have any left. The others only lend their entry of x.
#define TAKE(value, which)                                                  \
  {                                                                         \
    const int c = __clz(m);                                                 \
    const bool mine = m != 0;                                               \
    float v = 0.0f;                                                         \
    if (mine) v = value;                                                    \
    m &= 0x7fffffffu >> (c & 31);                                           \
    _Pragma("unroll") for (int b = 0; b < B; b++) {                         \
      const float other = __shfl_sync(ALL, x[b], c);                        \
      if (mine) a[b][which] += v * other;                                   \
    }                                                                       \
  }

__device__ __forceinline__ void add(float (&a)[B][2], const Tile& t, u32* tails, int lane, const float (&x)[B]) {
  const int n = VALUES(t);
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
  if (TAIL(t)) {
    const u16* from = spread(tails, t, __popc(m), lane);
    for (; __any_sync(ALL, m); from += 2) {
      TAKE(widen(from[0]), 0)
      TAKE(widen(from[1]), 1)
    }
  }
}

// Grid: strips × SPLITS × groups of B tokens. At most 16 warps a block.
extern "C" __global__ void CLUSTER __launch_bounds__(512)
few(MATRICES, const u16* x, int columns, int tokens, int tiles) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = blockIdx.z * B;
  __shared__ float sums[16][B][32], totals[B * 32];
  __shared__ u32 tails[N ? 1 : 16][32];
  const Matrix m = CHOOSE;
  const int each = (tiles + SPLITS - 1) / SPLITS, end = min(tiles, ((int)blockIdx.y + 1) * each), step = warps * U;
  float a[B][2];
#pragma unroll
  for (int b = 0; b < B; b++) a[b][0] = a[b][1] = 0.0f;
  Tile t[U];
  float xs[U][B];
  Ahead ahead(m.words, m.offsets, (i64)m.strip * tiles, tiles);
  auto load = [&](int u, int tile) {
    ahead.fetch(t[u], tile, u, lane);
    const int column = tile * 32 + lane;
#pragma unroll
    for (int b = 0; b < B; b++)
      xs[u][b] = column < columns ? widen(x[(i64)min(first + b, tokens - 1) * columns + column]) : 0.0f;
  };
  int g = blockIdx.y * each + w * U;
  ahead.look(g);
#pragma unroll
  for (int u = 0; u < U; u++)
    if (g + u < end) load(u, g + u);
  for (; g < end; g += step) {
    ahead.look(g + step);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        add(a, t[u], tails[N ? 0 : w], lane, xs[u]);
        if (g + step + u < end) load(u, g + step + u);  // while the other tiles are added
      }
  }
#pragma unroll
  for (int b = 0; b < B; b++) sums[w][b][lane] = a[b][0] + a[b][1];
  __syncthreads();
  for (int b = w; b < B; b += warps) {
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += sums[i][b][lane];
    totals[b * 32 + lane] = sum;
  }
  finish(m, totals, first, tokens);
}
#endif

// More tokens, and expansion: the warp puts a tile's values into shared memory, row by row, and a lane gathers 8 columns of four
// rows. The rows lie an odd number of 16 bytes apart, so that they begin in different banks.
#define STRIDE (N == 0 || N > 24 ? 80 : N > 8 ? 48 : 16)

__device__ __forceinline__ void stage(char* to, u32* tails, const Tile& t, int lane) {
  const int n = VALUES(t);
  to += STRIDE * lane;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < (n >> 3)) *(uint4*)(to + 16 * i) = t.eights[i];
  to += 16 * (n >> 3);
  if (n & 4) {
    *(uint2*)to = t.four;
    to += 8;
  }
  if (n & 2) {
    *(u32*)to = t.two;
    to += 4;
  }
  if (n & 1) {
    *(u16*)to = t.one;
    to += 2;
  }
  if (TAIL(t)) {
    const int more = __popc(t.mask) - n;
    const u16* from = spread(tails, t, more, lane);
    for (int i = 0; i < more; i++) ((u16*)to)[i] = from[i];
  }
}

// Columns 8·part to 8·part + 7 of a row with this mask, from its staged values. Every column reads the next value, kept or not:
// that costs less than a branch. So a lane may read one value beyond its row.
__device__ __forceinline__ uint4 gather(const char* from, u32 mask, int part) {
  from += 2 * __popc(mask & ~(ALL >> (8 * part)));
  mask <<= 8 * part;
  u32 q[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int even = (int)mask >> 31, odd = (int)(mask << 1) >> 31;  // all bits set if the column is kept
    const u32 first = *(const u16*)from;
    from -= 2 * even;
    const u32 second = *(const u16*)from;
    from -= 2 * odd;
    mask <<= 2;
    q[i] = (first | second << 16) & ((even & 0xffff) | odd << 16);
  }
  return make_uint4(q[0], q[1], q[2], q[3]);
}

// Eight columns of a row of a dense matrix from a column on, with zeros beyond its end.
__device__ __forceinline__ uint4 eight(const u16* row, int column, int columns, int aligned) {
  if (aligned && column < columns) return __ldg((const uint4*)(row + column));
  u32 q[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 even = column + 2 * i < columns ? row[column + 2 * i] : 0;
    u32 odd = column + 2 * i + 1 < columns ? row[column + 2 * i + 1] : 0;
    q[i] = even | odd << 16;
  }
  return make_uint4(q[0], q[1], q[2], q[3]);
}

#if B % 8 == 0
// Many tokens: the tensor cores multiply the gathered tile. Grid as above; at most 8 warps a block. ``aligned``: every eight
// columns of x begin at a multiple of 16 bytes. The order of the columns within a product is that of the lanes, for both factors.
extern "C" __global__ void CLUSTER __launch_bounds__(256)
many(MATRICES, const u16* x, int columns, int tokens, int tiles, int aligned) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = blockIdx.z * B, row = lane >> 2, part = lane & 3;
  __shared__ float totals[B * 32];
  __shared__ __align__(16) char memory[8 * (STRIDE > 4 * B ? STRIDE * 32 : 128 * B) + 16];
  __shared__ u32 tails[N ? 1 : 8][32];
  const Matrix m = CHOOSE;
  const int each = (tiles + SPLITS - 1) / SPLITS, end = min(tiles, ((int)blockIdx.y + 1) * each), step = warps * U;
  char* own = memory + STRIDE * 32 * w;
  float c[2][B / 8][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int k = 0; k < B / 8; k++)
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][k][j] = 0.0f;
  Tile t[U];
  Ahead ahead(m.words, m.offsets, (i64)m.strip * tiles, tiles);
  int g = blockIdx.y * each + w * U;
  ahead.look(g);
#pragma unroll
  for (int u = 0; u < U; u++)
    if (g + u < end) ahead.fetch(t[u], g + u, u, lane);
  for (; g < end; g += step) {
    ahead.look(g + step);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        uint4 xs[B / 8];
#pragma unroll
        for (int k = 0; k < B / 8; k++) {
          const int token = first + 8 * k + row;
          xs[k] = make_uint4(0, 0, 0, 0);
          if (token < tokens) xs[k] = eight(x + (i64)token * columns, (g + u) * 32 + 8 * part, columns, aligned);
        }
        stage(own, tails[N ? 0 : w], t[u], lane);
        const u32 mask = t[u].mask;
        if (g + step + u < end) ahead.fetch(t[u], g + step + u, u, lane);  // while this tile is gathered and multiplied
        __syncwarp();
        uint4 q[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          q[i] = gather(own + STRIDE * (row + 8 * i), __shfl_sync(ALL, mask, row + 8 * i), part);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int k = 0; k < B / 8; k++) {
            mma(c[i][k], q[2 * i].x, q[2 * i + 1].x, q[2 * i].y, q[2 * i + 1].y, xs[k].x, xs[k].y);
            mma(c[i][k], q[2 * i].z, q[2 * i + 1].z, q[2 * i].w, q[2 * i + 1].w, xs[k].z, xs[k].w);
          }
      }
  }
  __syncthreads();  // the warps' sums take the place of the staged values
  float* sums = (float*)memory;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int k = 0; k < B / 8; k++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[(w * B + 8 * k + 2 * part + (j & 1)) * 32 + 16 * i + 8 * (j >> 1) + row] = c[i][k][j];
  __syncthreads();
  for (int i = threadIdx.x; i < B * 32; i += blockDim.x) {
    float sum = 0.0f;
    for (int k = 0; k < warps; k++) sum += sums[k * B * 32 + i];
    totals[i] = sum;
  }
  finish(m, totals, first, tokens);
}
#endif

// The dense matrix. A warp is a tile; 8 warps a block. ``aligned``: every eight columns of a row begin at a multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
expand(const char* words, const int* offsets, u16* out, int rows, int columns, int tiles, int count, int aligned) {
  __shared__ __align__(16) char memory[8 * STRIDE * 32 + 16];
  __shared__ u32 tails[N ? 1 : 8][32];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const int index = blockIdx.x * 8 + w;
  if (index >= count) return;
  char* own = memory + STRIDE * 32 * w;
  Ahead ahead(words, offsets, 0, count);
  ahead.look(index);
  Tile t;
  ahead.fetch(t, index, 0, lane);
  stage(own, tails[N ? 0 : w], t, lane);
  __syncwarp();
  const int top = index / tiles * 32, column = index % tiles * 32 + 8 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int down = (lane >> 2) + 8 * i;
    const uint4 q = gather(own + STRIDE * down, __shfl_sync(ALL, t.mask, down), lane & 3);
    if (top + down >= rows) continue;
    u16* to = out + (i64)(top + down) * columns + column;
    if (aligned) {
      if (column < columns) *(uint4*)to = q;
      continue;
    }
    const u32 parts[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (column + k < columns) to[k] = (u16)(parts[k >> 1] >> 16 * (k & 1));
  }
}

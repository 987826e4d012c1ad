// Few tokens: each lane computes one row. The column of its next value is the highest bit of the remaining mask; the lane of
// that column holds the entry of x.
#define STEP(value, which)                                                                      \
  {                                                                                             \
    int c = __clz(m);                                                                           \
    m ^= 0x80000000u >> c;                                                                      \
    float v = value;                                                                            \
    _Pragma("unroll") for (int b = 0; b < B; b++) a[b][which] += v * __shfl_sync(ALL, x[b], c); \
  }
#define PAIR(q) { STEP(low(q), 0) STEP(high(q), 1) }

// Add the product of a value of the tail in the lanes that have one left. The other lanes only provide their entry of x.
#define TAKE(value, which)                            \
  {                                                   \
    const int c = __clz(m);                           \
    const bool mine = m != 0;                         \
    float v = 0.0f;                                   \
    if (mine) v = value;                              \
    m &= 0x7fffffffu >> (c & 31);                     \
    _Pragma("unroll") for (int b = 0; b < B; b++) {   \
      const float other = __shfl_sync(ALL, x[b], c);  \
      if (mine) a[b][which] += v * other;             \
    }                                                 \
  }

// Add a tile's products; return the rest of the mask: the row's columns whose values are in the tail.
__device__ __forceinline__ u32 add(float (&a)[B][2], const Tile& t, int n, const float (&x)[B]) {
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
  return m;
}

// Grid: strips × SPLITS × groups of B tokens. At most 16 warps per block.
extern "C" __global__ void CLUSTER __launch_bounds__(512)
few(MATRICES, const u16* x, int columns, int tokens, int tiles) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = blockIdx.z * B;
  __shared__ float sums[16][B][32], totals[B * 32];
#if !N
  __shared__ u32 tails[16][32];
#endif
  const Matrix matrix = CHOOSE;
  const int each = (tiles + SPLITS - 1) / SPLITS, end = min(tiles, ((int)blockIdx.y + 1) * each);
  float a[B][2];
#pragma unroll
  for (int b = 0; b < B; b++) a[b][0] = a[b][1] = 0.0f;
  for (int g = blockIdx.y * each + w * U; g < end; g += warps * U) {
    Tile t[U];
    int n[U];
    float xs[U][B];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        const char* p = find(matrix.words, matrix.offsets, (i64)matrix.strip * tiles + g + u, n[u]);
        fetch(t[u], p, n[u], lane);
        int column = (g + u) * 32 + lane;
#pragma unroll
        for (int b = 0; b < B; b++)
          xs[u][b] = column < columns ? widen(x[(i64)min(first + b, tokens - 1) * columns + column]) : 0.0f;
      }
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        u32 m = add(a, t[u], n[u], xs[u]);
#if !N
        if (__any_sync(ALL, m)) {
          const u16* from = spread(tails[w], matrix.words, matrix.offsets, (i64)matrix.strip * tiles + g + u, __popc(m), lane);
          for (; __any_sync(ALL, m); from += 2) {
            const float(&x)[B] = xs[u];
            TAKE(widen(from[0]), 0)
            TAKE(widen(from[1]), 1)
          }
        }
#endif
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
  finish(matrix, totals, first, tokens);
}

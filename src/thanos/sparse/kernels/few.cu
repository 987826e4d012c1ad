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

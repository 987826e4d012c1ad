// Return eight columns of a row of a dense matrix, from ``column`` on, with zeros beyond the row's end.
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

// Many tokens: the tensor cores multiply the gathered tile. Grid: strips × SPLITS × groups of B tokens. At most 8 warps per
// block. ``aligned``: every eight columns of x begin at a multiple of 16 bytes. Within a product, the columns of both factors
// are in the order in which the lanes hold them.
extern "C" __global__ void CLUSTER __launch_bounds__(256)
many(MATRICES, const u16* x, int columns, int tokens, int tiles, int aligned) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = blockIdx.z * B, row = lane >> 2, part = lane & 3;
  __shared__ float totals[B * 32];
  __shared__ __align__(16) char memory[8 * (STRIDE > 4 * B ? STRIDE * 32 : 128 * B) + 16];
#if !N
  __shared__ u32 tails[8][32];
#endif
  const Matrix m = CHOOSE;
  const int each = (tiles + SPLITS - 1) / SPLITS, end = min(tiles, ((int)blockIdx.y + 1) * each);
  char* own = memory + STRIDE * 32 * w;
  float c[2][B / 8][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int k = 0; k < B / 8; k++)
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][k][j] = 0.0f;
  for (int g = blockIdx.y * each + w * U; g < end; g += warps * U) {
    Tile t[U];
    int n[U];
    uint4 xs[U][B / 8];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        const char* p = find(m.words, m.offsets, (i64)m.strip * tiles + g + u, n[u]);
        fetch(t[u], p, n[u], lane);
#pragma unroll
        for (int k = 0; k < B / 8; k++) {
          const int token = first + 8 * k + row;
          xs[u][k] = make_uint4(0, 0, 0, 0);
          if (token < tokens) xs[u][k] = eight(x + (i64)token * columns, (g + u) * 32 + 8 * part, columns, aligned);
        }
      }
#pragma unroll
    for (int u = 0; u < U; u++)
      if (g + u < end) {
        stage(own, t[u], n[u], lane);
#if !N
        stage_tail(own, tails[w], m.words, m.offsets, (i64)m.strip * tiles + g + u, t[u].mask, n[u], lane);
#endif
        __syncwarp();
        uint4 q[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          q[i] = gather(own + STRIDE * (row + 8 * i), __shfl_sync(ALL, t[u].mask, row + 8 * i), part);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int k = 0; k < B / 8; k++) {
            mma(c[i][k], q[2 * i].x, q[2 * i + 1].x, q[2 * i].y, q[2 * i + 1].y, xs[u][k].x, xs[u][k].y);
            mma(c[i][k], q[2 * i].z, q[2 * i + 1].z, q[2 * i].w, q[2 * i + 1].w, xs[u][k].z, xs[u][k].w);
          }
      }
  }
  __syncthreads();  // the warps' sums overwrite the staged values
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

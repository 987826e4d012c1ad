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

// Tokens whose sums are added at once, for which shared memory has room.
#define SUMMED (B < 32 ? B : 32)

// Many tokens: the tensor cores multiply the gathered tile. Grid as above; at most 8 warps a block. ``aligned``: every eight
// columns of x begin at a multiple of 16 bytes. The order of the columns within a product is that of the lanes, for both factors.
extern "C" __global__ void CLUSTER __launch_bounds__(256)
many(MATRICES, const u16* x, int columns, int tokens, int tiles, int aligned) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = blockIdx.z * B, row = lane >> 2, part = lane & 3;
  __shared__ float totals[B * 32];
  __shared__ __align__(16) char memory[8 * (STRIDE > 4 * SUMMED ? STRIDE * 32 : 128 * SUMMED) + 16];
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
#pragma unroll
  for (int begin = 0; begin < B; begin += SUMMED) {
    __syncthreads();  // the warps' sums take the place of the staged values, or of those before
    float* sums = (float*)memory;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int k = 0; k < SUMMED / 8; k++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          sums[(w * SUMMED + 8 * k + 2 * part + (j & 1)) * 32 + 16 * i + 8 * (j >> 1) + row] = c[i][begin / 8 + k][j];
    __syncthreads();
    for (int i = threadIdx.x; i < SUMMED * 32; i += blockDim.x) {
      float sum = 0.0f;
      for (int k = 0; k < warps; k++) sum += sums[k * SUMMED * 32 + i];
      totals[begin * 32 + i] = sum;
    }
  }
  finish(m, totals, first, tokens);
}

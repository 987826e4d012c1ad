// Decode a packed matrix into a dense one. One warp for each tile, 8 warps per block. ``aligned``: every eight columns of a row
// begin at a multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
expand(const char* words, const int* offsets, u16* out, int rows, int columns, int tiles, int count, int aligned) {
  __shared__ __align__(16) char memory[8 * STRIDE * 32 + 16];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const int index = blockIdx.x * 8 + w;
  if (index >= count) return;
  char* own = memory + STRIDE * 32 * w;
  int n;
  const char* p = find(words, offsets, index, n);
  Tile t;
  fetch(t, p, n, lane);
  stage(own, t, n, lane);
#if !N
  __shared__ u32 tails[8][32];
  stage_tail(own, tails[w], words, offsets, index, t.mask, n, lane);
#endif
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

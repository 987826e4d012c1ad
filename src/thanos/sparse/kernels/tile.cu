// A tile in the registers of a warp: each lane holds one row.

struct Tile {
  u32 mask;
  uint4 eights[4];
  uint2 four;
  u32 two;
  u16 one;
};

// Return the address of a tile. Set n to its number of values per row.
__device__ __forceinline__ const char* find(const char* words, const int* offsets, i64 index, int& n) {
#if N
  n = N;
  return words + index * (128 + 64 * N);
#else
  const int first = offsets[index] >> 2;
  n = (offsets[index + 1] >> 2) - first - 2 - (offsets[index] & 3);
  return words + (i64)first * 64;
#endif
}

// Each lane reads its row, so every load of the warp is one contiguous range.
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

// Copy a tile's tail into shared memory, 32 words per warp. Return the address of the lane's ``more`` values, at most 32, which
// follow those of the lower lanes. Few tiles have a tail, so its address is computed again instead of kept in a register.
__device__ __forceinline__ const u16* spread(u32* to, const char* words, const int* offsets, i64 index, int more, int lane) {
  int n;
  const char* p = find(words, offsets, index, n);
  p += 128 + 64 * n;
  __syncwarp();
  if (lane < 16 * (offsets[index] & 3)) to[lane] = load4(p + 4 * lane);
  __syncwarp();
  const u32 below = (1u << lane) - 1;
  int sum = 0;
#pragma unroll
  for (int bit = 0; bit < 6; bit++) sum += __popc(__ballot_sync(ALL, more >> bit & 1) & below) << bit;
  return (const u16*)to + sum;
}

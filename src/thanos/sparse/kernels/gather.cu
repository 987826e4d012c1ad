// More tokens, and expansion: the warp writes a tile's values to shared memory, row by row, and each lane gathers 8 columns of
// four rows. The distance of rows is an odd multiple of 16 bytes, so that they begin in different banks.
#define STRIDE (N == 0 || N > 24 ? 80 : N > 8 ? 48 : 16)

__device__ __forceinline__ void stage(char* to, const Tile& t, int n, int lane) {
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
  if (n & 1) *(u16*)to = t.one;
}

#if !N
// Write the values in a tile's tail behind the other values of their rows.
__device__ __forceinline__ void stage_tail(char* to, u32* tails, const char* words, const int* offsets, i64 index, u32 mask, int n,
                                           int lane) {
  const int more = __popc(mask) - n;
  if (!__any_sync(ALL, more)) return;
  const u16* from = spread(tails, words, offsets, index, more, lane);
  for (int i = 0; i < more; i++) ((u16*)(to + STRIDE * lane))[n + i] = from[i];
}
#endif

// Return columns 8·part to 8·part + 7 of a row with this mask, from its staged values. Every column reads the next value, kept
// or not: that costs less than a branch. So a lane may read one value beyond its row.
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

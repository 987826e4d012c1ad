// A tile in the registers of a warp: a lane holds a row.

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

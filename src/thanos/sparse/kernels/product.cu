// A block multiplies one strip of 32 rows. Sums are float32. Their order depends on the shape and the launch (U, SPLITS, number
// of warps), not on the number of tokens: a warp adds its tiles from left to right, then the warps' sums are added, then those
// of the splits. No atomics are used. Up to four matrices that share their input are multiplied in one launch: a strip belongs
// to one of them.

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

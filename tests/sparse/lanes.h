// What packed.cu needs to run on a CPU: each thread of a block is a fiber, and those of a warp wait for one another where they
// exchange values. Blocks run one after another, so that variables they share can be static. Instructions that are written in
// assembler have their meaning in C++ here.
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef long long i64;

#define ALL 0xffffffffu
#define CLUSTER
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __align__(size) __attribute__((aligned(size)))
#define __launch_bounds__(...)

struct Dim {
  int x, y, z;
};
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int __clz(u32 m) { return m ? __builtin_clz(m) : 32; }
inline int __popc(u32 m) { return __builtin_popcount(m); }
template <typename T> T __ldg(const T* p) { return *p; }

struct Group {  // threads that wait for one another
  int size = 0, here = 0;
  long round = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Dim index;
  bool done = false;
};
static std::vector<Fiber> fibers;
static std::vector<Group> warps;
static Group block;
static int running;
static ucontext_t scheduler;
static Dim blockIdx, blockDim;
static u32 slots[64][32][8];  // by warp and lane
#define threadIdx (fibers[running].index)

inline void wait(Group& group) {
  const long round = group.round;
  if (++group.here == group.size) {
    group.here = 0;
    group.round++;
    return;
  }
  while (group.round == round) swapcontext(&fibers[running].context, &scheduler);
}
inline void __syncthreads() { wait(block); }
inline void __syncwarp() { wait(warps[threadIdx.x / 32]); }

// Write a word for the other lanes and wait until all have; ``leave`` after reading theirs.
inline u32 (*meet(const u32* words, int count))[8] {
  const int warp = threadIdx.x / 32;
  memcpy(slots[warp][threadIdx.x % 32], words, 4 * count);
  wait(warps[warp]);
  return slots[warp];
}
inline void leave() { wait(warps[threadIdx.x / 32]); }

template <typename T> T __shfl_sync(u32, T value, int lane) {
  u32 word;
  memcpy(&word, &value, 4);
  memcpy(&value, meet(&word, 1)[lane & 31], 4);
  leave();
  return value;
}
inline u32 __ballot_sync(u32, u32 flag) {
  u32(*all)[8] = meet(&flag, 1);
  u32 result = 0;
  for (int lane = 0; lane < 32; lane++) result |= (u32)(all[lane][0] != 0) << lane;
  leave();
  return result;
}
inline bool __any_sync(u32 mask, u32 flag) { return __ballot_sync(mask, flag) != 0; }

inline float as_float(u32 word) {
  float f;
  memcpy(&f, &word, 4);
  return f;
}
inline float widen(u16 v) {
#if HALF
  _Float16 h;
  memcpy(&h, &v, 2);
  return (float)h;
#else
  return as_float((u32)v << 16);
#endif
}
inline float low(u32 q) { return widen((u16)q); }
inline float high(u32 q) { return widen((u16)(q >> 16)); }
inline u16 narrow(float f) {
  u16 v;
#if HALF
  const _Float16 h = (_Float16)f;
  memcpy(&v, &h, 2);
#else
  u32 bits;
  memcpy(&bits, &f, 4);
  v = f != f ? 0x7fff : (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
  return v;
}

template <typename T> T load(const char* p) {
  if ((uintptr_t)p % sizeof(T)) __builtin_trap();  // as on a device
  return *(const T*)p;
}
inline uint4 load16(const char* p) { return load<uint4>(p); }
inline uint2 load8(const char* p) { return load<uint2>(p); }
inline u32 load4(const char* p) { return load<u32>(p); }
inline int load_offset(const int* p) { return *p; }
inline float remote(const float* p, int) { return *p; }

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  u32(*all)[8] = meet(mine, 6);
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < 4; j++) {
    const int row = lane / 4, column = lane % 4 * 2 + j % 2;
    for (int k = 0; k < 16; k++) {  // the lane of an entry of a factor, its register, and its half of that
      const u32 a = all[row * 4 + k % 8 / 2][2 * (k / 8) + j / 2], b = all[column * 4 + k % 8 / 2][4 + k / 8];
      c[j] += (k % 2 ? high(a) : low(a)) * (k % 2 ? high(b) : low(b));
    }
  }
  leave();
}

static void (*body)(const uint64_t*);
static const uint64_t* arguments;

static void enter() {
  body(arguments);
  fibers[running].done = true;
  swapcontext(&fibers[running].context, &scheduler);
}

// Run a grid. ``backwards``: the last thread goes first, which must change nothing.
static void run(void (*kernel)(const uint64_t*), const int* grid, int threads, const uint64_t* values, bool backwards) {
  body = kernel;
  arguments = values;
  blockDim = {threads, 1, 1};
  for (int z = 0; z < grid[2]; z++)
    for (int y = 0; y < grid[1]; y++)
      for (int x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        fibers = std::vector<Fiber>(threads);
        warps = std::vector<Group>(threads / 32);
        for (Group& warp : warps) warp.size = 32;
        block = Group();
        block.size = threads;
        for (int i = 0; i < threads; i++) {
          fibers[i].index = {i, 0, 0};
          fibers[i].stack.resize(1 << 16);
          getcontext(&fibers[i].context);
          fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
          fibers[i].context.uc_stack.ss_size = fibers[i].stack.size();
          makecontext(&fibers[i].context, enter, 0);
        }
        for (int left = threads; left;)
          for (int i = 0; i < threads; i++) {
            running = backwards ? threads - 1 - i : i;
            if (fibers[running].done) continue;
            swapcontext(&scheduler, &fibers[running].context);
            left -= fibers[running].done;
          }
      }
}

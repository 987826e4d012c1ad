/* Products of packed matrices (docs/formats.md) on x86-64 processors with AVX-512 VBMI2: VPEXPANDW spreads the values of a row
 * over the 32 columns of its tile. Sums are float32, and their order depends on the shape alone. */

#include "_shared.h"

#if SUPPORTED

#define TARGET WITH(",avx512vbmi2,f16c,fma")
#define TARGET_DOT WITH(",avx512vbmi2,avx512bf16,f16c,fma")

enum {
  SIDE = 32,
  ROWS = 8,    /* rows handled together if every tile stores 16 values per row */
  BLOCK = 16,  /* tiles that are handled for all rows before the next tiles; they stay in the L1 cache */
  AHEAD = 4096 /* bytes between the tile that is read and the one that is prefetched */
};

typedef struct {
  const char *words;
  const int32_t *offsets; /* NULL: every tile stores n values per row */
  const uint16_t *bias;   /* NULL: none */
  uint16_t *y;
  const char *x; /* tokens × tiles × 32, padded with zeros: 16 bits wide for DOT_BFLOAT16, else float32 */
  int64_t rows, tokens, tiles;
  int n;
} Product;

/* Return the address of a tile. Set n to its number of values per row, and tail to the number of units of its tail. A unit is
 * 64 bytes. */
INLINE const char *find(const Product *p, int64_t index, int *n, int *tail) {
  if (!p->offsets) {
    *n = p->n, *tail = 0;
    return p->words + index * (128 + 64 * (int64_t)p->n);
  }
  const int64_t first = p->offsets[index] >> 2;
  *tail = p->offsets[index] & 3;
  *n = (int)((p->offsets[index + 1] >> 2) - first) - 2 - *tail;
  return p->words + first * 64;
}

/* The last n % 8 of the first n values of a row, from the pieces of 4, 2 and 1. They are not the tile's tail. */
INLINE TARGET __m128i tail_of(const char *at, int n, int row) {
  uint64_t low = 0, high = 0;
  uint32_t two = 0;
  uint16_t one = 0;
  if (n & 4) {
    memcpy(&low, at + 8 * row, 8);
    at += 256;
  }
  if (n & 2) {
    memcpy(&two, at + 4 * row, 4);
    at += 128;
  }
  if (n & 1) memcpy(&one, at + 2 * row, 2);
  const uint64_t rest = n & 2 ? (uint64_t)one << 32 | two : one;
  if (n & 4)
    high = rest;
  else
    low = rest;
  return _mm_set_epi64x((long long)high, (long long)low);
}

/* The values of one row of a tile, in the order of its columns, in the lower lanes. */
INLINE TARGET __m512i values_of(const char *tile, int n, int row) {
  const char *at = tile + 128;
#define EIGHT(k) _mm_loadu_si128((const __m128i *)(at + 512 * (k) + 16 * row))
  const int full = n >> 3;
  const __m128i tail = n & 7 ? tail_of(at + 512 * full, n, row) : _mm_setzero_si128();
  __m512i v = _mm512_castsi128_si512(full > 0 ? EIGHT(0) : tail);
  if (full > 0 && n > 8) v = _mm512_inserti64x2(v, full > 1 ? EIGHT(1) : tail, 1);
  if (full > 1 && n > 16) v = _mm512_inserti64x2(v, full > 2 ? EIGHT(2) : tail, 2);
  if (full > 2 && n > 24) v = _mm512_inserti64x2(v, full > 3 ? EIGHT(3) : tail, 3);
#undef EIGHT
  return v; /* lanes that no value fills are not read by the expansion */
}

/* Add the products of tiles first to last − 1 for ROWS rows to their sums; every tile stores 16 values per row. */
#define SPAN(name, attribute, KIND, ADD)                                                                              \
  INLINE attribute void name(const Product *p, int64_t strip, int64_t first, int64_t last, int row, const char *x,    \
                             float *sums) {                                                                           \
    const int64_t size = 128 + 64 * 16;                                                                               \
    __m512 a[ROWS];                                                                                                   \
    for (int i = 0; i < ROWS; i++) a[i] = _mm512_load_ps(sums + 16 * (row + i));                                      \
    for (int64_t g = first; g < last; g++) {                                                                          \
      const char *tile = p->words + (strip * p->tiles + g) * size;                                                    \
      /* Each of the four passes over a block prefetches a part of the tile that comes BLOCK tiles later. */          \
      for (int at = 320 * (row / ROWS); at < 320 * (row / ROWS + 1); at += 64)                                        \
        _mm_prefetch(tile + BLOCK * size + at, _MM_HINT_T0);                                                          \
      const uint32_t *masks = (const uint32_t *)tile + row;                                                           \
      const char *xs = x + g * SIDE * (KIND == DOT_BFLOAT16 ? 2 : 4);                                                 \
      for (int i = 0; i < ROWS; i++) {                                                                                \
        __m512i w = _mm512_maskz_expand_epi16(reversed(masks[i]), values_of(tile, 16, row + i));                      \
        ADD                                                                                                           \
      }                                                                                                               \
    }                                                                                                                 \
    for (int i = 0; i < ROWS; i++) _mm512_store_ps(sums + 16 * (row + i), a[i]);                                      \
  }

/* Append a row's other values, which are in the tail at ``surplus``, to its first n. Advance ``surplus`` to those of the next
 * row. */
INLINE TARGET __m512i with_surplus(__m512i v, uint32_t mask, int n, const char **surplus) {
  const int more = __builtin_popcount(mask) - n;
  const __m512i others = _mm512_maskz_loadu_epi16((__mmask32)((1ull << more) - 1), *surplus);
  *surplus += 2 * more;
  return n < SIDE ? _mm512_mask_expand_epi16(v, 0xffffffffu << n % SIDE, others) : v;
}

/* Reverse the bits of the masks of a tile: see ``reversed`` in _shared.h. */
INLINE TARGET void reverse_all(uint32_t *to, const char *tile) {
  const __m512i low = _mm512_set1_epi8(15); /* tables: the reverse of four bits, as the upper and as the lower half of a byte */
  const __m512i upper = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -128, 64, -64, 32, -96, 96, -32, 16, -112, 80, -48, 48, -80, 112, -16));
  const __m512i lower = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15));
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  for (int i = 0; i < 2; i++) {
    const __m512i m = _mm512_loadu_si512(tile + 64 * i);
    const __m512i first = _mm512_shuffle_epi8(upper, _mm512_and_si512(m, low));
    const __m512i second = _mm512_shuffle_epi8(lower, _mm512_and_si512(_mm512_srli_epi16(m, 4), low));
    _mm512_store_si512(to + 16 * i, _mm512_shuffle_epi8(_mm512_or_si512(first, second), bytes));
  }
}

/* Add the products of one tile for all its rows and tokens. The x of two successive tokens are ``apart`` bytes apart. n is a
 * compile-time constant in each case of EVERY. */
#define TILE(name, attribute, KIND, ADD)                                                                              \
  INLINE attribute void name(const char *tile, int n, int tail, const char *x, int64_t apart, int64_t tokens,         \
                             float *sums) {                                                                           \
    const char *surplus = tile + 128 + 64 * n;                                                                        \
    uint32_t masks[SIDE] __attribute__((aligned(64)));                                                                \
    reverse_all(masks, tile);                                                                                         \
    for (int row = 0; row < SIDE; row++) {                                                                            \
      enum { i = 0 };                                                                                                 \
      __m512i v = values_of(tile, n, row);                                                                            \
      if (tail) v = with_surplus(v, masks[row], n, &surplus);                                                         \
      __m512i w = _mm512_maskz_expand_epi16(masks[row], v);                                                           \
      float *own = sums + 16 * row;                                                                                   \
      const char *xs = x;                                                                                             \
      for (int64_t t = 0; t < tokens; t++, xs += apart, own += 16 * SIDE) {                                           \
        __m512 a[1] = {_mm512_load_ps(own)};                                                                          \
        ADD                                                                                                           \
        _mm512_store_ps(own, a[0]);                                                                                   \
      }                                                                                                               \
    }                                                                                                                 \
  }

#define EVERY(DO)                                                                                                     \
  DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) \
  DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27) DO(28) DO(29) DO(30) DO(31) DO(32)

#define ADD_DOT a[i] = _mm512_dpbf16_ps(a[i], (__m512bh)w, (__m512bh)_mm512_loadu_si512(xs));
#define ADD_WIDE(KIND)                                                                                                \
  a[i] = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(w), KIND), _mm512_loadu_ps(xs), a[i]);                          \
  a[i] = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(w, 1), KIND), _mm512_loadu_ps(xs + 64), a[i]);

SPAN(span_dot, TARGET_DOT, DOT_BFLOAT16, ADD_DOT)
SPAN(span_bfloat16, TARGET, BFLOAT16, ADD_WIDE(BFLOAT16))
SPAN(span_float16, TARGET, FLOAT16, ADD_WIDE(FLOAT16))
TILE(tile_dot, TARGET_DOT, DOT_BFLOAT16, ADD_DOT)
TILE(tile_bfloat16, TARGET, BFLOAT16, ADD_WIDE(BFLOAT16))
TILE(tile_float16, TARGET, FLOAT16, ADD_WIDE(FLOAT16))

/* All rows of one strip, for all tokens: after the first token, the tiles of a block are read from the L1 cache. */
#define STRIP(name, attribute, span, tile, KIND)                                                                      \
  attribute static void name(const Product *p, int64_t strip, float *sums) {                                          \
    const int64_t each = SIDE * (KIND == DOT_BFLOAT16 ? 2 : 4);                                                       \
    memset(sums, 0, sizeof(float) * 16 * SIDE * p->tokens);                                                           \
    for (int64_t first = 0; first < p->tiles; first += BLOCK) {                                                       \
      const int64_t last = first + BLOCK < p->tiles ? first + BLOCK : p->tiles;                                       \
      if (!p->offsets && p->n == 16) {                                                                                \
        for (int64_t t = 0; t < p->tokens; t++)                                                                       \
          for (int row = 0; row < SIDE; row += ROWS)                                                                  \
            span(p, strip, first, last, row, p->x + t * p->tiles * each, sums + t * 16 * SIDE);                       \
        continue;                                                                                                     \
      }                                                                                                               \
      for (int64_t g = first; g < last; g++) {                                                                        \
        int n, tail;                                                                                                  \
        const char *at = find(p, strip * p->tiles + g, &n, &tail);                                                    \
        for (int line = 0; line < 128 + 64 * (n + tail); line += 64) _mm_prefetch(at + AHEAD + line, _MM_HINT_T0);    \
        switch (n) { EVERY(CASE_##tile) }                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
    for (int64_t t = 0; t < p->tokens; t++)                                                                           \
      for (int64_t i = 0; i < SIDE && strip * SIDE + i < p->rows; i++) {                                              \
        const int64_t row = strip * SIDE + i;                                                                         \
        float sum = _mm512_reduce_add_ps(_mm512_load_ps(sums + (t * SIDE + i) * 16));                                 \
        if (p->bias) sum += to_float(p->bias[row], KIND);                                                             \
        p->y[t * p->rows + row] = from_float(sum, KIND);                                                              \
      }                                                                                                               \
  }

#define CASE_tile_dot(k) case k: tile_dot(at, k, tail, p->x + g * each, p->tiles * each, p->tokens, sums); break;
#define CASE_tile_bfloat16(k) case k: tile_bfloat16(at, k, tail, p->x + g * each, p->tiles * each, p->tokens, sums); break;
#define CASE_tile_float16(k) case k: tile_float16(at, k, tail, p->x + g * each, p->tiles * each, p->tokens, sums); break;

STRIP(strip_dot, TARGET_DOT, span_dot, tile_dot, DOT_BFLOAT16)
STRIP(strip_bfloat16, TARGET, span_bfloat16, tile_bfloat16, BFLOAT16)
STRIP(strip_float16, TARGET, span_float16, tile_float16, FLOAT16)

static int multiply(Product *p, const uint16_t *x, int64_t columns, int kind, int threads) {
  const int64_t strips = (p->rows + SIDE - 1) / SIDE;
  const size_t wide = (size_t)p->tokens * p->tiles * SIDE * 4 + 64;
  const size_t own = ((size_t)p->tokens * 16 * SIDE * sizeof(float) + 63) & ~(size_t)63;
  char *memory = aligned_alloc(64, ((wide + 63) & ~(size_t)63) + own * threads);
  if (!memory) return -1;
  pad(memory, x, p->tokens, columns, p->tiles * SIDE, kind);
  p->x = memory;
  char *sums = memory + ((wide + 63) & ~(size_t)63);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t first = strips * thread / threads, last = strips * (thread + 1) / threads;
    float *mine = (float *)(sums + own * thread);
    for (int64_t strip = first; strip < last; strip++) {
      if (kind == DOT_BFLOAT16)
        strip_dot(p, strip, mine);
      else if (kind == BFLOAT16)
        strip_bfloat16(p, strip, mine);
      else
        strip_float16(p, strip, mine);
    }
  }
  free(memory);
  return 0;
}

#endif

/* support() → 0: no kernel; 1: all kinds but DOT_BFLOAT16; 2: all kinds. */
static PyObject *support(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  long level = 0;
#if SUPPORTED
  if (has_avx512() && __builtin_cpu_supports("avx512vbmi2")) level = __builtin_cpu_supports("avx512bf16") ? 2 : 1;
#endif
  return PyLong_FromLong(level);
}

/* linear(words, offsets, x, bias, y, rows, columns, tokens, n, kind, threads): addresses and sizes. The caller has checked them. */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  (void)self;
  long long a[11];
  if (!read_numbers(args, count, a, 11)) return NULL;
#if SUPPORTED
  int failed;
  Product p = {.words = (const char *)(intptr_t)a[0], .offsets = (const int32_t *)(intptr_t)a[1],
               .bias = (const uint16_t *)(intptr_t)a[3], .y = (uint16_t *)(intptr_t)a[4],
               .rows = a[5], .tokens = a[7], .tiles = (a[6] + SIDE - 1) / SIDE, .n = (int)a[8]};
  Py_BEGIN_ALLOW_THREADS
  failed = multiply(&p, (const uint16_t *)(intptr_t)a[2], a[6], (int)a[9], (int)a[10]);
  Py_END_ALLOW_THREADS
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
#else
  PyErr_SetString(PyExc_RuntimeError, "this build has no kernel");
  return NULL;
#endif
}

static PyMethodDef METHODS[] = {
    {"support", support, METH_NOARGS, "0: no kernel for this processor; 1: by conversion to float32; 2: also by VDPBF16PS."},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, "Product of a packed matrix, by addresses."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_cpu", "Products of packed matrices.", -1, METHODS, NULL, NULL, NULL, NULL};

#define INTERFACE 1 /* as in extensions.py */

PyMODINIT_FUNC PyInit__cpu(void) { return create(&MODULE, INTERFACE); }

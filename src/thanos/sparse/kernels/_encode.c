/* Encoding of packed matrices (docs/formats.md) on x86-64 processors with AVX-512 VBMI2: VPCOMPRESSW collects a row's values. */

#include "_shared.h"

#if SUPPORTED

#define TARGET WITH(",avx512vbmi2,bmi2,popcnt")

enum { SIDE = 32, MOST_TAIL = 2, TAIL_COST = 8 }; /* as in tiles.py */

typedef struct {
  const uint16_t *weight; /* rows × columns */
  int64_t rows, columns, tiles;
} Dense;

/* The 32 entries of a row of a tile; zeros beyond the matrix. */
INLINE TARGET __m512i entries(const Dense *d, int64_t row, int64_t tile) {
  const int64_t left = d->columns - SIDE * tile;
  if (row >= d->rows) return _mm512_setzero_si512();
  const __mmask32 there = left >= SIDE ? 0xffffffffu : (1u << left) - 1;
  return _mm512_maskz_loadu_epi16(there, d->weight + row * d->columns + SIDE * tile);
}

/* Write one row of a tile that stores n values per row, and its further values at ``surplus``. Return 0 if they would pass
 * ``end``, else 1. */
INLINE TARGET int put(char *tile, int row, int n, char **surplus, const char *end, __m512i v) {
  const uint32_t kept = _mm512_test_epi16_mask(v, v);
  const int missing = n - __builtin_popcount(kept);
  uint32_t stored = kept;
  if (missing > 0) stored |= _pdep_u32(missing < 32 ? (1u << missing) - 1 : 0xffffffffu, ~kept);
  const uint32_t mask = reversed(stored);
  memcpy(tile + 4 * row, &mask, 4);
  char values[64] __attribute__((aligned(64)));
  _mm512_store_si512(values, _mm512_maskz_compress_epi16(stored, v));
  const char *from = values;
  tile += 4 * SIDE;
  for (int i = 0; i < n >> 3; i++, from += 16, tile += 16 * SIDE) memcpy(tile + 16 * row, from, 16);
  if (n & 4) {
    memcpy(tile + 8 * row, from, 8);
    from += 8, tile += 8 * SIDE;
  }
  if (n & 2) {
    memcpy(tile + 4 * row, from, 4);
    from += 4, tile += 4 * SIDE;
  }
  if (n & 1) memcpy(tile + 2 * row, from, 2);
  if (missing >= 0) return 1;
  if (end - *surplus < -2 * missing) return 0;
  memcpy(*surplus, values + 2 * n, -2 * missing);
  *surplus -= 2 * missing;
  return 1;
}

/* sizes: the values per row of every tile, then the units of every tile's tail. */
TARGET static int encode_strip(const Dense *d, int64_t strip, int64_t all, const uint8_t *sizes, const int64_t *offsets, char *words) {
  int fits = 1;
  for (int64_t tile = 0; tile < d->tiles; tile++) {
    const int64_t index = strip * d->tiles + tile;
    const int n = sizes[index];
    char *at = words + 4 * offsets[index], *surplus = at + 128 + 64 * n;
    const char *end = surplus + 64 * sizes[all + index];
    for (int row = 0; row < SIDE; row++) fits &= put(at, row, n, &surplus, end, entries(d, strip * SIDE + row, tile));
    memset(surplus, 0, end - surplus);
  }
  return fits;
}

/* counts: the entries of every tile's fullest row, then the best n of every tile, then the units of every tile's best tail. */
TARGET static void count_strip(const Dense *d, int64_t strip, int64_t all, uint8_t *counts) {
  for (int64_t tile = 0; tile < d->tiles; tile++) {
    int most = 0, rows[SIDE + 1] = {0}; /* rows by their number of entries */
    for (int row = 0; row < SIDE; row++) {
      const __m512i v = entries(d, strip * SIDE + row, tile);
      const int count = __builtin_popcount(_mm512_test_epi16_mask(v, v));
      rows[count]++;
      most = count > most ? count : most;
    }
    int best = most, tail = 0, cost = most;
    for (int n = most - 1, fuller = 0, surplus = 0; n >= 0; n--) {
      fuller += rows[n + 1]; /* rows that hold more than n */
      surplus += fuller;
      const int units = (surplus + SIDE - 1) / SIDE;
      if (units > MOST_TAIL) break;
      if (n + units + TAIL_COST < cost) best = n, tail = units, cost = n + units + TAIL_COST;
    }
    uint8_t *at = counts + strip * d->tiles + tile;
    at[0] = (uint8_t)most, at[all] = (uint8_t)best, at[2 * all] = (uint8_t)tail;
  }
}

#endif

/* support() → whether this processor can run the functions. */
static PyObject *support(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  long level = 0;
#if SUPPORTED
  level = has_avx512() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
#endif
  return PyLong_FromLong(level);
}

/* run(weight, rows, columns, sizes, offsets, words, threads): addresses and sizes. The caller has checked them.
 *
 * If words is 0, count_strip writes sizes; otherwise encode_strip reads them. Returns whether all values fitted. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  (void)self;
  long long a[7];
  if (!read_numbers(args, count, a, 7)) return NULL;
#if SUPPORTED
  int fits = 1;
  const Dense d = {.weight = (const uint16_t *)(intptr_t)a[0], .rows = a[1], .columns = a[2], .tiles = (a[2] + SIDE - 1) / SIDE};
  const int64_t strips = (a[1] + SIDE - 1) / SIDE;
  const int threads = (int)a[6];
  Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : fits) if (threads > 1)
  for (int64_t strip = 0; strip < strips; strip++) {
    uint8_t *sizes = (uint8_t *)(intptr_t)a[3];
    if (a[5])
      fits &= encode_strip(&d, strip, strips * d.tiles, sizes, (const int64_t *)(intptr_t)a[4], (char *)(intptr_t)a[5]);
    else
      count_strip(&d, strip, strips * d.tiles, sizes);
  }
  Py_END_ALLOW_THREADS
  return PyBool_FromLong(fits);
#else
  PyErr_SetString(PyExc_RuntimeError, "this build has no encoder");
  return NULL;
#endif
}

static PyMethodDef METHODS[] = {
    {"support", support, METH_NOARGS, "Whether this processor can run the functions."},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, "Count or encode the tiles of a matrix, by addresses."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_encode", "Encoding of packed matrices.", -1, METHODS, NULL, NULL, NULL, NULL};

#define INTERFACE 1 /* as in extensions.py */

PyMODINIT_FUNC PyInit__encode(void) { return create(&MODULE, INTERFACE); }

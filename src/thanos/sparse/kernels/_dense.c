/* Products of dense 16-bit matrices with a few tokens, on x86-64 processors with AVX-512. Each row is read once, in order, so the
 * memory bandwidth is the limit. Sums are float32, and their order depends on the number of columns alone. */

#include "_shared.h"

#if SUPPORTED

#define TARGET WITH(",f16c,fma")
#define TARGET_DOT WITH(",avx512bf16,f16c,fma")

enum {
  WIDE = 32, /* entries of a vector */
  SUMS = 4,  /* independent sums of a row, so that the processor's additions overlap */
  AHEAD = 2048 /* bytes between the entries that are read and those that are prefetched */
};

typedef struct {
  const uint16_t *weight, *bias; /* rows × columns; NULL: no bias */
  uint16_t *y;
  const char *x; /* tokens × width, padded with zeros: 16 bits wide for DOT_BFLOAT16, else float32 */
  int64_t rows, columns, width, tokens;
} Product;

#define ADD_DOT(s, w, at) a[s] = _mm512_dpbf16_ps(a[s], (__m512bh)(w), (__m512bh)_mm512_loadu_si512(x + 2 * (at)));
#define ADD_WIDE(KIND)                                                                                                \
  {                                                                                                                   \
    a[s_] = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(w_), KIND), _mm512_loadu_ps(x + 4 * at_), a[s_]);            \
    a[s_] = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(w_, 1), KIND), _mm512_loadu_ps(x + 4 * at_ + 64), a[s_]); \
  }
#define ADD_BFLOAT16(s, w, at) { const int s_ = s; const __m512i w_ = w; const int64_t at_ = at; ADD_WIDE(BFLOAT16) }
#define ADD_FLOAT16(s, w, at) { const int s_ = s; const __m512i w_ = w; const int64_t at_ = at; ADD_WIDE(FLOAT16) }

/* Rows first to last − 1, for all tokens: the first token's pass brings a row into the cache for the others. */
#define ROWS(name, attribute, KIND, ADD)                                                                              \
  attribute static void name(const Product *p, int64_t first, int64_t last) {                                         \
    const int64_t whole = p->columns / WIDE * WIDE, most = p->columns / (SUMS * WIDE) * (SUMS * WIDE);                \
    const __mmask32 rest = (1u << (p->columns - whole)) - 1;                                                          \
    for (int64_t row = first; row < last; row++) {                                                                    \
      const uint16_t *line = p->weight + row * p->columns;                                                            \
      for (int64_t t = 0; t < p->tokens; t++) {                                                                       \
        const char *x = p->x + t * p->width * (KIND == DOT_BFLOAT16 ? 2 : 4);                                         \
        __m512 a[SUMS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};        \
        int64_t at = 0;                                                                                               \
        for (; at < most; at += SUMS * WIDE)                                                                          \
          for (int s = 0; s < SUMS; s++) {                                                                            \
            _mm_prefetch((const char *)(line + at + s * WIDE) + AHEAD, _MM_HINT_T0);                                  \
            ADD(s, _mm512_loadu_si512(line + at + s * WIDE), at + s * WIDE)                                           \
          }                                                                                                           \
        for (; at < whole; at += WIDE) ADD(0, _mm512_loadu_si512(line + at), at)                                      \
        if (rest) ADD(1, _mm512_maskz_loadu_epi16(rest, line + at), at)                                               \
        float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3])));        \
        if (p->bias) sum += to_float(p->bias[row], KIND);                                                             \
        p->y[t * p->rows + row] = from_float(sum, KIND);                                                              \
      }                                                                                                               \
    }                                                                                                                 \
  }

ROWS(rows_dot, TARGET_DOT, DOT_BFLOAT16, ADD_DOT)
ROWS(rows_bfloat16, TARGET, BFLOAT16, ADD_BFLOAT16)
ROWS(rows_float16, TARGET, FLOAT16, ADD_FLOAT16)

static int multiply(Product *p, const uint16_t *x, int kind, int threads) {
  char *memory = aligned_alloc(64, ((size_t)p->tokens * p->width * 4 + 63) & ~(size_t)63);
  if (!memory) return -1;
  pad(memory, x, p->tokens, p->columns, p->width, kind);
  p->x = memory;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t first = p->rows * thread / threads, last = p->rows * (thread + 1) / threads;
    if (kind == DOT_BFLOAT16)
      rows_dot(p, first, last);
    else if (kind == BFLOAT16)
      rows_bfloat16(p, first, last);
    else
      rows_float16(p, first, last);
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
  if (has_avx512()) level = __builtin_cpu_supports("avx512bf16") ? 2 : 1;
#endif
  return PyLong_FromLong(level);
}

/* linear(weight, x, bias, y, rows, columns, tokens, kind, threads): addresses and sizes. The caller has checked them. */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  (void)self;
  long long a[9];
  if (!read_numbers(args, count, a, 9)) return NULL;
#if SUPPORTED
  int failed;
  Product p = {.weight = (const uint16_t *)(intptr_t)a[0], .bias = (const uint16_t *)(intptr_t)a[2],
               .y = (uint16_t *)(intptr_t)a[3], .rows = a[4], .columns = a[5],
               .width = (a[5] + WIDE - 1) / WIDE * WIDE, .tokens = a[6]};
  Py_BEGIN_ALLOW_THREADS
  failed = multiply(&p, (const uint16_t *)(intptr_t)a[1], (int)a[7], (int)a[8]);
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
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, "Product of a dense matrix with a few tokens, by addresses."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_dense", "Products of dense matrices with a few tokens.", -1, METHODS, NULL, NULL, NULL, NULL};

#define INTERFACE 1 /* as in extensions.py */

PyMODINIT_FUNC PyInit__dense(void) { return create(&MODULE, INTERFACE); }

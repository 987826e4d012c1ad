/* Shared by the C extensions: the check for AVX-512, conversion of 16-bit numbers, masks of tiles, and the reading of arguments.
 *
 * The extensions are optional. Without a suitable compiler they are not built; without a suitable processor support() is 0. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define SUPPORTED 1
#include <immintrin.h>
#else
#define SUPPORTED 0
#endif

/* Kinds of arithmetic: bfloat16 by VDPBF16PS, bfloat16 and float16 by conversion to float32. */
enum { DOT_BFLOAT16 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

#if SUPPORTED

#define WITH(more) __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" more)))
#define INLINE static inline __attribute__((always_inline))

INLINE int has_avx512(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

INLINE WITH(",f16c") __m512 widen(__m256i half, int kind) {
  if (kind == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE WITH(",f16c") float to_float(uint16_t v, int kind) {
  if (kind == FLOAT16) return _cvtsh_ss(v);
  uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE WITH(",f16c") uint16_t from_float(float f, int kind) {
  if (kind == FLOAT16) return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0; /* rounding would carry some NaN into the sign */
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Copy x, tokens × columns, padded with zeros to a width: 16 bits wide for DOT_BFLOAT16, else float32. */
__attribute__((unused)) WITH(",f16c") static void pad(char *to, const uint16_t *x, int64_t tokens, int64_t columns,
                                                      int64_t width, int kind) {
  for (int64_t t = 0; t < tokens; t++) {
    const uint16_t *from = x + t * columns;
    if (kind == DOT_BFLOAT16) {
      uint16_t *row = (uint16_t *)to + t * width;
      memcpy(row, from, 2 * columns);
      memset(row + columns, 0, 2 * (width - columns));
    } else {
      float *row = (float *)to + t * width;
      for (int64_t i = 0; i < columns; i++) row[i] = to_float(from[i], kind);
      memset(row + columns, 0, 4 * (width - columns));
    }
  }
}

/* Masks hold the first column in their highest bit, and the processor's mask registers in their lowest. */
INLINE uint32_t reversed(uint32_t m) {
  m = (m >> 1 & 0x55555555u) | (m & 0x55555555u) << 1;
  m = (m >> 2 & 0x33333333u) | (m & 0x33333333u) << 2;
  m = (m >> 4 & 0x0f0f0f0fu) | (m & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(m);
}

#endif

/* Read all arguments of a function, which are whole numbers: addresses and sizes. Returns 0 after an error. */
static int read_numbers(PyObject *const *args, Py_ssize_t count, long long *numbers, Py_ssize_t wanted) {
  if (count != wanted) {
    PyErr_Format(PyExc_TypeError, "the function takes %zd whole numbers", wanted);
    return 0;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    numbers[i] = PyLong_AsLongLong(args[i]);
    if (numbers[i] == -1 && PyErr_Occurred()) return 0;
  }
  return 1;
}

/* Create a module that says which interface its functions have. Python compares the number when it loads the module. */
static PyObject *create(struct PyModuleDef *definition, long interface) {
  PyObject *module = PyModule_Create(definition);
  if (module && PyModule_AddIntConstant(module, "INTERFACE", interface)) Py_CLEAR(module);
  return module;
}

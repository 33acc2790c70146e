#pragma once

// CPU kernels of the base types and of the sparse part. They know rows and pointers, no ggml tensors: tacq-mul-mat.cpp has the
// ops. Every kernel exists as plain C (`_generic`, what the others are compared with) and as the fastest one that the compiler's
// target allows.

#include "tacq-quants.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

//
// activations: a row of n values, quantized in groups of 32 as Q8_0 does (but the scale stays a float)
//
//   int8_t  q[n]
//   float   d[n/32]   value = d*q
//   int32_t c[n/32]   -64*(sum of q): what a dot product with levels + 64 has too much
//
// Tables hold levels + TACQ_OFFSET, so that all are positive: byte dot products take one unsigned operand. In integers the
// correction is exact: the result is the same as with signed levels.

#define TACQ_OFFSET 64

static inline size_t tacq_act_size(int64_t n) {
    return ((size_t) (n + n/4) + 63)/64*64;
}
static inline const float * tacq_act_d(const void * act, int64_t n) {
    return (const float *) (const void *) ((const char *) act + n);
}
static inline const int32_t * tacq_act_c(const void * act, int64_t n) {
    return (const int32_t *) (const void *) ((const char *) act + n + n/8);
}

// groups [first, last) of a row
GGML_BACKEND_API void tacq_quantize_act        (const float * x, void * act, int64_t n, int64_t first, int64_t last);
GGML_BACKEND_API void tacq_quantize_act_generic(const float * x, void * act, int64_t n, int64_t first, int64_t last);

// for the sparse part of many tokens: xt[column][TACQ_STRIPE] of the rows x[TACQ_STRIPE]
#define TACQ_STRIPE 48

GGML_BACKEND_API void tacq_transpose_stripe        (const float * const * x, float * xt, int64_t n);
GGML_BACKEND_API void tacq_transpose_stripe_generic(const float * const * x, float * xt, int64_t n);

//
// interleaved rows: tacq_lanes() of them side by side, so that kernels read one stream and need not turn blocks round. All rows of a
// matrix take as many bytes as before, and each tacq_lanes() the same ones; those behind the last multiple stay as they are.
//
//   uint8_t scales[n/64][lanes][2]
//   uint8_t codes [n/64][2*bits][lanes][4]   dword i of every row's codes
//

GGML_BACKEND_API int64_t tacq_lanes(void); // 0: this machine's kernels read rows one by one

// a matrix of rows that lie one after the other; `out` is another matrix
GGML_BACKEND_API void tacq_interleave  (int bits, int64_t n, int64_t n_rows, const void * x, void * out);
GGML_BACKEND_API void tacq_deinterleave(int bits, int64_t n, int64_t n_rows, const void * x, void * out);

//
// a few tokens: y[t][i] = row i . acts[t], for n_rows rows of n weights as they lie in the file
//
// next: what this thread reads after these rows (NULL: nothing), to be asked for while the last rows are computed

GGML_BACKEND_API void tacq_gemv            (int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y);
GGML_BACKEND_API void tacq_gemv_generic    (int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y);
GGML_BACKEND_API void tacq_gemv_interleaved(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y);

//
// many tokens: TACQ_TILE rows are unpacked once, then multiplied with all tokens
//
//   uint8_t levels[n/4][TACQ_TILE][4]   levels + TACQ_OFFSET, four neighbours of a row together
//   float   scales[n/32][TACQ_TILE]
//

#define TACQ_TILE 32

static inline size_t tacq_tile_size(int64_t n) {
    return (size_t) n*TACQ_TILE + (size_t) (n/TACQ_GROUP)*TACQ_TILE*sizeof(float);
}

// n_rows <= TACQ_TILE; what the tile has for others is never used
GGML_BACKEND_API void tacq_unpack            (int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile);
GGML_BACKEND_API void tacq_unpack_generic    (int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile);
GGML_BACKEND_API void tacq_unpack_interleaved(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile);

// y[t][i] = row i . acts[t], i < n_rows <= TACQ_TILE
GGML_BACKEND_API void tacq_gemm        (int64_t n, int64_t n_rows, int64_t n_tokens, const void * tile, const void * const * acts, float * const * y);
GGML_BACKEND_API void tacq_gemm_generic(int64_t n, int64_t n_rows, int64_t n_tokens, const void * tile, const void * const * acts, float * const * y);

//
// sparse part, added to what is there
//

// before the base part of these rows: asks for their entries, and for the row pointers of the rows after them (-1: none)
GGML_BACKEND_API void tacq_sparse_prefetch(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t next_row);

// one token: y[i] += kept weights of row first_row + i . x
GGML_BACKEND_API void tacq_sparse_gemv        (const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y);
GGML_BACKEND_API void tacq_sparse_gemv_generic(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y);

// TACQ_STRIPE tokens, activations transposed: xt[column][TACQ_STRIPE]. y[t][i] += ..., t < n_tokens <= TACQ_STRIPE
GGML_BACKEND_API void tacq_sparse_gemm        (const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y);
GGML_BACKEND_API void tacq_sparse_gemm_generic(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y);

#ifdef __cplusplus
}
#endif

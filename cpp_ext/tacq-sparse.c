// The kept weights of a mixed tensor (tacq-kernels.h). About five a row: what costs is not the arithmetic but reading single
// activations and the short sums.

#include "tacq-block.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

void tacq_sparse_gemv_generic(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    for (int64_t r = 0; r < n_rows; r++) {
        const uint32_t end = tacq_row_begin(s, first_row + r + 1);
        float sum = 0.0f;
        for (uint32_t i = tacq_row_begin(s, first_row + r); i < end; i++) {
            sum += GGML_CPU_FP16_TO_FP32(s->values[i])*x[s->columns[i]];
        }
        y[r] += sum;
    }
}

void tacq_sparse_gemm_generic(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    for (int64_t r = 0; r < n_rows; r++) {
        const uint32_t begin = tacq_row_begin(s, first_row + r);
        const uint32_t end   = tacq_row_begin(s, first_row + r + 1);
        for (int64_t t = 0; t < n_tokens; t++) {
            float sum = 0.0f;
            for (uint32_t i = begin; i < end; i++) {
                sum += GGML_CPU_FP16_TO_FP32(s->values[i])*xt[(int64_t) s->columns[i]*TACQ_STRIPE + t];
            }
            y[t][r] += sum;
        }
    }
}

#if defined(TACQ_AVX512)

// Products of the next entries are made 16 at a time without regard to rows, then summed row by row: a loop over the entries of each
// row would be mispredicted at the end of nearly every row.
#define N_PRODUCTS 512

void tacq_sparse_gemv(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    float products[N_PRODUCTS + 16];
    for (int64_t r = 0; r < n_rows; ) {
        // as many rows as have their entries in the buffer, at least one
        const uint32_t first = tacq_row_begin(s, first_row + r);
        int64_t last = r + 1;
        while (last < n_rows && tacq_row_begin(s, first_row + last + 1) - first <= N_PRODUCTS) {
            last++;
        }
        const uint32_t end = tacq_row_begin(s, first_row + last);
        if (end - first > N_PRODUCTS) { // a single long row
            __m512 sum = _mm512_setzero_ps();
            for (uint32_t i = first; i < end; i += 16) {
                const __mmask16 k = (__mmask16) (end - i >= 16 ? 0xffff : (1u << (end - i)) - 1u);
                const __m512i   c = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, s->columns + i));
                const __m512    v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, s->values + i));
                sum = _mm512_fmadd_ps(v, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), k, c, x, 4), sum);
            }
            y[r] += _mm512_reduce_add_ps(sum);
            r = last;
            continue;
        }
        for (uint32_t i = first; i < end; i += 16) {
            const __mmask16 k = (__mmask16) (end - i >= 16 ? 0xffff : (1u << (end - i)) - 1u);
            const __m512i   c = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, s->columns + i));
            const __m512    v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, s->values + i));
            _mm512_storeu_ps(products + (i - first), _mm512_mul_ps(v, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), k, c, x, 4)));
        }
        uint32_t begin = first;
        for (; r < last; r++) {
            const uint32_t next = tacq_row_begin(s, first_row + r + 1);
            const float  * p    = products + (begin - first);
            uint32_t       n    = next - begin;
            __m512 sum = _mm512_maskz_loadu_ps((__mmask16) _bzhi_u32(0xffff, n < 16 ? n : 16), p);
            while (n > 16) {
                n -= 16;
                p += 16;
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps((__mmask16) _bzhi_u32(0xffff, n < 16 ? n : 16), p));
            }
            y[r] += _mm512_reduce_add_ps(sum);
            begin = next;
        }
    }
}

#else

void tacq_sparse_gemv(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    tacq_sparse_gemv_generic(s, first_row, n_rows, x, y);
}

#endif

#if defined(TACQ_LANES)

// sum[v] of one row: TACQ_STRIPE tokens in vectors
void tacq_sparse_gemm(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    for (int64_t r = 0; r < n_rows; r++) {
        const uint32_t begin = tacq_row_begin(s, first_row + r);
        const uint32_t end   = tacq_row_begin(s, first_row + r + 1);
        if (begin == end) {
            continue;
        }
        vfloat sum[TACQ_STRIPE/TACQ_LANES];
        for (int v = 0; v < TACQ_STRIPE/TACQ_LANES; v++) {
            sum[v] = vfloat_set1(0.0f);
        }
        for (uint32_t i = begin; i < end; i++) {
            const vfloat value = vfloat_set1(GGML_CPU_FP16_TO_FP32(s->values[i]));
            const float * column = xt + (int64_t) s->columns[i]*TACQ_STRIPE;
            for (int v = 0; v < TACQ_STRIPE/TACQ_LANES; v++) {
                sum[v] = vfloat_mad(value, vfloat_load(column + v*TACQ_LANES), sum[v]);
            }
        }
        float sums[TACQ_STRIPE];
        for (int v = 0; v < TACQ_STRIPE/TACQ_LANES; v++) {
            vfloat_store(sums + v*TACQ_LANES, sum[v]);
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            y[t][r] += sums[t];
        }
    }
}

#else

void tacq_sparse_gemm(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    tacq_sparse_gemm_generic(s, first_row, n_rows, n_tokens, xt, y);
}

#endif

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

// The three parts of a section lie far apart and a chunk of rows takes a little of each: without this, every chunk waits for memory.
void tacq_sparse_prefetch(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t next_row) {
#if defined(TACQ_LANES)
    const uint32_t end = tacq_row_begin(s, first_row + n_rows);
    for (uint32_t i = tacq_row_begin(s, first_row); i < end; i += 32) {
        TACQ_PREFETCH_FAR(s->columns + i);
        TACQ_PREFETCH_FAR(s->values  + i);
    }
    for (int64_t i = 0; next_row >= 0 && i <= n_rows + 16; i += 16) {
        TACQ_PREFETCH_FAR(s->row_ptr + 4*(next_row + i));
    }
#else
    GGML_UNUSED(s); GGML_UNUSED(first_row); GGML_UNUSED(n_rows); GGML_UNUSED(next_row);
#endif
}

#if defined(__AVX2__) && defined(__F16C__)

static const int32_t first_lanes[16] = { -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0 };

static inline __m256 load_first(const float * p, uint32_t n) {
    return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *) (first_lanes + 8 - n)));
}

// products of entries [begin, end) with their activations; single loads are faster than a gather instruction
static inline void multiply_entries(const tacq_sparse * s, uint32_t begin, uint32_t end, const float * x, float * products) {
    uint32_t i = begin;
    for (; i + 8 <= end; i += 8) {
        const uint16_t * c = s->columns + i;
        const __m256 lo_hi = _mm256_set_m128(_mm_setr_ps(x[c[4]], x[c[5]], x[c[6]], x[c[7]]), _mm_setr_ps(x[c[0]], x[c[1]], x[c[2]], x[c[3]]));
        const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (s->values + i)));
        _mm256_storeu_ps(products + (i - begin), _mm256_mul_ps(value, lo_hi));
    }
    for (; i < end; i++) {
        products[i - begin] = GGML_CPU_COMPUTE_FP16_TO_FP32(s->values[i])*x[s->columns[i]];
    }
}

// Products are made for as many rows as fill a buffer, without regard to where a row ends, and summed row by row afterwards: a loop
// over the few entries of a row would be mispredicted at the end of nearly every row.
#define N_PRODUCTS 2048

static inline __m256 add_row(const float * p, uint32_t n) {
    __m256 sum = load_first(p, n < 8 ? n : 8);
    while (n > 8) {
        n -= 8;
        p += 8;
        sum = _mm256_add_ps(sum, load_first(p, n < 8 ? n : 8));
    }
    return sum;
}

void tacq_sparse_gemv(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    float products[N_PRODUCTS + 8];
    for (int64_t row = 0; row < n_rows; ) {
        const uint32_t first = tacq_row_begin(s, first_row + row);
        uint32_t end  = tacq_row_begin(s, first_row + row + 1);
        int64_t  last = row + 1;
        while (last < n_rows && tacq_row_begin(s, first_row + last + 1) - first <= N_PRODUCTS) {
            end = tacq_row_begin(s, first_row + ++last);
        }
        if (end - first > N_PRODUCTS) { // one row alone
            tacq_sparse_gemv_generic(s, first_row + row, 1, x, y + row);
            row = last;
            continue;
        }
        multiply_entries(s, first, end, x, products);
        uint32_t begin = first;
        for (; row + 4 <= last; row += 4) {
            __m256 sum[4];
            for (int r = 0; r < 4; r++) {
                const uint32_t next = tacq_row_begin(s, first_row + row + r + 1);
                sum[r] = add_row(products + (begin - first), next - begin);
                begin  = next;
            }
            const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
            const __m128 out = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
            _mm_storeu_ps(y + row, _mm_add_ps(_mm_loadu_ps(y + row), out));
        }
        for (; row < last; row++) {
            const uint32_t next = tacq_row_begin(s, first_row + row + 1);
            for (; begin < next; begin++) {
                y[row] += products[begin - first];
            }
        }
    }
}

// Rows of a tile for one stripe of tokens: every entry adds its column of activations to the sums of its row, which are then turned
// round 8 by 8, because results of neighbouring rows lie together.
void tacq_sparse_gemm(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    enum { N = TACQ_STRIPE/TACQ_LANES }; // vectors of tokens
    float sums[8][TACQ_STRIPE];
    for (int64_t row = 0; row < n_rows; row += 8) {
        const int n_now = n_rows - row < 8 ? (int) (n_rows - row) : 8;
        if (tacq_row_begin(s, first_row + row) == tacq_row_begin(s, first_row + row + n_now)) {
            continue;
        }
        for (int r = 0; r < n_now; r++) {
            const uint32_t end = tacq_row_begin(s, first_row + row + r + 1);
            vfloat sum[N];
            for (int v = 0; v < N; v++) {
                sum[v] = vfloat_set1(0.0f);
            }
            for (uint32_t i = tacq_row_begin(s, first_row + row + r); i < end; i++) {
                const vfloat  value  = vfloat_set1(GGML_CPU_COMPUTE_FP16_TO_FP32(s->values[i]));
                const float * column = xt + (int64_t) s->columns[i]*TACQ_STRIPE;
                for (int v = 0; v < N; v++) {
                    sum[v] = vfloat_mad(value, vfloat_load(column + v*TACQ_LANES), sum[v]);
                }
            }
            for (int v = 0; v < N; v++) {
                vfloat_store(sums[r] + v*TACQ_LANES, sum[v]);
            }
        }
        int64_t t = 0;
        for (; n_now == 8 && t + 8 <= n_tokens; t += 8) {
            __m256 a[8];
            for (int r = 0; r < 8; r++) {
                a[r] = _mm256_loadu_ps(sums[r] + t);
            }
            tacq_transpose_8x8(a);
            for (int i = 0; i < 8; i++) {
                _mm256_storeu_ps(y[t + i] + row, _mm256_add_ps(_mm256_loadu_ps(y[t + i] + row), a[i]));
            }
        }
        for (; t < n_tokens; t++) {
            for (int r = 0; r < n_now; r++) {
                y[t][row + r] += sums[r][t];
            }
        }
    }
}

#else

void tacq_sparse_gemv(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    tacq_sparse_gemv_generic(s, first_row, n_rows, x, y);
}

void tacq_sparse_gemm(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    tacq_sparse_gemm_generic(s, first_row, n_rows, n_tokens, xt, y);
}

#endif

// The kept weights of a mixed tensor (tacq-kernels.h). About five a row: what costs is not the arithmetic but reading single
// activations and the short sums.
//
// A token's result must have the same bits alone and in any batch, so every path sums a row in one order: product i goes to lane
// i % SUM_LANES, a lane adds its products from the first to the last, and sum_of_lanes adds the lanes. Products are rounded before
// they are added (tacq.cmake has -ffp-contract=off for this file). The order is the machine's: SUM_LANES is its vector's width, and
// 1 where rows are summed by the generic code.

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

// x at eight columns; single loads are faster than a gather instruction
static inline __m256 gather_8(const float * x, const uint16_t * c) {
    return _mm256_set_m128(_mm_setr_ps(x[c[4]], x[c[5]], x[c[6]], x[c[7]]), _mm_setr_ps(x[c[0]], x[c[1]], x[c[2]], x[c[3]]));
}

// Products are made for as many rows as fill a buffer, without regard to where a row ends, and summed row by row afterwards: a loop
// over the few entries of a row would be mispredicted at the end of nearly every row.
#define N_PRODUCTS 2048

#if defined(TACQ_AVX512)

#define SUM_ROWS  16
#define SUM_LANES 16

// products of entries [begin, end) with their activations
static inline void multiply_entries(const tacq_sparse * s, uint32_t begin, uint32_t end, const float * x, float * products) {
    for (uint32_t i = begin; i < end; i += 16, products += 16) {
        uint16_t last[16];
        const uint16_t * c     = s->columns + i;
        __m256i          value = _mm256_setzero_si256();
        if (i + 16 <= end) {
            value = _mm256_loadu_si256((const __m256i *) (s->values + i));
        } else {
            const __mmask16 there = (__mmask16) ((1u << (end - i)) - 1);
            value = _mm256_maskz_loadu_epi16(there, s->values + i);
            _mm256_storeu_si256((__m256i *) last, _mm256_maskz_loadu_epi16(there, c));
            c = last;
        }
        const __m512 at = _mm512_insertf32x8(_mm512_castps256_ps512(gather_8(x, c)), gather_8(x, c + 8), 1);
        _mm512_storeu_ps(products, _mm512_mul_ps(_mm512_cvtph_ps(value), at));
    }
}

// a and b: sums of two lanes each, those of a and b in turn
static inline __m512 add_pairs(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// sum[r] = (or, with `add`, +=) the first 16 or fewer of the `left` products of each of 16 rows, which begin at products + at
TACQ_INLINE void add_products(const float * products, __m512i at, __m512i left, const bool add, __m512 sum[16]) {
    uint32_t at_of[16], mask_of[16];
    _mm512_storeu_si512(at_of,   at);
    _mm512_storeu_si512(mask_of, _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), left), _mm512_set1_epi32(1)));
    TACQ_UNROLL
    for (int r = 0; r < 16; r++) {
        const __m512 of_row = _mm512_maskz_loadu_ps((__mmask16) mask_of[r], products + at_of[r]);
        sum[r] = add ? _mm512_add_ps(sum[r], of_row) : of_row;
    }
}

// y[0..15] += sums of the products of 16 rows: up to 16 products of each at a time, and in the end over the lanes of all
static inline void add_rows(const uint8_t * row_ptr, uint32_t first, const float * products, float * y) {
    const __m512i sixteen = _mm512_set1_epi32(16);
    const __m512i begin   = _mm512_loadu_si512(row_ptr);
    __m512i at   = _mm512_sub_epi32(begin, _mm512_set1_epi32((int) first));
    __m512i left = _mm512_sub_epi32(_mm512_loadu_si512(row_ptr + 4), begin);
    __m512  sum[16];
    add_products(products, at, left, false, sum);
    while (_mm512_cmpgt_epi32_mask(left, sixteen)) {
        at   = _mm512_add_epi32(at, sixteen);
        left = _mm512_max_epi32(_mm512_sub_epi32(left, sixteen), _mm512_setzero_si512());
        add_products(products, at, left, true, sum);
    }
    TACQ_UNROLL
    for (int r = 0; r < 16; r += 4) {
        const __m512d ab = _mm512_castps_pd(add_pairs(sum[r],     sum[r + 1]));
        const __m512d cd = _mm512_castps_pd(add_pairs(sum[r + 2], sum[r + 3]));
        sum[r/4] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    // four lanes of four rows in every quarter: quarters are still to be added
    const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(sum[0], sum[1], 0x44), _mm512_shuffle_f32x4(sum[0], sum[1], 0xee));
    const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(sum[2], sum[3], 0x44), _mm512_shuffle_f32x4(sum[2], sum[3], 0xee));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), all));
}

#else

#define SUM_ROWS  4
#define SUM_LANES 8

static inline void multiply_entries(const tacq_sparse * s, uint32_t begin, uint32_t end, const float * x, float * products) {
    uint32_t i = begin;
    for (; i + 8 <= end; i += 8) {
        const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (s->values + i)));
        _mm256_storeu_ps(products + (i - begin), _mm256_mul_ps(value, gather_8(x, s->columns + i)));
    }
    for (; i < end; i++) {
        products[i - begin] = GGML_CPU_COMPUTE_FP16_TO_FP32(s->values[i])*x[s->columns[i]];
    }
}

static const int32_t first_lanes[16] = { -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0 };

static inline __m256 load_first(const float * p, uint32_t n) {
    return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *) (first_lanes + 8 - n)));
}

static inline __m256 add_row(const float * p, uint32_t n) {
    __m256 sum = load_first(p, n < 8 ? n : 8);
    while (n > 8) {
        n -= 8;
        p += 8;
        sum = _mm256_add_ps(sum, load_first(p, n < 8 ? n : 8));
    }
    return sum;
}

// y[0..3] += sums of the products of 4 rows
static inline void add_rows(const uint8_t * row_ptr, uint32_t first, const float * products, float * y) {
    uint32_t begin[SUM_ROWS + 1];
    memcpy(begin, row_ptr, sizeof(begin));
    __m256 sum[SUM_ROWS];
    for (int r = 0; r < SUM_ROWS; r++) {
        sum[r] = add_row(products + (begin[r] - first), begin[r + 1] - begin[r]);
    }
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
    const __m128 out = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), out));
}

#endif

static_assert(N_PRODUCTS % SUM_LANES == 0, "a piece of a long row begins with lane 0");

// as add_rows does
static inline float sum_of_lanes(const float * p) {
#if SUM_LANES == 16
    float q[4];
    for (int i = 0; i < 4; i++) {
        q[i] = (p[4*i] + p[4*i + 2]) + (p[4*i + 1] + p[4*i + 3]);
    }
    return (q[0] + q[2]) + (q[1] + q[3]);
#else
    return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
#endif
}

// One row, in as many pieces as it takes.
static void multiply_row(const tacq_sparse * s, uint32_t begin, uint32_t end, const float * x, float * products, float * y) {
    float lanes[SUM_LANES] = { 0.0f };
    for (; begin < end; begin += N_PRODUCTS) {
        const uint32_t n = end - begin < N_PRODUCTS ? end - begin : N_PRODUCTS;
        multiply_entries(s, begin, begin + n, x, products);
        for (uint32_t i = 0; i < n; i++) {
            lanes[i % SUM_LANES] += products[i];
        }
    }
    *y += sum_of_lanes(lanes);
}

void tacq_sparse_gemv(const tacq_sparse * s, int64_t first_row, int64_t n_rows, const float * x, float * y) {
    float products[N_PRODUCTS + 16]; // whole vectors are written
    for (int64_t row = 0; row < n_rows; ) {
        const uint32_t first = tacq_row_begin(s, first_row + row);
        int64_t  last = row;
        uint32_t end  = first;
        while (last + SUM_ROWS <= n_rows) {
            const uint32_t next_end = tacq_row_begin(s, first_row + last + SUM_ROWS);
            if (next_end - first > N_PRODUCTS) {
                break;
            }
            last += SUM_ROWS;
            end   = next_end;
        }
        if (last == row) { // too few rows, or too many entries, for several at once
            multiply_row(s, first, tacq_row_begin(s, first_row + row + 1), x, products, y + row);
            row++;
            continue;
        }
        multiply_entries(s, first, end, x, products);
        for (; row < last; row += SUM_ROWS) {
            add_rows(s->row_ptr + 4*(first_row + row), first, products, y + row);
        }
    }
}

enum { N_VECTORS = TACQ_STRIPE/TACQ_LANES }; // of the tokens of a stripe

// The lane of entry i for all tokens of a stripe: the products of entries i, i + SUM_LANES, ... of a row that ends at `end`.
TACQ_INLINE void lane_of(const tacq_sparse * s, uint32_t i, uint32_t end, const float * xt, vfloat sum[N_VECTORS]) {
    const vfloat  value  = vfloat_set1(GGML_CPU_COMPUTE_FP16_TO_FP32(s->values[i]));
    const float * column = xt + (int64_t) s->columns[i]*TACQ_STRIPE;
    for (int v = 0; v < N_VECTORS; v++) {
        sum[v] = vfloat_mul(value, vfloat_load(column + v*TACQ_LANES));
    }
    for (i += SUM_LANES; i < end; i += SUM_LANES) {
        const vfloat  next_value  = vfloat_set1(GGML_CPU_COMPUTE_FP16_TO_FP32(s->values[i]));
        const float * next_column = xt + (int64_t) s->columns[i]*TACQ_STRIPE;
        for (int v = 0; v < N_VECTORS; v++) {
            sum[v] = vfloat_add(sum[v], vfloat_mul(next_value, vfloat_load(next_column + v*TACQ_LANES)));
        }
    }
}

static inline void add_lanes(vfloat a[N_VECTORS], const vfloat b[N_VECTORS]) {
    for (int v = 0; v < N_VECTORS; v++) {
        a[v] = vfloat_add(a[v], b[v]);
    }
}

// Four lanes that begin with that of entry i, in the order of sum_of_lanes; lanes without an entry are zero there and left out here.
TACQ_INLINE void four_lanes(const tacq_sparse * s, uint32_t i, uint32_t end, const float * xt, vfloat sum[N_VECTORS]) {
    const uint32_t n      = end - i < 4 ? end - i : 4;
    const uint32_t second = SUM_LANES == 16 ? 2 : 1; // what is added to the first
    vfloat other[N_VECTORS], last[N_VECTORS];
    lane_of(s, i, end, xt, sum);
    if (second < n) {
        lane_of(s, i + second, end, xt, other);
        add_lanes(sum, other);
    }
    if (3 - second < n) {
        lane_of(s, i + 3 - second, end, xt, other);
        if (3 < n) {
            lane_of(s, i + 3, end, xt, last);
            add_lanes(other, last);
        }
        add_lanes(sum, other);
    }
}

// One row, its entries [begin, end) of which there is at least one, for all tokens of a stripe.
static inline void sum_row(const tacq_sparse * s, uint32_t begin, uint32_t end, const float * xt, vfloat sum[N_VECTORS]) {
    four_lanes(s, begin, end, xt, sum);
#if SUM_LANES == 16
    // (q0 + q2) + (q1 + q3)
    vfloat q[2][N_VECTORS];
    if (begin + 8 < end) {
        four_lanes(s, begin + 8, end, xt, q[0]);
        add_lanes(sum, q[0]);
    }
    if (begin + 4 < end) {
        four_lanes(s, begin + 4, end, xt, q[0]);
        if (begin + 12 < end) {
            four_lanes(s, begin + 12, end, xt, q[1]);
            add_lanes(q[0], q[1]);
        }
        add_lanes(sum, q[0]);
    }
#else
    if (begin + 4 < end) {
        vfloat q[N_VECTORS];
        four_lanes(s, begin + 4, end, xt, q);
        add_lanes(sum, q);
    }
#endif
}

// Rows of a tile for one stripe of tokens: sums of 8 rows, which are then turned round 8 by 8, because results of neighbouring rows lie
// together.
void tacq_sparse_gemm(const tacq_sparse * s, int64_t first_row, int64_t n_rows, int64_t n_tokens, const float * xt, float * const * y) {
    float sums[8][TACQ_STRIPE];
    for (int64_t row = 0; row < n_rows; row += 8) {
        const int n_now = n_rows - row < 8 ? (int) (n_rows - row) : 8;
        if (tacq_row_begin(s, first_row + row) == tacq_row_begin(s, first_row + row + n_now)) {
            continue;
        }
        for (int r = 0; r < n_now; r++) {
            const uint32_t begin = tacq_row_begin(s, first_row + row + r);
            const uint32_t end   = tacq_row_begin(s, first_row + row + r + 1);
            if (begin == end) {
                memset(sums[r], 0, sizeof(sums[r]));
                continue;
            }
            vfloat sum[N_VECTORS];
            sum_row(s, begin, end, xt, sum);
            for (int v = 0; v < N_VECTORS; v++) {
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

// Dot products of a row of base blocks with a row of Q8_0 blocks: integer sums per group of 32, one float product a group.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "tacq-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>

static const int8_t levels_tacq2[TACQ2_NLEVELS] = TACQ2_LEVELS;
static const int8_t levels_tacq3[TACQ3_NLEVELS] = TACQ3_LEVELS;
static const int8_t levels_tacq4[TACQ4_NLEVELS] = TACQ4_LEVELS;

#define TACQ_VEC_DOT_GENERIC(b)                                                                   \
    void tacq_vec_dot_tacq##b##_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, \
                                             const void * vy, size_t by, int nrc) {               \
        assert(n % QK_TACQ == 0);                                                                 \
        assert(nrc == 1);                                                                         \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);                      \
        const block_tacq##b * x = vx;                                                             \
        const block_q8_0    * y = vy;                                                             \
        float sum = 0.0f;                                                                         \
        for (int ib = 0; ib < n/QK_TACQ; ib++) {                                                  \
            for (int g = 0; g < 2; g++) {                                                         \
                const block_q8_0 * yg     = &y[2*ib + g];                                         \
                int32_t sumi = 0;                                                                 \
                for (int i = 0; i < TACQ_GROUP; i++) {                                            \
                    sumi += levels_tacq##b[tacq##b##_index(&x[ib], g*TACQ_GROUP + i)]*yg->qs[i];  \
                }                                                                                 \
                sum += tacq_scale(x[ib].scales[g])*GGML_CPU_FP16_TO_FP32(yg->d)*(float) sumi;     \
            }                                                                                     \
        }                                                                                         \
        *s = sum;                                                                                 \
    }

TACQ_VEC_DOT_GENERIC(2)
TACQ_VEC_DOT_GENERIC(3)
TACQ_VEC_DOT_GENERIC(4)

#if defined(__AVX2__)

static inline __m256i table_of(const int8_t * levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels));
}

// indices of the 32 weights of group g of TACQ2, and of TACQ3 without the third bits: both dwords of the ring turn together (tacq-common.h)
static inline __m256i windows(const uint8_t * qs, int g) {
    uint64_t x;
    memcpy(&x, qs + 8*g, sizeof(x));
    const uint64_t y = x << 2 | x >> 62;
    const __m256i by_v = _mm256_set_epi64x((long long) (x >> 4), (long long) (y >> 4), (long long) x, (long long) y);
    return _mm256_and_si256(_mm256_permutevar8x32_epi32(by_v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)), _mm256_set1_epi8(15));
}

static inline __m256i levels_of_tacq2(const block_tacq2 * x, int g) {
    return _mm256_shuffle_epi8(table_of(levels_tacq2), windows(x->qs, g));
}

static inline __m256i levels_of_tacq3(const block_tacq3 * x, int g) {
    int32_t h;
    memcpy(&h, x->qh + 4*g, sizeof(h));
    const __m256i high  = _mm256_sllv_epi32(_mm256_set1_epi32(h), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)); // the third bit to bit 7
    const __m256i index = windows(x->qs, g);
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table_of(levels_tacq3), index), _mm256_shuffle_epi8(table_of(levels_tacq3 + 16), index), high);
}

static inline __m256i levels_of_tacq4(const block_tacq4 * x, int g) {
    const __m128i q = _mm_loadu_si128((const __m128i *) (x->qs + 16*g));
    return _mm256_shuffle_epi8(table_of(levels_tacq4), _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15)));
}

// eight sums of four products each; |level| <= 63 and |q8| <= 127, so the 16-bit pairs cannot saturate
static inline __m256 dot_group(__m256i levels, const int8_t * y) {
    const __m256i q8     = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *) y), levels);
    const __m256i pairs  = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), q8);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline float add_8(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

static inline __m256 mad_8(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

#define TACQ_VEC_DOT_BODY(b)                                                                          \
    const block_tacq##b * x = vx;                                                                     \
    const block_q8_0    * y = vy;                                                                     \
    __m256 sum0 = _mm256_setzero_ps();                                                                \
    __m256 sum1 = _mm256_setzero_ps();                                                                \
    for (int ib = 0; ib < n/QK_TACQ; ib++) {                                                          \
        const float d0 = tacq_scale(x[ib].scales[0])*GGML_CPU_FP16_TO_FP32(y[2*ib].d);                \
        const float d1 = tacq_scale(x[ib].scales[1])*GGML_CPU_FP16_TO_FP32(y[2*ib + 1].d);            \
        sum0 = mad_8(_mm256_set1_ps(d0), dot_group(levels_of_tacq##b(&x[ib], 0), y[2*ib].qs),     sum0); \
        sum1 = mad_8(_mm256_set1_ps(d1), dot_group(levels_of_tacq##b(&x[ib], 1), y[2*ib + 1].qs), sum1); \
    }                                                                                                 \
    *s = add_8(_mm256_add_ps(sum0, sum1));

#else

#define TACQ_VEC_DOT_BODY(b) tacq_vec_dot_tacq##b##_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc);

#endif

#define TACQ_VEC_DOT(b)                                                                           \
    void tacq_vec_dot_tacq##b##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx,     \
                                     const void * vy, size_t by, int nrc) {                       \
        assert(n % QK_TACQ == 0);                                                                 \
        assert(nrc == 1);                                                                         \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);                      \
        TACQ_VEC_DOT_BODY(b)                                                                      \
    }

TACQ_VEC_DOT(2)
TACQ_VEC_DOT(3)
TACQ_VEC_DOT(4)

// Dot products of a row of base blocks with a row of Q8_0 blocks: integer sums per group of 32, one float product a group.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "tacq-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>

static const int8_t levels_tacq2[TACQ_NLEVELS] = TACQ2_LEVELS;
static const int8_t levels_tacq3[TACQ_NLEVELS] = TACQ3_LEVELS;
static const int8_t levels_tacq4[TACQ_NLEVELS] = TACQ4_LEVELS;

// codes of group g, without codebook

static inline int code_tacq2(const block_tacq2 * x, int g, int i) {
    return (x->qs[i % 16] >> 2*(2*g + i/16)) & 3;
}

static inline int code_tacq3(const block_tacq3 * x, int g, int i) {
    const int l = 2*g + i/16, j = i % 16;
    return ((x->qs[j] >> 2*l) & 3) | ((x->qh[j % 8] >> (2*l + j/8)) & 1) << 2;
}

static inline int code_tacq4(const block_tacq4 * x, int g, int i) {
    return (x->qs[g*16 + i % 16] >> 4*(i/16)) & 15;
}

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
                const uint8_t      byte   = x[ib].scales[g];                                      \
                const int8_t     * levels = levels_tacq##b + TACQ##b##_BOOK(byte);                \
                const block_q8_0 * yg     = &y[2*ib + g];                                         \
                int32_t sumi = 0;                                                                 \
                for (int i = 0; i < TACQ_GROUP; i++) {                                            \
                    sumi += levels[code_tacq##b(&x[ib], g, i)]*yg->qs[i];                         \
                }                                                                                 \
                sum += TACQ##b##_SCALE(byte)*GGML_CPU_FP16_TO_FP32(yg->d)*(float) sumi;           \
            }                                                                                     \
        }                                                                                         \
        *s = sum;                                                                                 \
    }

TACQ_VEC_DOT_GENERIC(2)
TACQ_VEC_DOT_GENERIC(3)
TACQ_VEC_DOT_GENERIC(4)

#if defined(__AVX2__)

// indices into the 16 levels of a type, of the 32 weights of group g; the codebook is or-ed in

static inline __m256i codes_tacq2(const block_tacq2 * x, int g) {
    const __m128i q = _mm_srl_epi16(_mm_loadu_si128((const __m128i *) x->qs), _mm_cvtsi32_si128(4*g));
    const __m256i c = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 2), q), _mm256_set1_epi8(3));
    return _mm256_or_si256(c, _mm256_set1_epi8(TACQ2_BOOK(x->scales[g])));
}

static inline __m256i codes_tacq3(const block_tacq3 * x, int g) {
    const __m128i shift = _mm_cvtsi32_si128(4*g);
    const __m128i q  = _mm_srl_epi16(_mm_loadu_si128((const __m128i *) x->qs), shift);
    const __m256i lo = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 2), q), _mm256_set1_epi8(3));
    // weights 8..15 of each 16 have their bit one higher in the same byte as weights 0..7
    const __m128i h8 = _mm_loadl_epi64((const __m128i *) x->qh);
    const __m128i h  = _mm_srl_epi16(_mm_unpacklo_epi64(h8, _mm_srli_epi16(h8, 1)), shift);
    const __m256i hi = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(h, 2), h), _mm256_set1_epi8(1));
    return _mm256_or_si256(_mm256_or_si256(lo, _mm256_slli_epi16(hi, 2)), _mm256_set1_epi8(TACQ3_BOOK(x->scales[g])));
}

static inline __m256i codes_tacq4(const block_tacq4 * x, int g) {
    const __m128i q = _mm_loadu_si128((const __m128i *) (x->qs + 16*g));
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
}

// eight sums of four products each; |level| <= 63 and |q8| <= 127, so the 16-bit pairs cannot saturate
static inline __m256 dot_group(__m256i table, __m256i codes, const int8_t * y) {
    const __m256i levels = _mm256_shuffle_epi8(table, codes);
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
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) levels_tacq##b)); \
    __m256 sum0 = _mm256_setzero_ps();                                                                \
    __m256 sum1 = _mm256_setzero_ps();                                                                \
    for (int ib = 0; ib < n/QK_TACQ; ib++) {                                                          \
        const float d0 = TACQ##b##_SCALE(x[ib].scales[0])*GGML_CPU_FP16_TO_FP32(y[2*ib].d);           \
        const float d1 = TACQ##b##_SCALE(x[ib].scales[1])*GGML_CPU_FP16_TO_FP32(y[2*ib + 1].d);       \
        sum0 = mad_8(_mm256_set1_ps(d0), dot_group(table, codes_tacq##b(&x[ib], 0), y[2*ib].qs),     sum0); \
        sum1 = mad_8(_mm256_set1_ps(d1), dot_group(table, codes_tacq##b(&x[ib], 1), y[2*ib + 1].qs), sum1); \
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

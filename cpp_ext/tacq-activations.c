// Activations of one token to bytes (tacq-kernels.h), in groups of 32 as Q8_0.

#include "tacq-block.h"

#include <math.h>

void tacq_quantize_act_generic(const float * x, void * act, int64_t n, int64_t first, int64_t last) {
    int8_t  * q = act;
    float   * d = (float *)   (void *) ((char *) act + n);
    int32_t * c = (int32_t *) (void *) ((char *) act + n + n/8);
    for (int64_t g = first; g < last; g++) {
        float largest = 0.0f;
        for (int i = 0; i < TACQ_GROUP; i++) {
            const float a = fabsf(x[g*TACQ_GROUP + i]);
            largest = a > largest ? a : largest;
        }
        const float inverse = largest > 1e-35f ? 127.0f/largest : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < TACQ_GROUP; i++) {
            const int v = (int) nearbyintf(x[g*TACQ_GROUP + i]*inverse);
            q[g*TACQ_GROUP + i] = (int8_t) v;
            sum += v;
        }
        d[g] = largest/127.0f;
        c[g] = -TACQ_OFFSET*sum;
    }
}

void tacq_transpose_stripe_generic(const float * const * x, float * xt, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        for (int t = 0; t < TACQ_STRIPE; t++) {
            xt[i*TACQ_STRIPE + t] = x[t][i];
        }
    }
}

#if defined(__AVX2__)

static inline __m256i round_8(const float * x, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse)); // rounds to nearest even, as nearbyintf
}

void tacq_quantize_act(const float * x, void * act, int64_t n, int64_t first, int64_t last) {
    int8_t  * q = act;
    float   * d = (float *)   (void *) ((char *) act + n);
    int32_t * c = (int32_t *) (void *) ((char *) act + n + n/8);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t g = first; g < last; g++) {
        const float * xg = x + g*TACQ_GROUP;
        __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(xg));
        for (int i = 8; i < TACQ_GROUP; i += 8) {
            a = _mm256_max_ps(a, _mm256_andnot_ps(sign, _mm256_loadu_ps(xg + i)));
        }
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        m = _mm_max_ss(m, _mm_movehdup_ps(m));
        const float  largest = _mm_cvtss_f32(m);
        const __m256 inverse = _mm256_set1_ps(largest > 1e-35f ? 127.0f/largest : 0.0f);

        const __m256i i0 = round_8(xg, inverse), i1 = round_8(xg + 8, inverse), i2 = round_8(xg + 16, inverse), i3 = round_8(xg + 24, inverse);
        const __m256i sum  = _mm256_add_epi32(_mm256_add_epi32(i0, i1), _mm256_add_epi32(i2, i3));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 1));

        // packs work within halves: the dwords of the result are 0 2 4 6, 1 3 5 7
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1), _mm256_packs_epi32(i2, i3));
        _mm256_storeu_si256((__m256i *) (q + g*TACQ_GROUP), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        d[g] = largest/127.0f;
        c[g] = -TACQ_OFFSET*_mm_cvtsi128_si32(s);
    }
}

// 8 tokens and 8 columns at a time
void tacq_transpose_stripe(const float * const * x, float * xt, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        for (int t = 0; t < TACQ_STRIPE; t += 8) {
            __m256 a[8];
            for (int j = 0; j < 8; j++) {
                a[j] = _mm256_loadu_ps(x[t + j] + i);
            }
            tacq_transpose_8x8(a);
            for (int j = 0; j < 8; j++) {
                _mm256_storeu_ps(xt + (i + j)*TACQ_STRIPE + t, a[j]);
            }
        }
    }
}

#else

void tacq_quantize_act(const float * x, void * act, int64_t n, int64_t first, int64_t last) {
    tacq_quantize_act_generic(x, act, n, first, last);
}

void tacq_transpose_stripe(const float * const * x, float * xt, int64_t n) {
    tacq_transpose_stripe_generic(x, xt, n);
}

#endif

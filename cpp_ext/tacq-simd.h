#pragma once

// Vectors of TACQ_LANES rows: lane r holds something of row r. 16 lanes on AVX-512 (VNNI), 8 on AVX2, 4 on NEON (dot product). What there is for one
// machine only is in this file, but for the lookups of AVX-512 VBMI (tacq-block.h); tacq-gemv.c and tacq-gemm.c are written with these functions.

#include "tacq-kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TACQ_AVX512
#define TACQ_LANES 16
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define TACQ_VBMI
#endif
#elif defined(__AVX2__)
#define TACQ_LANES 8
#elif defined(__aarch64__) && defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define TACQ_NEON
#define TACQ_LANES 4
#endif

#if defined(_MSC_VER)
#define TACQ_INLINE static __forceinline
#else
#define TACQ_INLINE static inline __attribute__((always_inline))
#endif

// before a loop of at most 16 turns in which the counter has to become a constant
#if defined(__clang__)
#define TACQ_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define TACQ_UNROLL _Pragma("GCC unroll 16")
#else
#define TACQ_UNROLL
#endif

#if defined(TACQ_LANES)

#if defined(TACQ_NEON)
#include <arm_neon.h>
#define TACQ_PREFETCH_NEAR(address) __builtin_prefetch(address)
#define TACQ_PREFETCH_FAR(address)  __builtin_prefetch(address, 0, 2)
#else
#include <immintrin.h>
#define TACQ_PREFETCH_NEAR(address) _mm_prefetch((const char *) (address), _MM_HINT_T0)
#define TACQ_PREFETCH_FAR(address)  _mm_prefetch((const char *) (address), _MM_HINT_T1)
#endif

#if defined(TACQ_AVX512)

typedef __m512i vint;
typedef __m512  vfloat;

TACQ_INLINE vint   vint_load(const void * p)           { return _mm512_loadu_si512(p); }
TACQ_INLINE void   vint_store(void * p, vint a)        { _mm512_storeu_si512(p, a); }
TACQ_INLINE vint   vint_set1(int32_t a)                { return _mm512_set1_epi32(a); }
TACQ_INLINE vint   vint_set1_byte(int a)               { return _mm512_set1_epi8((char) a); }
TACQ_INLINE vint   vint_table(const void * p)         { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)); }
TACQ_INLINE vint   vint_add_bytes(vint a, vint b)      { return _mm512_add_epi8(a, b); }
TACQ_INLINE vint   vint_and(vint a, vint b)            { return _mm512_and_si512(a, b); }
TACQ_INLINE vint   vint_lookup(vint table, vint bytes) { return _mm512_shuffle_epi8(table, bytes); }
TACQ_INLINE vfloat vfloat_load(const float * p)        { return _mm512_loadu_ps(p); }
TACQ_INLINE void   vfloat_store(float * p, vfloat a)   { _mm512_storeu_ps(p, a); }
TACQ_INLINE vfloat vfloat_set1(float a)                { return _mm512_set1_ps(a); }
TACQ_INLINE vfloat vfloat_of(vint a)                   { return _mm512_cvtepi32_ps(a); }
TACQ_INLINE vfloat vfloat_add(vfloat a, vfloat b)      { return _mm512_add_ps(a, b); }
TACQ_INLINE vfloat vfloat_mul(vfloat a, vfloat b)      { return _mm512_mul_ps(a, b); }
TACQ_INLINE vfloat vfloat_mad(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
TACQ_INLINE vfloat vfloat_bits(vint a)                 { return _mm512_castsi512_ps(a); }
#define vint_shr(a, n) _mm512_srli_epi32(a, n)
#define vint_shl(a, n) _mm512_slli_epi32(a, n)

// sums of four products of unsigned u and signed s bytes
TACQ_INLINE vint vint_dot(vint sum, vint u, vint s) { return _mm512_dpbusd_epi32(sum, u, s); }

// a << 2 | b >> 30
TACQ_INLINE vint vint_shl2_in(vint a, vint b) {
#if defined(TACQ_VBMI)
    return _mm512_shldi_epi32(a, b, 2);
#else
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), _mm512_rol_epi32(b, 2), _mm512_rol_epi32(a, 2), 0xca); // (3 & b) | (~3 & a)
#endif
}

#if !defined(TACQ_VBMI)
// of 32 bytes: lo[n] where bit p of `third` is clear, hi[n] where it is set; of n, the low four bits
TACQ_INLINE vint vint_lookup_32(vint lo, vint hi, vint n, vint third, const int p) {
    n = _mm512_and_si512(n, _mm512_set1_epi8(15));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(lo, n), _mm512_test_epi8_mask(third, _mm512_set1_epi8((char) (1 << p))), hi, n);
}
#endif

// the 16 upper bits of the scales: for 2*TACQ_LANES scale bytes, those of a row side by side
TACQ_INLINE vint tacq_scale_halves(__m256i bytes) {
    const vint w = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8);
    const vint k = _mm512_set1_epi16(0x7f00);
    const vint f = _mm512_mulhi_epu16(_mm512_and_si512(w, k), _mm512_set1_epi16(TACQ_SCALE_STEP >> 16 << 8));
    const vint m = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(w, k), f, _mm512_set1_epi16(TACQ_SCALE_ORIGIN >> 16));
    return _mm512_ternarylogic_epi32(m, w, _mm512_set1_epi16((short) 0x8000), 0xf8); // m | (w & sign)
}

#define vint_unpacklo32(a, b) _mm512_unpacklo_epi32(a, b)
#define vint_unpackhi32(a, b) _mm512_unpackhi_epi32(a, b)
#define vint_unpacklo64(a, b) _mm512_unpacklo_epi64(a, b)
#define vint_unpackhi64(a, b) _mm512_unpackhi_epi64(a, b)

// 16 bytes at the same place of rows 0, 4, 8, 12
TACQ_INLINE vint vint_load_rows(const uint8_t * x, size_t row_size) {
    const __m256i lo = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) (x +  4*row_size)), _mm_loadu_si128((const __m128i *) x));
    const __m256i hi = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) (x + 12*row_size)), _mm_loadu_si128((const __m128i *) (x + 8*row_size)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

#elif defined(TACQ_NEON)

typedef int32x4_t   vint;
typedef float32x4_t vfloat;

#define U8(a)  vreinterpretq_u8_s32(a)
#define S8(a)  vreinterpretq_s8_s32(a)
#define U32(a) vreinterpretq_u32_s32(a)
#define S64(a) vreinterpretq_s64_s32(a)

TACQ_INLINE vint   vint_load(const void * p)           { return vreinterpretq_s32_u8(vld1q_u8(p)); }
TACQ_INLINE void   vint_store(void * p, vint a)        { vst1q_u8(p, U8(a)); }
TACQ_INLINE vint   vint_set1(int32_t a)                { return vdupq_n_s32(a); }
TACQ_INLINE vint   vint_set1_byte(int a)               { return vreinterpretq_s32_s8(vdupq_n_s8((int8_t) a)); }
TACQ_INLINE vint   vint_table(const void * p)          { return vint_load(p); }
TACQ_INLINE vint   vint_add_bytes(vint a, vint b)      { return vreinterpretq_s32_s8(vaddq_s8(S8(a), S8(b))); }
TACQ_INLINE vint   vint_and(vint a, vint b)            { return vandq_s32(a, b); }
TACQ_INLINE vint   vint_lookup(vint table, vint bytes) { return vreinterpretq_s32_u8(vqtbl1q_u8(U8(table), U8(bytes))); }
TACQ_INLINE vint   vint_shr(vint a, int n)             { return vreinterpretq_s32_u32(vshlq_u32(U32(a), vdupq_n_s32(-n))); }
TACQ_INLINE vint   vint_shl(vint a, int n)             { return vshlq_s32(a, vdupq_n_s32(n)); }
TACQ_INLINE vfloat vfloat_load(const float * p)        { return vld1q_f32(p); }
TACQ_INLINE void   vfloat_store(float * p, vfloat a)   { vst1q_f32(p, a); }
TACQ_INLINE vfloat vfloat_set1(float a)                { return vdupq_n_f32(a); }
TACQ_INLINE vfloat vfloat_of(vint a)                   { return vcvtq_f32_s32(a); }
TACQ_INLINE vfloat vfloat_add(vfloat a, vfloat b)      { return vaddq_f32(a, b); }
TACQ_INLINE vfloat vfloat_mul(vfloat a, vfloat b)      { return vmulq_f32(a, b); }
TACQ_INLINE vfloat vfloat_mad(vfloat a, vfloat b, vfloat c) { return vfmaq_f32(c, a, b); }
TACQ_INLINE vfloat vfloat_bits(vint a)                 { return vreinterpretq_f32_s32(a); }

// levels + 64 are at most 127, so they are signed bytes too
TACQ_INLINE vint vint_dot(vint sum, vint u, vint s) { return vdotq_s32(sum, S8(u), S8(s)); }

// a << 2 | b >> 30
TACQ_INLINE vint vint_shl2_in(vint a, vint b) { return vsriq_n_s32(vshlq_n_s32(a, 2), b, 30); }

// of 32 bytes: lo[n] where bit p of `third` is clear, hi[n] where it is set; of n, the low four bits
TACQ_INLINE vint vint_lookup_32(vint lo, vint hi, vint n, vint third, const int p) {
    const uint8x16_t   high  = vshrq_n_u8(vshlq_u8(U8(third), vdupq_n_s8((int8_t) (7 - p))), 7);
    const uint8x16x2_t table = { { U8(lo), U8(hi) } };
    return vreinterpretq_s32_u8(vqtbl2q_u8(table, vsliq_n_u8(U8(n), high, 4)));
}

// the 16 upper bits of the scales: for 2*TACQ_LANES scale bytes, those of a row side by side
TACQ_INLINE vint tacq_scale_halves(uint8x8_t bytes) {
    const uint16x8_t w = vshll_n_u8(bytes, 7); // the sign in bit 14
    const uint16x8_t k = vandq_u16(vmovl_u8(bytes), vdupq_n_u16(TACQ_K_MAX));
    const uint16x8_t f = vmlaq_n_u16(vdupq_n_u16(TACQ_SCALE_ORIGIN >> 16), k, TACQ_SCALE_STEP >> 16);
    return vreinterpretq_s32_u16(vbslq_u16(vdupq_n_u16(0x8000), vaddq_u16(w, w), vandq_u16(f, vtstq_u16(k, k))));
}

#define vint_unpacklo32(a, b) vzip1q_s32(a, b)
#define vint_unpackhi32(a, b) vzip2q_s32(a, b)
#define vint_unpacklo64(a, b) vreinterpretq_s32_s64(vzip1q_s64(S64(a), S64(b)))
#define vint_unpackhi64(a, b) vreinterpretq_s32_s64(vzip2q_s64(S64(a), S64(b)))

// 16 bytes of row 0: the other three are in their own vectors
TACQ_INLINE vint vint_load_rows(const uint8_t * x, size_t row_size) {
    (void) row_size;
    return vint_load(x);
}

#else

typedef __m256i vint;
typedef __m256  vfloat;

TACQ_INLINE vint   vint_load(const void * p)           { return _mm256_loadu_si256((const __m256i *) p); }
TACQ_INLINE void   vint_store(void * p, vint a)        { _mm256_storeu_si256((__m256i *) p, a); }
TACQ_INLINE vint   vint_set1(int32_t a)                { return _mm256_set1_epi32(a); }
TACQ_INLINE vint   vint_set1_byte(int a)               { return _mm256_set1_epi8((char) a); }
TACQ_INLINE vint   vint_table(const void * p)         { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)); }
TACQ_INLINE vint   vint_add_bytes(vint a, vint b)      { return _mm256_add_epi8(a, b); }
TACQ_INLINE vint   vint_and(vint a, vint b)            { return _mm256_and_si256(a, b); }
TACQ_INLINE vint   vint_lookup(vint table, vint bytes) { return _mm256_shuffle_epi8(table, bytes); }
TACQ_INLINE vfloat vfloat_load(const float * p)        { return _mm256_loadu_ps(p); }
TACQ_INLINE void   vfloat_store(float * p, vfloat a)   { _mm256_storeu_ps(p, a); }
TACQ_INLINE vfloat vfloat_set1(float a)                { return _mm256_set1_ps(a); }
TACQ_INLINE vfloat vfloat_of(vint a)                   { return _mm256_cvtepi32_ps(a); }
TACQ_INLINE vfloat vfloat_add(vfloat a, vfloat b)      { return _mm256_add_ps(a, b); }
TACQ_INLINE vfloat vfloat_mul(vfloat a, vfloat b)      { return _mm256_mul_ps(a, b); }
TACQ_INLINE vfloat vfloat_bits(vint a)                 { return _mm256_castsi256_ps(a); }
#define vint_shr(a, n) _mm256_srli_epi32(a, n)
#define vint_shl(a, n) _mm256_slli_epi32(a, n)

TACQ_INLINE vfloat vfloat_mad(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// |u| <= 127 and |s| <= 127, so the 16-bit sums of two cannot saturate
TACQ_INLINE vint vint_dot(vint sum, vint u, vint s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, u, s);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// a << 2 | b >> 30
TACQ_INLINE vint vint_shl2_in(vint a, vint b) { return _mm256_or_si256(_mm256_slli_epi32(a, 2), _mm256_srli_epi32(b, 30)); }

// of 32 bytes: lo[n] where bit p of `third` is clear, hi[n] where it is set; of n, the low four bits
TACQ_INLINE vint vint_lookup_32(vint lo, vint hi, vint n, vint third, const int p) {
    n = _mm256_and_si256(n, _mm256_set1_epi8(15));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(lo, n), _mm256_shuffle_epi8(hi, n), _mm256_slli_epi32(third, 7 - p));
}

// the 16 upper bits of the scales: for 2*TACQ_LANES scale bytes, those of a row side by side
TACQ_INLINE vint tacq_scale_halves(__m128i bytes) {
    const vint w = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
    const vint k = _mm256_and_si256(w, _mm256_set1_epi16(0x7f00));
    const vint f = _mm256_mulhi_epu16(k, _mm256_set1_epi16(TACQ_SCALE_STEP >> 16 << 8));
    const vint m = _mm256_sign_epi16(_mm256_add_epi16(f, _mm256_set1_epi16(TACQ_SCALE_ORIGIN >> 16)), k); // 0 for k = 0
    return _mm256_or_si256(m, _mm256_xor_si256(w, k));
}

#define vint_unpacklo32(a, b) _mm256_unpacklo_epi32(a, b)
#define vint_unpackhi32(a, b) _mm256_unpackhi_epi32(a, b)
#define vint_unpacklo64(a, b) _mm256_unpacklo_epi64(a, b)
#define vint_unpackhi64(a, b) _mm256_unpackhi_epi64(a, b)

// 16 bytes at the same place of rows 0 and 4
TACQ_INLINE vint vint_load_rows(const uint8_t * x, size_t row_size) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) x)), _mm_loadu_si128((const __m128i *) (x + 4*row_size)), 1);
}

#endif

#if !defined(TACQ_NEON)
// a[i][j] becomes a[j][i]
TACQ_INLINE void tacq_transpose_8x8(__m256 a[8]) {
    __m256 b[8];
    for (int i = 0; i < 8; i += 4) {
        const __m256 lo01 = _mm256_unpacklo_ps(a[i],     a[i + 1]), hi01 = _mm256_unpackhi_ps(a[i],     a[i + 1]);
        const __m256 lo23 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), hi23 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i]     = _mm256_shuffle_ps(lo01, lo23, 0x44);
        b[i + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
        b[i + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
        b[i + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        a[i]     = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#endif

// z[e] = bytes 4*e .. 4*e + 3 of 16 bytes at x of every row
TACQ_INLINE void tacq_load_transposed(const uint8_t * x, size_t row_size, vint z[4]) {
    const vint a  = vint_load_rows(x,              row_size);
    const vint b  = vint_load_rows(x +   row_size, row_size);
    const vint c  = vint_load_rows(x + 2*row_size, row_size);
    const vint d  = vint_load_rows(x + 3*row_size, row_size);
    const vint ab = vint_unpacklo32(a, b), AB = vint_unpackhi32(a, b);
    const vint cd = vint_unpacklo32(c, d), CD = vint_unpackhi32(c, d);
    z[0] = vint_unpacklo64(ab, cd);
    z[1] = vint_unpackhi64(ab, cd);
    z[2] = vint_unpacklo64(AB, CD);
    z[3] = vint_unpackhi64(AB, CD);
}

// tacq_scale_halves of the two bytes at x of every row
TACQ_INLINE vint tacq_load_scales(const uint8_t * x, size_t row_size) {
    uint16_t w[TACQ_LANES];
    for (int r = 0; r < TACQ_LANES; r++) {
        memcpy(&w[r], x + r*row_size, 2);
    }
#if defined(TACQ_NEON)
    return tacq_scale_halves(vreinterpret_u8_u16(vld1_u16(w)));
#else
    const __m128i lo = _mm_setr_epi16((short) w[0], (short) w[1], (short) w[2], (short) w[3], (short) w[4], (short) w[5], (short) w[6], (short) w[7]);
#if defined(TACQ_AVX512)
    const __m128i hi = _mm_setr_epi16((short) w[8], (short) w[9], (short) w[10], (short) w[11], (short) w[12], (short) w[13], (short) w[14], (short) w[15]);
    return tacq_scale_halves(_mm256_set_m128i(hi, lo));
#else
    return tacq_scale_halves(lo);
#endif
#endif
}

// the same of 2*TACQ_LANES bytes that lie one after the other
TACQ_INLINE vint tacq_load_scales_interleaved(const uint8_t * x) {
#if defined(TACQ_NEON)
    return tacq_scale_halves(vld1_u8(x));
#elif defined(TACQ_AVX512)
    return tacq_scale_halves(_mm256_loadu_si256((const __m256i *) x));
#else
    return tacq_scale_halves(_mm_loadu_si128((const __m128i *) x));
#endif
}

#endif // TACQ_LANES

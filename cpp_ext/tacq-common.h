#pragma once

// The byte layout and the numbers of the codec, for all backends. The specification is tacq_export/block_codec.py and
// tacq_export/sparse_section.py; README.md has the layout in words. Little endian.

#include "tacq-types.h"

#include <string.h>

#ifdef __cplusplus
#define TACQ_STATIC_ASSERT(cond, msg) static_assert(cond, msg)
#else
#define TACQ_STATIC_ASSERT(cond, msg) _Static_assert(cond, msg)
#endif

//
// base section
//

#define QK_TACQ    64 // weights a block
#define TACQ_GROUP 32 // weights a scale byte

// Weight l*16 + j of a block (l = 0..3, j = 0..15) has its code in byte j, so that one shift and one mask unpack 16 weights.
// scale byte: bit 7 the sign, then the codebook, then k in the low bits

typedef struct {
    uint8_t scales[2];
    uint8_t qs[16];     // byte j: codes of weights l*16 + j at bit 2*l
} block_tacq2;
TACQ_STATIC_ASSERT(sizeof(block_tacq2) == 18, "wrong tacq2 block size");

typedef struct {
    uint8_t scales[2];
    uint8_t qs[16];     // the low two bits, as in block_tacq2
    uint8_t qh[8];      // the third bit: byte j, bit 2*l: weight l*16 + j; bit 2*l + 1: weight l*16 + 8 + j
} block_tacq3;
TACQ_STATIC_ASSERT(sizeof(block_tacq3) == 26, "wrong tacq3 block size");

typedef struct {
    uint8_t scales[2];
    uint8_t qs[32];     // byte h*16 + j: weight h*32 + j in the low half, weight h*32 + 16 + j in the high half
} block_tacq4;
TACQ_STATIC_ASSERT(sizeof(block_tacq4) == 34, "wrong tacq4 block size");

#define TACQ_NLEVELS 16

// All codebooks of a type fill one 16-byte shuffle register: tacq2 4 x 4 levels, tacq3 2 x 8, tacq4 1 x 16.
#define TACQ2_LEVELS { -17, -4, 6, 19,  -14, -2, 8, 22,  -10, 0, 10, 26,  -31, -3, 5, 25 }
#define TACQ3_LEVELS { -49, -28, -14, -3, 7, 18, 33, 55,  -40, -21, -8, 1, 12, 25, 42, 63 }
#define TACQ4_LEVELS { -57, -41, -31, -23, -16, -9, -3, 0, 5, 11, 16, 22, 29, 37, 47, 63 }

// The scale of step k is F(k) - F(0), F(k) the float with the bit pattern ORIGIN + k*STEP: logarithmic, and exactly 0 for k = 0.
#define TACQ2_SCALE_BITS   5
#define TACQ3_SCALE_BITS   6
#define TACQ4_SCALE_BITS   7
#define TACQ2_SCALE_ORIGIN ((127u - 14u) << 23)
#define TACQ3_SCALE_ORIGIN ((127u - 15u) << 23)
#define TACQ4_SCALE_ORIGIN ((127u - 15u) << 23)
#define TACQ2_SCALE_STEP   (12u << 18)
#define TACQ3_SCALE_STEP   (3u << 19)
#define TACQ4_SCALE_STEP   (3u << 18)

static inline float tacq_float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

// scale of a scale byte, with its sign
static inline float tacq_scale(uint8_t byte, int scale_bits, uint32_t origin, uint32_t step) {
    const uint32_t k         = byte & ((1u << scale_bits) - 1u);
    const float    magnitude = tacq_float_of_bits(origin + k*step) - tacq_float_of_bits(origin);
    return byte & 0x80 ? -magnitude : magnitude;
}

#define TACQ2_SCALE(byte) tacq_scale(byte, TACQ2_SCALE_BITS, TACQ2_SCALE_ORIGIN, TACQ2_SCALE_STEP)
#define TACQ3_SCALE(byte) tacq_scale(byte, TACQ3_SCALE_BITS, TACQ3_SCALE_ORIGIN, TACQ3_SCALE_STEP)
#define TACQ4_SCALE(byte) tacq_scale(byte, TACQ4_SCALE_BITS, TACQ4_SCALE_ORIGIN, TACQ4_SCALE_STEP)

// where a scale byte's codebook begins in the 16 levels of its type: a multiple of 4, of 8, always 0
#define TACQ2_BOOK(byte) (((byte) >> 3) & 0x0c)
#define TACQ3_BOOK(byte) (((byte) >> 3) & 0x08)
#define TACQ4_BOOK(byte) 0

//
// sparse section: header, u32 row_ptr[n_rows + 1], u16 column[nnz], f16 value[nnz], zeros
//

#define TACQ_SPARSE_MAGIC   0x53514354u // "TCQS"
#define TACQ_SPARSE_VERSION 1

typedef struct {
    uint32_t magic;
    uint16_t version;
    uint16_t flags;
    uint32_t n_rows;
    uint32_t nnz;
} tacq_sparse_header;
TACQ_STATIC_ASSERT(sizeof(tacq_sparse_header) == 16, "wrong sparse header size");

// The parts of a sparse section. row_ptr is a byte pointer: a base section ends at an even address, not at a multiple of 4.
typedef struct {
    tacq_sparse_header  header;
    const uint8_t     * row_ptr;
    const uint16_t    * columns;
    const uint16_t    * values;  // fp16
} tacq_sparse;

static inline tacq_sparse tacq_sparse_parts(const void * section) {
    tacq_sparse s;
    memcpy(&s.header, section, sizeof(s.header));
    s.row_ptr = (const uint8_t *) section + sizeof(s.header);
    s.columns = (const uint16_t *) (const void *) (s.row_ptr + 4*((size_t) s.header.n_rows + 1));
    s.values  = s.columns + s.header.nnz;
    return s;
}

static inline uint32_t tacq_row_begin(const tacq_sparse * s, int64_t row) {
    uint32_t begin;
    memcpy(&begin, s->row_ptr + 4*row, sizeof(begin));
    return begin;
}

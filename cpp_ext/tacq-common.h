#pragma once

// The byte layout and the numbers of the codec, for all backends. The specification is FORMAT.md; tacq_export/format/block_codec.py
// and tacq_export/format/sparse_section.py are the same in Python. Little endian.

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

// TACQ2 and TACQ3: the codes of a group form a ring, and a level is looked up with its own code and the low two bits of the code before
// it. Weight 16*w + 4*v + b of a block (w, v, b = 0..3) has its code in byte b of the w-th dword, so a dword x holds 16 codes in the order
// of the ring; its first code follows the last one of the group's other dword. With y = x << 2 | other >> 30, the low halves of the bytes
// of y, x, y >> 4 and x >> 4 are what to look up for v = 0, 1, 2, 3: each 4 weights that are neighbours.

typedef struct {
    uint8_t scales[2];
    uint8_t qs[16];     // byte 4*w + b, bits 2*v and 2*v + 1: weight 16*w + 4*v + b
} block_tacq2;
TACQ_STATIC_ASSERT(sizeof(block_tacq2) == 18, "wrong tacq2 block size");

typedef struct {
    uint8_t scales[2];
    uint8_t qs[16];     // the low two bits, as in block_tacq2
    uint8_t qh[8];      // the third bit: byte 4*g + b, bit 4*u + v: weight 32*g + 16*u + 4*v + b
} block_tacq3;
TACQ_STATIC_ASSERT(sizeof(block_tacq3) == 26, "wrong tacq3 block size");

typedef struct {
    uint8_t scales[2];
    uint8_t qs[32];     // byte h*16 + j: weight h*32 + j in the low half, weight h*32 + 16 + j in the high half
} block_tacq4;
TACQ_STATIC_ASSERT(sizeof(block_tacq4) == 34, "wrong tacq4 block size");

// TACQ2 and TACQ3: at 4*code + (code before) % 4; TACQ4: at the code
#define TACQ2_LEVELS { -52, 36, -12, 13, -14, -31, 5, 63, 6, -6, 25, -24, 30, 11, -35, -5 }
#define TACQ3_LEVELS { -63, -10, -29, -20, -27, -2, -17, -10, -16, -41, -9, -2, -8, -21, -1, -34, \
                        -1, 21, 6, 12, 6, 35, 14, 22, 16, 5, 26, 39, 28, 13, 51, 5 }
#define TACQ4_LEVELS { -61, -47, -36, -28, -21, -14, -8, -2, 4, 10, 16, 23, 30, 39, 50, 63 }

#define TACQ2_NLEVELS 16
#define TACQ3_NLEVELS 32
#define TACQ4_NLEVELS 16

// A scale byte has the sign in bit 7 and k below it. The scale is 0 for k = 0, else the float with the bit pattern ORIGIN + k*STEP:
// logarithmic, 7/32 octave a step. Its low 16 bits are zeros.
#define TACQ_SCALE_ORIGIN ((127u - 28u) << 23)
#define TACQ_SCALE_STEP   (7u << 18)
#define TACQ_K_MAX        127

static inline float tacq_float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

// scale of a scale byte, with its sign
static inline float tacq_scale(uint8_t byte) {
    const uint32_t k = byte & TACQ_K_MAX;
    return tacq_float_of_bits((k ? TACQ_SCALE_ORIGIN + k*TACQ_SCALE_STEP : 0u) | (uint32_t) (byte & 0x80) << 24);
}

// Codes of weight i of a block, and where its level is.

static inline int tacq_code2(const uint8_t * qs, int i) {
    return (qs[i/16*4 + i % 4] >> i/4 % 4*2) & 3;
}

// the weight before weight i in the ring of its group: four less, and from the first four on to the end of another byte or dword
static inline int tacq_before(int i) {
    return i & 12 ? i - 4 : i & 3 ? i + 11 : (i ^ 16) + 15;
}

static inline int tacq2_index(const block_tacq2 * x, int i) {
    return 4*tacq_code2(x->qs, i) + tacq_code2(x->qs, tacq_before(i));
}

static inline int tacq3_index(const block_tacq3 * x, int i) {
    const int high = (x->qh[i/32*4 + i % 4] >> i/4 % 8) & 1;
    return 16*high + 4*tacq_code2(x->qs, i) + tacq_code2(x->qs, tacq_before(i));
}

static inline int tacq4_index(const block_tacq4 * x, int i) {
    return (x->qs[i/32*16 + i % 16] >> i/16 % 2*4) & 15;
}

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

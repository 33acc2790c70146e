#pragma once

// Codes, levels and scales of base blocks: one by one for the generic kernels, and of TACQ_LANES rows at once.
// `bits` is a constant wherever it is a parameter here: every function is inlined.

#include "tacq-simd.h"

#define TACQ_BLOCK_BYTES(bits) (2 + 8*(bits))

static const int8_t tacq_levels[3][TACQ_NLEVELS] = { TACQ2_LEVELS, TACQ3_LEVELS, TACQ4_LEVELS };

static const int      tacq_scale_bits[3]   = { TACQ2_SCALE_BITS,   TACQ3_SCALE_BITS,   TACQ4_SCALE_BITS };
static const uint32_t tacq_scale_origin[3] = { TACQ2_SCALE_ORIGIN, TACQ3_SCALE_ORIGIN, TACQ4_SCALE_ORIGIN };
static const uint32_t tacq_scale_step[3]   = { TACQ2_SCALE_STEP,   TACQ3_SCALE_STEP,   TACQ4_SCALE_STEP };
static const int      tacq_book_mask[3]    = { 0x0c, 0x08, 0x00 }; // of scale byte >> 3

static inline float tacq_scale_of(int bits, uint8_t byte) {
    return tacq_scale(byte, tacq_scale_bits[bits - 2], tacq_scale_origin[bits - 2], tacq_scale_step[bits - 2]);
}

// level of weight i of a block
static inline int tacq_level(int bits, const uint8_t * block, int i) {
    const uint8_t * qs = block + 2;
    const int l = i/16, j = i % 16;
    int code;
    if (bits == 4) {
        code = (qs[l/2*16 + j] >> 4*(l % 2)) & 15;
    } else {
        code = (qs[j] >> 2*l) & 3;
        if (bits == 3) {
            code |= ((qs[16 + j % 8] >> (2*l + j/8)) & 1) << 2;
        }
    }
    return tacq_levels[bits - 2][((block[i/TACQ_GROUP] >> 3) & tacq_book_mask[bits - 2]) + code];
}

#if defined(TACQ_LANES)

// levels + TACQ_OFFSET by index. A byte of codes holds four weights, but a shuffle needs the index in the low four bits, and every
// shift counts. So TACQ2 and TACQ3 have a second order of the same table, for codes that are in bits 2 and 3:
//   bits of an index     3     2     1     0
//   tacq2       first    book  book  code  code        second  code  code  book  book
//   tacq3       first    book  high  low   low         second  low   low   book  high
static const uint8_t tacq_tables[4][TACQ_NLEVELS] = {
    { 47, 60, 70, 83, 50, 62, 72, 86, 54, 64, 74, 90, 33, 61, 69, 89 },
    { 47, 50, 54, 33, 60, 62, 64, 61, 70, 72, 74, 69, 83, 86, 90, 89 },
    { 15, 36, 50, 61, 71, 82, 97, 119, 24, 43, 56, 65, 76, 89, 106, 127 },
    { 15, 71, 24, 76, 36, 82, 43, 89, 50, 97, 56, 106, 61, 119, 65, 127 },
};

#if defined(TACQ_AVX512)
// the scales of TACQ2 by k, without sign
static const float tacq2_magnitudes[32] = {
    0.0f, 2.28881836e-05f, 4.57763672e-05f, 7.62939453e-05f, 0.000122070312f, 0.00016784668f, 0.000244140625f, 0.000335693359f,
    0.000427246094f, 0.000610351562f, 0.000793457031f, 0.00103759766f, 0.00140380859f, 0.00177001953f, 0.00238037109f, 0.00311279297f,
    0.00384521484f, 0.00531005859f, 0.00677490234f, 0.00872802734f, 0.0116577148f, 0.0145874023f, 0.0194702148f, 0.0253295898f,
    0.0311889648f, 0.0429077148f, 0.0546264648f, 0.0702514648f, 0.0936889648f, 0.117126465f, 0.156188965f, 0.203063965f,
};
#endif

// One block of every row, transposed: lane r of codes[i] has four bytes of codes of row r.
typedef struct {
    vfloat scales[2];    // of the two groups
    vint   books[2][2];  // of the two groups: the codebook where the first and where the second order has it, in every byte
    vint   codes[8];     // [0..3] bytes 0..15, [4..7] bytes 16..31 (TACQ4) or 16..23 (TACQ3)
} tacq_block_rows;

typedef struct {
    vint first, second;
} tacq_lookup;

TACQ_INLINE tacq_lookup tacq_lookup_of(const int bits) {
    tacq_lookup table;
    if (bits == 4) {
        table.first  = vint_add_bytes(vint_table(tacq_levels[2]), vint_set1_byte(TACQ_OFFSET));
        table.second = table.first;
    } else {
        table.first  = vint_table(tacq_tables[2*bits - 4]);
        table.second = vint_table(tacq_tables[2*bits - 3]);
    }
    return table;
}

// scales with their signs; `words` >> 8*g has the scale byte
TACQ_INLINE vfloat tacq_scales(const int bits, vint words, const int g) {
    const vint byte = g == 0 ? words : vint_shr(words, 8);
    vint magnitude;
#if defined(TACQ_AVX512)
    if (bits == 2) {
        magnitude = _mm512_permutex2var_epi32(vint_load(tacq2_magnitudes), byte, vint_load(tacq2_magnitudes + 16)); // index: 5 bits
    } else
#endif
    {
        const vint origin = vint_set1((int) tacq_scale_origin[bits - 2]);
        const vint k      = vint_and(byte, vint_set1((1 << tacq_scale_bits[bits - 2]) - 1));
        const vint f      = vint_add(vint_mul(k, vint_opaque((int) tacq_scale_step[bits - 2])), origin);
        magnitude = vint_bits(vfloat_sub(vfloat_bits(f), vfloat_bits(origin)));
    }
    return vfloat_bits(vint_xor_and(magnitude, g == 0 ? vint_shl(words, 24) : vint_shl(words, 16), vint_set1((int) 0x80000000u)));
}

// the scale bytes of every row, in a dword of its lane
TACQ_INLINE void tacq_set_scales(const int bits, vint words, tacq_block_rows * b) {
    b->scales[0] = tacq_scales(bits, words, 0);
    b->scales[1] = tacq_scales(bits, words, 1);
    if (bits < 4) {
        const vint first  = vint_and(vint_shr(words, 3),            vint_set1_byte(bits == 2 ? 0x0c : 0x08)); // bits 5, 6 or bit 6
        const vint second = vint_and(vint_shr(words, 5), vint_set1_byte(bits == 2 ? 0x03 : 0x02));
        for (int g = 0; g < 2; g++) {
            b->books[g][0] = tacq_repeat_byte(first, g);
            b->books[g][1] = tacq_repeat_byte(second, g);
        }
    }
}

// block `x` of the first row, and the blocks above it of the other rows
TACQ_INLINE tacq_block_rows tacq_load_block(const int bits, const uint8_t * x, size_t row_size) {
    tacq_block_rows b;
    tacq_set_scales(bits, tacq_load_words(x, row_size), &b);
    tacq_load_transposed(x + 2, row_size, b.codes);
    if (bits == 3) {
        // 16 bytes that end with the block: the last two dwords are the third bits
        vint z[4];
        tacq_load_transposed(x + 10, row_size, z);
        b.codes[4] = z[2];
        b.codes[5] = z[3];
    }
    if (bits == 4) {
        tacq_load_transposed(x + 18, row_size, b.codes + 4);
    }
    return b;
}

// Block ib of TACQ_LANES rows of n weights that tacq_interleave has put at x.
TACQ_INLINE tacq_block_rows tacq_load_interleaved(const int bits, const uint8_t * x, int64_t n, int64_t ib) {
    tacq_block_rows b;
    tacq_set_scales(bits, tacq_widen_words(x + ib*2*TACQ_LANES), &b);
    const uint8_t * codes = x + n/QK_TACQ*2*TACQ_LANES + ib*8*bits*TACQ_LANES;
    for (int i = 0; i < 2*bits; i++) {
        b.codes[i] = vint_load(codes + i*4*TACQ_LANES);
    }
    return b;
}

// Block ib of TACQ_LANES rows from x on, in either order.
TACQ_INLINE tacq_block_rows tacq_load(const int bits, const bool interleaved, const uint8_t * x, size_t row_size, int64_t n, int64_t ib) {
    return interleaved ? tacq_load_interleaved(bits, x, n, ib) : tacq_load_block(bits, x + ib*TACQ_BLOCK_BYTES(bits), row_size);
}

// How many of n_rows the kernels take TACQ_LANES at a time; the others, one by one. Rows as in the file may be taken twice, if there are enough.
TACQ_INLINE int64_t tacq_side_by_side(const bool interleaved, int64_t n_rows) {
    return interleaved || n_rows < TACQ_LANES ? n_rows/TACQ_LANES*TACQ_LANES : n_rows;
}

// Asks for one block's share of the TACQ_LANES rows at `next`, line after line. Hardware prefetchers do not follow rows that are read
// side by side, and are too late for a single stream (tools/LOG.md). `near`: into the first cache, if they fit there.
TACQ_INLINE void tacq_prefetch_block(const int bits, const bool near, const uint8_t * next) {
    for (int i = 0; i < TACQ_LANES*TACQ_BLOCK_BYTES(bits); i += 64) {
        if (near) {
            TACQ_PREFETCH_NEAR(next + i);
        } else {
            TACQ_PREFETCH_FAR(next + i);
        }
    }
}

// levels + TACQ_OFFSET of weights 16*l + 4*e .. 16*l + 4*e + 3 of every row
TACQ_INLINE vint tacq_levels_of(const int bits, const tacq_block_rows * b, const tacq_lookup * table, const int l, const int e) {
    if (bits == 4) {
        const vint codes = b->codes[l/2*4 + e];
        return vint_lookup(table->first, vint_and(l % 2 == 0 ? codes : vint_shr(codes, 4), vint_set1_byte(15)));
    }
    const vint low  = l < 2 ? b->codes[e] : vint_shr(b->codes[e], 4);
    const vint mask = vint_set1_byte(l % 2 == 0 ? 0x03 : 0x0c);
    const vint book = b->books[l/2][l % 2];
    const vint lookup = l % 2 == 0 ? table->first : table->second;
    if (bits == 2) {
        return vint_lookup(lookup, vint_and_or(low, mask, book));
    }
    // the third bit comes from bit 2*l + e/2 of its byte to bit 2 or 0
    const int  move  = 2*l + e/2 - (l % 2 == 0 ? 2 : 0);
    const vint third = b->codes[4 + e % 2];
    const vint high  = move < 0 ? vint_shl(third, -move) : move > 0 ? vint_shr(third, move) : third;
    return vint_lookup(lookup, vint_and_or(vint_select(mask, low, high), vint_set1_byte(l % 2 == 0 ? 0x07 : 0x0d), book));
}

#endif // TACQ_LANES

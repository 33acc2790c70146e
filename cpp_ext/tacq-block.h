#pragma once

// Codes, levels and scales of base blocks: one by one for the generic kernels, and of TACQ_LANES rows at once.
// `bits` is a constant wherever it is a parameter here: every function is inlined.

#include "tacq-simd.h"

#define TACQ_BLOCK_BYTES(bits) (2 + 8*(bits))

static const int8_t tacq_levels[3][TACQ3_NLEVELS] = { TACQ2_LEVELS, TACQ3_LEVELS, TACQ4_LEVELS };

// level of weight i of a block
static inline int tacq_level(int bits, const uint8_t * block, int i) {
    switch (bits) {
        case 2:  return tacq_levels[0][tacq2_index((const block_tacq2 *) block, i)];
        case 3:  return tacq_levels[1][tacq3_index((const block_tacq3 *) block, i)];
        default: return tacq_levels[2][tacq4_index((const block_tacq4 *) block, i)];
    }
}

#if defined(TACQ_LANES)

// One block of every row, transposed: lane r of codes[i] has four bytes of codes of row r.
typedef struct {
    vfloat scales[2];    // of the two groups
    vint   codes[8];     // [0..3] bytes 0..15, [4..7] bytes 16..31 (TACQ4) or 16..23 (TACQ3)
} tacq_block_rows;

// levels + TACQ_OFFSET by index
typedef struct {
    vint at[4];
} tacq_lookup;

#if defined(TACQ_VBMI)

// A lookup of 64 bytes takes six bits and ignores the other two of a byte. So no code needs a mask: a table holds its levels again for
// every value of the bits that do not count. And there is a table for each v (tacq-common.h), because the index can begin at bit 2 as well:
//   v   bits 0..3 of   bits 2..5 of   TACQ3's third bit of u = 0 and 1
//   0   y                             4, of third << 4 and third
//   1   x                             5, the same
//   2                  x              0, of third >> 2 and third >> 6
//   3                  x >> 2         1, the same
TACQ_INLINE tacq_lookup tacq_lookup_of(const int bits) {
    const __m256i few = _mm256_loadu_si256((const __m256i *) (const void *) tacq_levels[bits - 2]);
    const vint levels = bits == 3 ? _mm512_broadcast_i64x4(few) : vint_table(tacq_levels[bits - 2]);
    tacq_lookup table;
    for (int v = 0; v < 4; v++) {
        uint8_t index[64];
        for (int i = 0; i < 64; i++) {
            index[i] = (uint8_t) (v < 2 ? (i & 15) | (i >> v & 16) : i >> 2 | (i >> (v - 2) & 1) << 4);
        }
        table.at[v] = _mm512_permutexvar_epi8(vint_load(index), vint_add_bytes(levels, vint_set1_byte(TACQ_OFFSET)));
    }
    return table;
}

// weights 4*v .. 4*v + 3 of dword x of a ring, y = x << 2 | other >> 30, `third` the third bits of the group, u which of its dwords x is
TACQ_INLINE vint tacq_lookup_ring(const int bits, const tacq_lookup * table, vint x, vint y, vint third, const int u, const int v) {
    vint index = v == 0 ? y : v == 3 ? vint_shr(x, 2) : x;
    if (bits == 3) {
        const vint high = v < 2 ? (u == 0 ? vint_shl(third, 4) : third) : vint_shr(third, u == 0 ? 2 : 6);
        index = _mm512_ternarylogic_epi32(vint_set1_byte(v < 2 ? 0x0f : 0x3c), index, high, 0xca); // (m & index) | (~m & high)
    }
    return _mm512_permutexvar_epi8(index, table->at[v]);
}

// of a TACQ4 code in the low or the high half of every byte
TACQ_INLINE vint tacq_lookup_half(const tacq_lookup * table, vint codes, const bool high) {
    return _mm512_permutexvar_epi8(high ? vint_shr(codes, 4) : codes, table->at[0]);
}

#else

TACQ_INLINE tacq_lookup tacq_lookup_of(const int bits) {
    tacq_lookup table;
    table.at[0] = vint_add_bytes(vint_table(tacq_levels[bits - 2]),      vint_set1_byte(TACQ_OFFSET));
    table.at[1] = vint_add_bytes(vint_table(tacq_levels[bits - 2] + 16), vint_set1_byte(TACQ_OFFSET));
    return table;
}

// of a code in the low or the high half of every byte
TACQ_INLINE vint tacq_lookup_half(const tacq_lookup * table, vint codes, const bool high) {
    return vint_lookup(table->at[0], vint_and(high ? vint_shr(codes, 4) : codes, vint_set1_byte(15)));
}

// weights 4*v .. 4*v + 3 of dword x of a ring, y = x << 2 | other >> 30, `third` the third bits of the group, u which of its dwords x is
TACQ_INLINE vint tacq_lookup_ring(const int bits, const tacq_lookup * table, vint x, vint y, vint third, const int u, const int v) {
    const vint codes = v % 2 == 0 ? y : x;
    if (bits == 2) {
        return tacq_lookup_half(table, codes, v >= 2);
    }
    return vint_lookup_32(table->at[0], table->at[1], v >= 2 ? vint_shr(codes, 4) : codes, third, 4*u + v);
}

#endif

TACQ_INLINE void tacq_set_scales(vint halves, tacq_block_rows * b) {
    b->scales[0] = vfloat_bits(vint_shl(halves, 16));
    b->scales[1] = vfloat_bits(vint_and(halves, vint_set1((int) 0xffff0000u)));
}

// block `x` of the first row, and the blocks above it of the other rows
TACQ_INLINE tacq_block_rows tacq_load_block(const int bits, const uint8_t * x, size_t row_size) {
    tacq_block_rows b;
    tacq_set_scales(tacq_load_scales(x, row_size), &b);
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
    tacq_set_scales(tacq_load_scales_interleaved(x + ib*2*TACQ_LANES), &b);
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

// levels + TACQ_OFFSET of weights 16*w + 4*v .. 16*w + 4*v + 3 of every row
TACQ_INLINE vint tacq_levels_of(const int bits, const tacq_block_rows * b, const tacq_lookup * table, const int w, const int v) {
    if (bits == 4) {
        return tacq_lookup_half(table, b->codes[w/2*4 + v], w % 2 == 1);
    }
    const vint x = b->codes[w], y = vint_shl2_in(x, b->codes[w ^ 1]);
    return tacq_lookup_ring(bits, table, x, y, b->codes[bits == 3 ? 4 + w/2 : 0], w % 2, v);
}

#endif // TACQ_LANES

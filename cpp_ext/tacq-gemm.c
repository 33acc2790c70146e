// Many tokens (tacq-kernels.h): a tile of rows is unpacked to bytes and float scales, which stay in the cache while all tokens pass.

#include "tacq-block.h"

static inline float * tile_scales(void * tile, int64_t n) {
    return (float *) (void *) ((uint8_t *) tile + n*TACQ_TILE);
}

void tacq_unpack_generic(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    uint8_t * levels = tile;
    float   * scales = tile_scales(tile, n);
    for (int64_t r = 0; r < n_rows; r++) {
        const uint8_t * row = (const uint8_t *) x + r*row_size;
        for (int64_t k = 0; k < n; k++) {
            const uint8_t * block = row + k/QK_TACQ*TACQ_BLOCK_BYTES(bits);
            levels[(k/4*TACQ_TILE + r)*4 + k % 4] = (uint8_t) (tacq_level(bits, block, (int) (k % QK_TACQ)) + TACQ_OFFSET);
        }
        for (int64_t g = 0; g < n/TACQ_GROUP; g++) {
            scales[g*TACQ_TILE + r] = tacq_scale(row[g/2*TACQ_BLOCK_BYTES(bits) + g % 2]);
        }
    }
}

void tacq_gemm_generic(int64_t n, int64_t n_rows, int64_t n_tokens, const void * tile, const void * const * acts, float * const * y) {
    const uint8_t * levels = tile;
    const float   * scales = (const float *) (const void *) (levels + n*TACQ_TILE);
    for (int64_t t = 0; t < n_tokens; t++) {
        const int8_t  * q = acts[t];
        const float   * d = tacq_act_d(acts[t], n);
        const int32_t * c = tacq_act_c(acts[t], n);
        for (int64_t r = 0; r < n_rows; r++) {
            float sum = 0.0f;
            for (int64_t g = 0; g < n/TACQ_GROUP; g++) {
                int32_t dot = c[g];
                for (int64_t k = g*TACQ_GROUP; k < (g + 1)*TACQ_GROUP; k++) {
                    dot += levels[(k/4*TACQ_TILE + r)*4 + k % 4]*q[k];
                }
                sum += scales[g*TACQ_TILE + r]*d[g]*(float) dot;
            }
            y[t][r] = sum;
        }
    }
}

#if defined(TACQ_LANES)

// TACQ_LANES rows into the lanes of the tile that begin at `lane`
TACQ_INLINE void unpack_lanes(const int bits, const bool interleaved, int64_t n, const uint8_t * x, size_t row_size, void * tile, int64_t lane) {
    const tacq_lookup table = tacq_lookup_of(bits);
    uint8_t * levels = (uint8_t *) tile + 4*lane;
    float   * scales = tile_scales(tile, n) + lane;
    const uint8_t * next = x + TACQ_LANES*row_size;
    for (int64_t ib = 0; ib < n/QK_TACQ; ib++) {
        tacq_prefetch_block(bits, false, next);
        next += TACQ_LANES*TACQ_BLOCK_BYTES(bits);
        const tacq_block_rows b = tacq_load(bits, interleaved, x, row_size, n, ib);
        for (int i = 0; i < 16; i++) {
            vint_store(levels + (ib*16 + i)*4*TACQ_TILE, tacq_levels_of(bits, &b, &table, i/4, i % 4));
        }
        vfloat_store(scales + (2*ib)    *TACQ_TILE, b.scales[0]);
        vfloat_store(scales + (2*ib + 1)*TACQ_TILE, b.scales[1]);
    }
}

// one row into one lane, where no other lane of the tile may be touched
TACQ_INLINE void unpack_single(const int bits, int64_t n, const uint8_t * x, void * tile, int64_t lane) {
    const tacq_lookup table = tacq_lookup_of(bits);
    for (int64_t ib = 0; ib < n/QK_TACQ; ib++) {
        const tacq_block_rows b = tacq_load_block(bits, x + ib*TACQ_BLOCK_BYTES(bits), 0);
        for (int i = 0; i < 16; i++) {
            int32_t lanes[TACQ_LANES];
            vint_store(lanes, tacq_levels_of(bits, &b, &table, i/4, i % 4));
            memcpy((uint8_t *) tile + ((ib*16 + i)*TACQ_TILE + lane)*4, lanes, 4);
        }
        for (int g = 0; g < 2; g++) {
            float lanes[TACQ_LANES];
            vfloat_store(lanes, b.scales[g]);
            tile_scales(tile, n)[(2*ib + g)*TACQ_TILE + lane] = lanes[0];
        }
    }
}

TACQ_INLINE void unpack_rows(const int bits, const bool interleaved, int64_t n, int64_t n_rows, const uint8_t * x, size_t row_size, void * tile) {
    const int64_t n_side_by_side = tacq_side_by_side(interleaved, n_rows);
    for (int64_t row = 0; row < n_side_by_side; row += TACQ_LANES) {
        row = row <= n_rows - TACQ_LANES ? row : n_rows - TACQ_LANES;
        unpack_lanes(bits, interleaved, n, x + row*row_size, row_size, tile, row);
    }
    for (int64_t row = n_side_by_side; row < n_rows; row++) {
        unpack_single(bits, n, x + row*row_size, tile, row);
    }
}

TACQ_INLINE void unpack(int bits, const bool interleaved, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    switch (bits) {
        case 2:  unpack_rows(2, interleaved, n, n_rows, x, row_size, tile); break;
        case 3:  unpack_rows(3, interleaved, n, n_rows, x, row_size, tile); break;
        default: unpack_rows(4, interleaved, n, n_rows, x, row_size, tile); break;
    }
}

void tacq_unpack(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    unpack(bits, false, n, n_rows, x, row_size, tile);
}

void tacq_unpack_interleaved(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    unpack(bits, true, n, n_rows, x, row_size, tile);
}

// Two vectors of rows and as many tokens as there are registers for their sums, in integers within a group and in floats.
#if defined(TACQ_AVX512) || defined(TACQ_NEON)
#define TACQ_GEMM_TOKENS 6
#else
#define TACQ_GEMM_TOKENS 3
#endif

TACQ_INLINE void gemm_tokens(const int n_tokens, int64_t n, const uint8_t * levels, const float * scales, const void * const * acts, vfloat sum[2][TACQ_GEMM_TOKENS]) {
    for (int t = 0; t < n_tokens; t++) {
        sum[0][t] = sum[1][t] = vfloat_set1(0.0f);
    }
    for (int64_t g = 0; g < n/TACQ_GROUP; g++) {
        vint dot[2][TACQ_GEMM_TOKENS];
        for (int t = 0; t < n_tokens; t++) {
            dot[0][t] = dot[1][t] = vint_set1(tacq_act_c(acts[t], n)[g]);
        }
        for (int i = 0; i < 8; i++) {
            const vint w0 = vint_load(levels + (g*8 + i)*4*TACQ_TILE);
            const vint w1 = vint_load(levels + (g*8 + i)*4*TACQ_TILE + 4*TACQ_LANES);
            for (int t = 0; t < n_tokens; t++) {
                int32_t q4;
                memcpy(&q4, (const int8_t *) acts[t] + g*TACQ_GROUP + 4*i, sizeof(q4));
                const vint q = vint_set1(q4);
                dot[0][t] = vint_dot(dot[0][t], w0, q);
                dot[1][t] = vint_dot(dot[1][t], w1, q);
            }
        }
        const vfloat s0 = vfloat_load(scales + g*TACQ_TILE);
        const vfloat s1 = vfloat_load(scales + g*TACQ_TILE + TACQ_LANES);
        for (int t = 0; t < n_tokens; t++) {
            const vfloat d = vfloat_set1(tacq_act_d(acts[t], n)[g]);
            sum[0][t] = vfloat_mad(vfloat_of(dot[0][t]), vfloat_mul(s0, d), sum[0][t]);
            sum[1][t] = vfloat_mad(vfloat_of(dot[1][t]), vfloat_mul(s1, d), sum[1][t]);
        }
    }
}

void tacq_gemm(int64_t n, int64_t n_rows, int64_t n_tokens, const void * tile, const void * const * acts, float * const * y) {
    const uint8_t * levels = tile;
    const float   * scales = (const float *) (const void *) (levels + n*TACQ_TILE);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TACQ_GEMM_TOKENS) {
        const int n_now = n_tokens - t0 < TACQ_GEMM_TOKENS ? (int) (n_tokens - t0) : TACQ_GEMM_TOKENS;
        for (int64_t row = 0; row < n_rows; row += 2*TACQ_LANES) {
            vfloat sum[2][TACQ_GEMM_TOKENS];
#define CASE(n_tokens) case n_tokens: gemm_tokens(n_tokens, n, levels + 4*row, scales + row, acts + t0, sum); break;
            switch (n_now) {
                CASE(1) CASE(2) CASE(3)
#if TACQ_GEMM_TOKENS == 6
                CASE(4) CASE(5) CASE(6)
#endif
            }
#undef CASE
            for (int t = 0; t < n_now; t++) {
                if (n_rows - row >= 2*TACQ_LANES) {
                    vfloat_store(y[t0 + t] + row,              sum[0][t]);
                    vfloat_store(y[t0 + t] + row + TACQ_LANES, sum[1][t]);
                } else {
                    float lanes[2*TACQ_LANES];
                    vfloat_store(lanes,              sum[0][t]);
                    vfloat_store(lanes + TACQ_LANES, sum[1][t]);
                    memcpy(y[t0 + t] + row, lanes, (n_rows - row)*sizeof(float));
                }
            }
        }
    }
}

#else

void tacq_unpack(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    tacq_unpack_generic(bits, n, n_rows, x, row_size, tile);
}

void tacq_unpack_interleaved(int bits, int64_t n, int64_t n_rows, const void * x, size_t row_size, void * tile) {
    tacq_unpack_generic(bits, n, n_rows, x, row_size, tile);
}

void tacq_gemm(int64_t n, int64_t n_rows, int64_t n_tokens, const void * tile, const void * const * acts, float * const * y) {
    tacq_gemm_generic(n, n_rows, n_tokens, tile, acts, y);
}

#endif

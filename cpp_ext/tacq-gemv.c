// A few tokens: dot products of rows as they lie in the file with rows of activations (tacq-kernels.h). TACQ_LANES rows a pass, one
// row a lane: codes are transposed while they are packed, so that sums, scales and results need no work across lanes.

#include "tacq-block.h"

void tacq_gemv_generic(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y) {
    GGML_UNUSED(next);
    for (int64_t t = 0; t < n_tokens; t++) {
        const int8_t * q = acts[t];
        const float  * d = tacq_act_d(acts[t], n);
        for (int64_t row = 0; row < n_rows; row++) {
            const uint8_t * block = (const uint8_t *) x + row*row_size;
            float sum = 0.0f;
            for (int64_t g = 0; g < n/TACQ_GROUP; g++) {
                int32_t sum_i = 0;
                for (int i = 0; i < TACQ_GROUP; i++) {
                    sum_i += tacq_level(bits, block, (int) (g % 2)*TACQ_GROUP + i)*q[g*TACQ_GROUP + i];
                }
                sum   += tacq_scale(block[g % 2])*d[g]*(float) sum_i;
                block += g % 2 ? TACQ_BLOCK_BYTES(bits) : 0;
            }
            y[t][row] = sum;
        }
    }
}

#if defined(TACQ_LANES)

#define TACQ_GEMV_TOKENS 4 // most tokens a pass

// Block ib of TACQ_LANES rows with each token.
TACQ_INLINE void gemv_block(const int bits, const int n_tokens, const tacq_lookup * table, const tacq_block_rows * b, int64_t n, int64_t ib,
                            const void * const * acts, vfloat sum[]) {
    TACQ_UNROLL
    for (int g = 0; g < 2; g++) {
        vint dot[TACQ_GEMV_TOKENS];
        for (int t = 0; t < n_tokens; t++) {
            dot[t] = vint_set1(tacq_act_c(acts[t], n)[2*ib + g]);
        }
        TACQ_UNROLL
        for (int i = 0; i < 8; i++) {
            const vint levels = tacq_levels_of(bits, b, table, 2*g + i/4, i % 4);
            for (int t = 0; t < n_tokens; t++) {
                int32_t q4;
                memcpy(&q4, (const int8_t *) acts[t] + ib*QK_TACQ + g*TACQ_GROUP + 4*i, sizeof(q4));
                dot[t] = vint_dot(dot[t], levels, vint_set1(q4));
            }
        }
        for (int t = 0; t < n_tokens; t++) {
            const vfloat scale = vfloat_mul(b->scales[g], vfloat_set1(tacq_act_d(acts[t], n)[2*ib + g]));
            sum[t] = vfloat_mad(vfloat_of(dot[t]), scale, sum[t]);
        }
    }
}

// Sums of TACQ_LANES rows for each token, while the rows at `next` are asked for.
TACQ_INLINE void gemv_lanes(const int bits, const int n_tokens, const bool near, const bool interleaved, const tacq_lookup * table, int64_t n, const uint8_t * x,
                            size_t row_size, const uint8_t * next, const void * const * acts, vfloat sum[]) {
    for (int t = 0; t < n_tokens; t++) {
        sum[t] = vfloat_set1(0.0f);
    }
    for (int64_t ib = 0; ib < n/QK_TACQ; ib++) {
        tacq_prefetch_block(bits, near, next);
        next += TACQ_LANES*TACQ_BLOCK_BYTES(bits);
        const tacq_block_rows b = tacq_load(bits, interleaved, x, row_size, n, ib);
        gemv_block(bits, n_tokens, table, &b, n, ib, acts, sum);
    }
}

TACQ_INLINE void gemv_rows(const int bits, const int n_tokens, const bool near, const bool interleaved, int64_t n, int64_t n_rows, const uint8_t * x, size_t row_size,
                           const uint8_t * next, const void * const * acts, float * const * y) {
    vfloat sum[TACQ_GEMV_TOKENS];
    const tacq_lookup table = tacq_lookup_of(bits);
    const int64_t n_side_by_side = tacq_side_by_side(interleaved, n_rows);
    for (int64_t row = 0; row < n_side_by_side; row += TACQ_LANES) {
        // the last rows again with some that are done already: a row's result does not depend on its lane
        row = row <= n_rows - TACQ_LANES ? row : n_rows - TACQ_LANES;
        const uint8_t * ahead = row + 2*TACQ_LANES <= n_rows ? x + (row + TACQ_LANES)*row_size : next;
        gemv_lanes(bits, n_tokens, near, interleaved, &table, n, x + row*row_size, row_size, ahead, acts, sum);
        for (int t = 0; t < n_tokens; t++) {
            vfloat_store(y[t] + row, sum[t]);
        }
    }
    for (int64_t row = n_side_by_side; row < n_rows; row++) { // the same row in all lanes: nothing behind the last row is read
        gemv_lanes(bits, n_tokens, near, false, &table, n, x + row*row_size, 0, next, acts, sum);
        for (int t = 0; t < n_tokens; t++) {
            float lanes[TACQ_LANES];
            vfloat_store(lanes, sum[t]);
            y[t][row] = lanes[0];
        }
    }
}

TACQ_INLINE void gemv_tokens(const int bits, const bool interleaved, int64_t n, int64_t n_rows, int64_t n_tokens, const uint8_t * x, size_t row_size,
                             const uint8_t * next, const void * const * acts, float * const * y) {
    const bool near = TACQ_LANES*row_size <= 12*1024;
    next = next ? next : x; // which is in the cache already
    for (int64_t t = 0; t < n_tokens; ) {
        if (n_tokens - t >= 4) {
            gemv_rows(bits, 4, false, interleaved, n, n_rows, x, row_size, next, acts + t, y + t);
            t += 4;
        } else if (n_tokens - t >= 2) {
            gemv_rows(bits, 2, false, interleaved, n, n_rows, x, row_size, next, acts + t, y + t);
            t += 2;
        } else if (near) {
            gemv_rows(bits, 1, true, interleaved, n, n_rows, x, row_size, next, acts + t, y + t);
            t += 1;
        } else {
            gemv_rows(bits, 1, false, interleaved, n, n_rows, x, row_size, next, acts + t, y + t);
            t += 1;
        }
    }
}

TACQ_INLINE void gemv(int bits, const bool interleaved, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next,
                      const void * const * acts, float * const * y) {
    switch (bits) {
        case 2:  gemv_tokens(2, interleaved, n, n_rows, n_tokens, x, row_size, next, acts, y); break;
        case 3:  gemv_tokens(3, interleaved, n, n_rows, n_tokens, x, row_size, next, acts, y); break;
        default: gemv_tokens(4, interleaved, n, n_rows, n_tokens, x, row_size, next, acts, y); break;
    }
}

void tacq_gemv(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y) {
    gemv(bits, false, n, n_rows, n_tokens, x, row_size, next, acts, y);
}

void tacq_gemv_interleaved(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y) {
    gemv(bits, true, n, n_rows, n_tokens, x, row_size, next, acts, y);
}

#else

void tacq_gemv(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y) {
    tacq_gemv_generic(bits, n, n_rows, n_tokens, x, row_size, next, acts, y);
}

void tacq_gemv_interleaved(int bits, int64_t n, int64_t n_rows, int64_t n_tokens, const void * x, size_t row_size, const void * next, const void * const * acts, float * const * y) {
    tacq_gemv_generic(bits, n, n_rows, n_tokens, x, row_size, next, acts, y);
}

#endif

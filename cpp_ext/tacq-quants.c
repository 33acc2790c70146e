#include "tacq-quants.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// Built with -ffp-contract=off (tacq.cmake): the Python codec rounds after every product and every difference.

static const int8_t levels_tacq2[TACQ_NLEVELS] = TACQ2_LEVELS;
static const int8_t levels_tacq3[TACQ_NLEVELS] = TACQ3_LEVELS;
static const int8_t levels_tacq4[TACQ_NLEVELS] = TACQ4_LEVELS;

typedef struct {
    int            bits;
    int            scale_bits;
    uint32_t       scale_origin;
    uint32_t       scale_step;
    int            search_below;  // how far from the smallest scale that does not clip the search looks
    int            search_above;
    int            zero_code;     // the smallest level of the first codebook: what a group of zeros gets
    const int8_t * levels;        // [codebooks][1 << bits]
} tacq_codec;

static const tacq_codec codec_tacq2 = { 2, TACQ2_SCALE_BITS, TACQ2_SCALE_ORIGIN, TACQ2_SCALE_STEP,  6, 1, 1, levels_tacq2 };
static const tacq_codec codec_tacq3 = { 3, TACQ3_SCALE_BITS, TACQ3_SCALE_ORIGIN, TACQ3_SCALE_STEP, 10, 3, 3, levels_tacq3 };
static const tacq_codec codec_tacq4 = { 4, TACQ4_SCALE_BITS, TACQ4_SCALE_ORIGIN, TACQ4_SCALE_STEP, 16, 4, 7, levels_tacq4 };

//
// search
//

// Codes of one group for the candidate values v[n_levels], and the (weighted) squared error; gives up once that is >= limit,
// which changes no result because errors only grow.
static double round_group(const float * x, const float * qw, const float * v, int n_levels, double limit, uint8_t * codes) {
    double err = 0.0;
    for (int i = 0; i < TACQ_GROUP && err < limit; i++) {
        int   best  = 0;
        float least = fabsf(x[i] - v[0]);
        for (int c = 1; c < n_levels; c++) {
            const float diff = fabsf(x[i] - v[c]);
            if (diff < least) {
                least = diff;
                best  = c;
            }
        }
        codes[i] = (uint8_t) best;
        err += qw ? (double) qw[i]*((double) least*(double) least) : (double) least*(double) least;
    }
    return err;
}

// Scale byte and codes of one group: every sign, every codebook, and the scales around the smallest one that does not clip.
// The first candidate wins a tie.
static uint8_t quantize_group(const tacq_codec * codec, const float * x, const float * qw, uint8_t * codes) {
    const int n_levels = 1 << codec->bits;
    const int n_books  = TACQ_NLEVELS/n_levels;
    const int k_max    = (1 << codec->scale_bits) - 1;

    float peak = 0.0f;
    for (int i = 0; i < TACQ_GROUP; i++) {
        peak = fmaxf(peak, fabsf(x[i]));
    }

    uint8_t best_byte = 0;
    double  best_err  = INFINITY;
    memset(codes, codec->zero_code, TACQ_GROUP);
    if (!(peak > 0.0f)) {
        return best_byte;
    }

    for (int sign = 0; sign < 2; sign++) {
        for (int book = 0; book < n_books; book++) {
            const int8_t * levels = codec->levels + book*n_levels;
            const int lowest = -levels[0], highest = levels[n_levels - 1]; // ascending, so the largest magnitude is at an end
            const float reach = (float) (lowest > highest ? lowest : highest);

            int k_high = 0;
            while (k_high < k_max && tacq_scale((uint8_t) k_high, codec->scale_bits, codec->scale_origin, codec->scale_step)*reach < peak) {
                k_high++;
            }
            for (int k = k_high - codec->search_below; k <= k_high + codec->search_above; k++) {
                if (k < 1 || k > k_max) {
                    continue;
                }
                const uint8_t byte  = (uint8_t) (sign << 7 | book << codec->scale_bits | k);
                const float   scale = tacq_scale(byte, codec->scale_bits, codec->scale_origin, codec->scale_step);

                float values[TACQ_NLEVELS];
                for (int c = 0; c < n_levels; c++) {
                    values[c] = scale*(float) levels[c];
                }
                uint8_t tried[TACQ_GROUP];
                const double err = round_group(x, qw, values, n_levels, best_err, tried);
                if (err < best_err) {
                    best_err  = err;
                    best_byte = byte;
                    memcpy(codes, tried, TACQ_GROUP);
                }
            }
        }
    }
    return best_byte;
}

//
// layout
//

static void pack_tacq2(block_tacq2 * y, const uint8_t * c) {
    for (int j = 0; j < 16; j++) {
        y->qs[j] = (uint8_t) (c[j] | c[16 + j] << 2 | c[32 + j] << 4 | c[48 + j] << 6);
    }
}

static void pack_tacq3(block_tacq3 * y, const uint8_t * c) {
    memset(y->qh, 0, sizeof(y->qh));
    for (int j = 0; j < 16; j++) {
        y->qs[j] = (uint8_t) ((c[j] & 3) | (c[16 + j] & 3) << 2 | (c[32 + j] & 3) << 4 | (c[48 + j] & 3) << 6);
        for (int l = 0; l < 4; l++) {
            y->qh[j % 8] |= (uint8_t) ((c[l*16 + j] >> 2) << (2*l + j/8));
        }
    }
}

static void pack_tacq4(block_tacq4 * y, const uint8_t * c) {
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 16; j++) {
            y->qs[h*16 + j] = (uint8_t) (c[h*32 + j] | c[h*32 + 16 + j] << 4);
        }
    }
}

#define TACQ_QUANTIZE_ROW(b)                                                                              \
    static void quantize_row_tacq##b(const float * x, block_tacq##b * y, int64_t k, const float * qw) {   \
        assert(k % QK_TACQ == 0);                                                                         \
        for (int64_t i = 0; i < k/QK_TACQ; i++) {                                                         \
            uint8_t codes[QK_TACQ];                                                                       \
            for (int g = 0; g < 2; g++) {                                                                 \
                const int64_t at = i*QK_TACQ + g*TACQ_GROUP;                                              \
                y[i].scales[g] = quantize_group(&codec_tacq##b, x + at, qw ? qw + at : NULL, codes + g*TACQ_GROUP); \
            }                                                                                             \
            pack_tacq##b(&y[i], codes);                                                                   \
        }                                                                                                 \
    }                                                                                                     \
    void quantize_row_tacq##b##_ref(const float * x, block_tacq##b * y, int64_t k) {                      \
        quantize_row_tacq##b(x, y, k, NULL);                                                              \
    }

TACQ_QUANTIZE_ROW(2)
TACQ_QUANTIZE_ROW(3)
TACQ_QUANTIZE_ROW(4)

void dequantize_row_tacq2(const block_tacq2 * x, float * y, int64_t k) {
    assert(k % QK_TACQ == 0);
    for (int64_t i = 0; i < k/QK_TACQ; i++, y += QK_TACQ) {
        for (int l = 0; l < 4; l++) {
            const uint8_t  byte   = x[i].scales[l/2];
            const float    scale  = TACQ2_SCALE(byte);
            const int8_t * levels = levels_tacq2 + TACQ2_BOOK(byte);
            for (int j = 0; j < 16; j++) {
                y[l*16 + j] = scale*(float) levels[(x[i].qs[j] >> 2*l) & 3];
            }
        }
    }
}

void dequantize_row_tacq3(const block_tacq3 * x, float * y, int64_t k) {
    assert(k % QK_TACQ == 0);
    for (int64_t i = 0; i < k/QK_TACQ; i++, y += QK_TACQ) {
        for (int l = 0; l < 4; l++) {
            const uint8_t  byte   = x[i].scales[l/2];
            const float    scale  = TACQ3_SCALE(byte);
            const int8_t * levels = levels_tacq3 + TACQ3_BOOK(byte);
            for (int j = 0; j < 16; j++) {
                const int low  = (x[i].qs[j] >> 2*l) & 3;
                const int high = (x[i].qh[j % 8] >> (2*l + j/8)) & 1;
                y[l*16 + j] = scale*(float) levels[low | high << 2];
            }
        }
    }
}

void dequantize_row_tacq4(const block_tacq4 * x, float * y, int64_t k) {
    assert(k % QK_TACQ == 0);
    for (int64_t i = 0; i < k/QK_TACQ; i++, y += QK_TACQ) {
        for (int h = 0; h < 2; h++) {
            const float scale = TACQ4_SCALE(x[i].scales[h]);
            for (int j = 0; j < 16; j++) {
                y[h*32 + j]      = scale*(float) levels_tacq4[x[i].qs[h*16 + j] & 15];
                y[h*32 + 16 + j] = scale*(float) levels_tacq4[x[i].qs[h*16 + j] >> 4];
            }
        }
    }
}

//
// quantization for llama-quantize
//

// Weights of the errors of one row, as upstream's quantize_row_*_impl weigh them: squared activation times a soft magnitude.
// A group whose activations are all zero gets ones: with zeros every candidate would be as good as any other.
static void error_weights(const float * x, const float * imatrix, int64_t n, float * qw) {
    double sum2 = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum2 += (double) x[i]*(double) x[i];
    }
    const float sigma2 = (float) (sum2/(double) n);
    for (int64_t g = 0; g < n; g += TACQ_GROUP) {
        float most = 0.0f;
        for (int i = 0; i < TACQ_GROUP; i++) {
            qw[g + i] = imatrix[g + i]*sqrtf(sigma2 + x[g + i]*x[g + i]);
            most = fmaxf(most, qw[g + i]);
        }
        for (int i = 0; i < TACQ_GROUP && !(most > 0.0f); i++) {
            qw[g + i] = 1.0f;
        }
    }
}

static bool row_is_finite(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            fprintf(stderr, "tacq: weight %lld of a row is NaN or Inf, which no TACQ type can hold\n", (long long) i);
            return false;
        }
    }
    return true;
}

// 0 (which ggml_quantize_chunk refuses) for weights that are not finite
#define TACQ_QUANTIZE(b)                                                                                               \
    size_t quantize_tacq##b(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {  \
        const size_t row_size = n_per_row/QK_TACQ*sizeof(block_tacq##b);                                               \
        float * qw = imatrix ? malloc(n_per_row*sizeof(float)) : NULL;                                                 \
        bool ok = !imatrix || qw;                                                                                      \
        for (int64_t row = 0; ok && row < nrows; row++) {                                                              \
            const float * x = src + row*n_per_row;                                                                     \
            ok = row_is_finite(x, n_per_row);                                                                          \
            if (qw) {                                                                                                  \
                error_weights(x, imatrix, n_per_row, qw);                                                              \
            }                                                                                                          \
            quantize_row_tacq##b(x, (block_tacq##b *) (void *) ((char *) dst + row*row_size), n_per_row, qw);          \
        }                                                                                                              \
        free(qw);                                                                                                      \
        return ok ? nrows*row_size : 0;                                                                                \
    }

TACQ_QUANTIZE(2)
TACQ_QUANTIZE(3)
TACQ_QUANTIZE(4)

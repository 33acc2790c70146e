#include "tacq-quants.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// Built with -ffp-contract=off (tacq.cmake): the Python codec rounds after every product and every difference.

static const int8_t levels_tacq2[TACQ2_NLEVELS] = TACQ2_LEVELS;
static const int8_t levels_tacq3[TACQ3_NLEVELS] = TACQ3_LEVELS;
static const int8_t levels_tacq4[TACQ4_NLEVELS] = TACQ4_LEVELS;

#define MAX_LEVELS TACQ3_NLEVELS
#define STATES     4 // that a code leaves for the next one: its low two bits

typedef struct {
    bool           trellis;
    int            n_levels;
    int            search_below;  // how far from the scale that a group asks for the search looks
    int            search_above;
    const int8_t * levels;
} tacq_codec;

static const tacq_codec codec_tacq2 = { true,  TACQ2_NLEVELS, 3, 3, levels_tacq2 };
static const tacq_codec codec_tacq3 = { true,  TACQ3_NLEVELS, 3, 3, levels_tacq3 };
static const tacq_codec codec_tacq4 = { false, TACQ4_NLEVELS, 8, 2, levels_tacq4 };

//
// search
//

static inline double square(float diff, const float * qw, int i) {
    return qw ? (double) qw[i]*((double) diff*(double) diff) : (double) diff*(double) diff;
}

// Codes of one group for the candidate values v[n_levels], each the nearest, and the (weighted) squared error; gives up once that
// is >= limit, which changes no result because errors only grow.
static double nearest(int n_levels, const float * x, const float * qw, const float * v, double limit, uint8_t * codes) {
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
        err += square(least, qw, i);
    }
    return err;
}

// The same for a ring: the best path that ends in the state it began in, by Viterbi's algorithm from every state.
static double best_ring(int n_levels, const float * x, const float * qw, const float * v, double limit, uint8_t * codes) {
    double  cost[STATES][STATES];               // [begun in][state]
    uint8_t came[TACQ_GROUP][STATES][STATES];   // the state before, and 4 if the third bit is set
    for (int begun = 0; begun < STATES; begun++) {
        for (int state = 0; state < STATES; state++) {
            cost[begun][state] = begun == state ? 0.0 : INFINITY;
        }
    }
    for (int j = 0; j < TACQ_GROUP; j++) {
        const int i = j/16*16 + j % 4*4 + j/4 % 4; // the weight at this place of the ring
        double  step[STATES*STATES];               // [state][state before]
        uint8_t high[STATES*STATES];
        for (int s = 0; s < STATES*STATES; s++) {
            float least = fabsf(x[i] - v[s]);
            high[s] = 0;
            if (n_levels > STATES*STATES) {
                const float diff = fabsf(x[i] - v[STATES*STATES + s]);
                high[s] = diff < least ? STATES : 0;
                least   = diff < least ? diff : least;
            }
            step[s] = square(least, qw, i);
        }
        double lowest = INFINITY;
        for (int begun = 0; begun < STATES; begun++) {
            double now[STATES];
            for (int state = 0; state < STATES; state++) {
                int before = 0;
                now[state] = cost[begun][0] + step[state*STATES];
                for (int s = 1; s < STATES; s++) {
                    const double c = cost[begun][s] + step[state*STATES + s];
                    before     = c < now[state] ? s : before;
                    now[state] = c < now[state] ? c : now[state];
                }
                came[j][begun][state] = (uint8_t) (before | high[state*STATES + before]);
                lowest = now[state] < lowest ? now[state] : lowest;
            }
            memcpy(cost[begun], now, sizeof(now));
        }
        if (lowest >= limit) {
            return lowest;
        }
    }
    int begun = 0;
    for (int s = 1; s < STATES; s++) {
        begun = cost[s][s] < cost[begun][begun] ? s : begun;
    }
    for (int j = TACQ_GROUP - 1, state = begun; j >= 0; j--) {
        const int step = came[j][begun][state];
        codes[j/16*16 + j % 4*4 + j/4 % 4] = (uint8_t) (state | (step & STATES));
        state = step % STATES;
    }
    return cost[begun][begun];
}

// The first and the last k to try. TACQ4: around the least scale that does not clip. Trellis: around the least under which the mean
// square of the levels is not below that of the group, and at least up to the one that does not clip.
static void window(const tacq_codec * codec, const float * x, int * first, int * last) {
    float  peak = 0.0f, largest = 0.0f;
    double power = 0.0, squares = 0.0;
    for (int i = 0; i < TACQ_GROUP; i++) {
        peak   = fmaxf(peak, fabsf(x[i]));
        power += (double) x[i]*(double) x[i];
    }
    for (int c = 0; c < codec->n_levels; c++) {
        largest  = fmaxf(largest, fabsf((float) codec->levels[c]));
        squares += codec->levels[c]*codec->levels[c];
    }
    power *= (double) codec->n_levels/TACQ_GROUP;

    int unclipped = 0, usual = 0;
    while (unclipped < TACQ_K_MAX && tacq_scale((uint8_t) unclipped)*largest < peak) {
        unclipped++;
    }
    while (usual < TACQ_K_MAX && (double) tacq_scale((uint8_t) usual)*(double) tacq_scale((uint8_t) usual)*squares < power) {
        usual++;
    }
    if (!codec->trellis) {
        usual = unclipped;
    }
    *first = usual - codec->search_below;
    *last  = usual + codec->search_above;
    *last  = codec->trellis && unclipped > *last ? unclipped : *last;
}

// Scale byte and codes of one group: both signs, and a window of scales. The first candidate wins a tie.
static uint8_t quantize_group(const tacq_codec * codec, const float * x, const float * qw, uint8_t * codes) {
    bool some = false;
    for (int i = 0; i < TACQ_GROUP; i++) {
        some = some || x[i] != 0.0f;
    }
    uint8_t best_byte = 0;
    double  best_err  = INFINITY;
    memset(codes, 0, TACQ_GROUP);

    int first = 0, last = 0;
    window(codec, x, &first, &last);
    for (int sign = 0; some && sign < 2; sign++) {
        for (int k = first; k <= last; k++) {
            if (k < 1 || k > TACQ_K_MAX) {
                continue;
            }
            const uint8_t byte  = (uint8_t) (sign << 7 | k);
            const float   scale = tacq_scale(byte);

            float values[MAX_LEVELS];
            for (int c = 0; c < codec->n_levels; c++) {
                values[c] = scale*(float) codec->levels[c];
            }
            uint8_t tried[TACQ_GROUP];
            const double err = (codec->trellis ? best_ring : nearest)(codec->n_levels, x, qw, values, best_err, tried);
            if (err < best_err) {
                best_err  = err;
                best_byte = byte;
                memcpy(codes, tried, TACQ_GROUP);
            }
        }
    }
    return best_byte;
}

//
// layout
//

// the low two bits of each code
static void pack_low(uint8_t * qs, const uint8_t * c) {
    for (int w = 0; w < 4; w++) {
        for (int b = 0; b < 4; b++) {
            const uint8_t * at = c + w*16 + b;
            qs[w*4 + b] = (uint8_t) ((at[0] & 3) | (at[4] & 3) << 2 | (at[8] & 3) << 4 | (at[12] & 3) << 6);
        }
    }
}

static void pack_tacq2(block_tacq2 * y, const uint8_t * c) {
    pack_low(y->qs, c);
}

static void pack_tacq3(block_tacq3 * y, const uint8_t * c) {
    pack_low(y->qs, c);
    memset(y->qh, 0, sizeof(y->qh));
    for (int i = 0; i < QK_TACQ; i++) {
        y->qh[i/32*4 + i % 4] |= (uint8_t) ((c[i] >> 2) << i/4 % 8);
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

#define TACQ_DEQUANTIZE_ROW(b)                                                                            \
    void dequantize_row_tacq##b(const block_tacq##b * x, float * y, int64_t k) {                          \
        assert(k % QK_TACQ == 0);                                                                         \
        for (int64_t ib = 0; ib < k/QK_TACQ; ib++) {                                                      \
            for (int i = 0; i < QK_TACQ; i++) {                                                           \
                const float scale = tacq_scale(x[ib].scales[i/TACQ_GROUP]);                               \
                y[ib*QK_TACQ + i] = scale*(float) levels_tacq##b[tacq##b##_index(&x[ib], i)];             \
            }                                                                                             \
        }                                                                                                 \
    }

TACQ_DEQUANTIZE_ROW(2)
TACQ_DEQUANTIZE_ROW(3)
TACQ_DEQUANTIZE_ROW(4)

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

// Block coordinate descent over groups of 32 weights, for the quantizer (quantize_gptq.py calls it through group_descent.py).
//
// A matrix V of quantized values stands for W; the loss is tr(D H D^T) / 2 with D = V - W and H [columns, columns] the
// (damped) second moment of the inputs. With everything else held still, it is a quadratic function of the 32 values of one
// group of one row, with gradient D H and matrix H_gg: every candidate scale byte is tried by one pass of coordinate descent
// over the group's codes, and the byte of least loss is taken.
//
// One call does one panel: the same group of columns in rows first_row .. end_row. Rows do not depend on each other, so the
// result does not depend on how they are shared out to threads.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define GROUP 32  // weights that share a scale byte
#define LANES 16  // candidates tried side by side
#define MAX_LEVELS 16

struct tacq_descent {
    // codec
    int32_t       bits;
    int32_t       n_books;
    int32_t       scale_bits;
    int32_t       passes;        // over the codes of the group, once its byte is chosen
    const float * scale_of_byte; // [256]
    const float * levels;        // [n_books][1 << bits], ascending
    // search: scales from `below` steps under the least that does not clip to `above` steps over it; fresh: there is no byte yet
    int32_t       below;
    int32_t       above;
    int32_t       fresh;
    int32_t       pad;
    // matrix
    const float   * h;           // [32][32]: H of the panel's columns
    const uint8_t * kept;        // [rows][32]: 1 where a weight is kept and may take any value, or NULL
    const float   * gradient;    // [rows][32]: D H in the panel's columns
    float         * values;      // [rows][32] in/out: V
    float         * base;        // [rows][32] out: what codes and byte decode to
    float         * change;      // [rows][32] out: V after - V before
    uint8_t       * codes;       // [rows][32] in/out
    uint8_t       * bytes;       // [rows] in/out
};

_Static_assert(sizeof(struct tacq_descent) == 4*4 + 2*8 + 4*4 + 8*8, "group_descent.py has the same layout");

static const float * book_of(const struct tacq_descent * t, uint8_t byte) {
    return t->levels + (((byte & 0x7f) >> t->scale_bits) << t->bits);
}

typedef float   lanes  __attribute__((vector_size(LANES*sizeof(float))));   // a vector type of GCC and clang, on any machine
typedef int32_t choice __attribute__((vector_size(LANES*sizeof(int32_t)))); // -1 where a comparison holds, else 0

static inline lanes where(choice c, lanes x) { return (lanes) ((choice) x & c); } // x, or 0

// Coordinate descent over one group under up to LANES scale bytes at once, from `v` with gradient `g`.
// Returns the least change of the loss, if it is below `best`, and its byte; else `best`.
static float try_bytes(const struct tacq_descent * t, const float * inv_h, const float * v, const float * g, const uint8_t * kept,
                       const uint8_t * bytes, int n, float best, uint8_t * best_byte) {
    const int n_levels = 1 << t->bits;
    lanes grad[GROUP], scale, inverse, loss = {0};
    lanes step[MAX_LEVELS], border[MAX_LEVELS]; // level i less level i - 1, and the middle between them

    for (int l = 0; l < LANES; l++) {
        const uint8_t byte = bytes[l < n ? l : 0];
        const float * level = book_of(t, byte);
        scale[l]   = t->scale_of_byte[byte];
        step[0][l] = level[0];
        for (int i = 1; i < n_levels; i++) {
            step[i][l]   = level[i] - level[i - 1];
            border[i][l] = 0.5f*(level[i] + level[i - 1]);
        }
    }
    inverse = 1.0f/scale;
    for (int j = 0; j < GROUP; j++) {
        grad[j] = g[j] - (lanes) {0};
    }
    for (int j = 0; j < GROUP; j++) {
        const float * h = t->h + j*GROUP;
        lanes delta = -grad[j]*inv_h[j]; // to the least loss
        if (!(kept && kept[j])) {
            const lanes x = (v[j] + delta)*inverse;
            lanes level = step[0];
            for (int i = 1; i < n_levels; i++) {
                level += where(x > border[i], step[i]);
            }
            delta = level*scale - v[j];
        }
        loss += delta*(grad[j] + 0.5f*h[j]*delta);
        for (int k = j + 1; k < GROUP; k++) {
            grad[k] += h[k]*delta;
        }
    }
    for (int l = 0; l < n; l++) {
        if (loss[l] < best) {
            best = loss[l];
            *best_byte = bytes[l];
        }
    }
    return best;
}

// Scale bytes worth trying for a group whose largest quantized weight is `peak`: every sign and codebook, a window of scales.
static int candidates(const struct tacq_descent * t, float peak, uint8_t * bytes) {
    const int n_levels = 1 << t->bits, k_max = (1 << t->scale_bits) - 1;
    int n = 0;
    for (int book = 0; book < t->n_books; book++) {
        const float * level = t->levels + (book << t->bits);
        const float top = fmaxf(fabsf(level[0]), fabsf(level[n_levels - 1]));
        int k_high = 1;
        while (k_high < k_max && t->scale_of_byte[k_high]*top < peak) {
            k_high++;
        }
        for (int sign = 0; sign < 2; sign++) {
            for (int k = k_high - t->below; k <= k_high + t->above; k++) {
                if (k >= 1 && k <= k_max) {
                    bytes[n++] = (uint8_t) (sign << 7 | book << t->scale_bits | k);
                }
            }
        }
    }
    return n;
}

// The group of one row.
static void descend_group(const struct tacq_descent * t, int64_t r, const float * inv_h) {
    const uint8_t * kept = t->kept ? t->kept + r*GROUP : NULL;
    float   * v      = t->values + r*GROUP;
    float   * base   = t->base   + r*GROUP;
    float   * change = t->change + r*GROUP;
    uint8_t * codes  = t->codes  + r*GROUP;
    float g[GROUP], before[GROUP], peak = 0.0f;
    uint8_t bytes[256];

    memcpy(g, t->gradient + r*GROUP, sizeof(g));
    memcpy(before, v, sizeof(before));
    memset(change, 0, sizeof(before));
    for (int j = 0; j < GROUP; j++) {
        if (!(kept && kept[j])) {
            peak = fmaxf(peak, fabsf(t->fresh ? v[j] - g[j]*inv_h[j] : v[j]));
        }
    }
    int n = peak > 0.0f ? candidates(t, peak, bytes) : 0;
    if (!t->fresh && t->scale_of_byte[t->bytes[r]] != 0.0f) {
        bytes[n++] = t->bytes[r]; // the present byte, whose codes may move
    }
    float best = t->fresh ? INFINITY : 0.0f;
    uint8_t byte = 0;
    for (int i = 0; i < n; i += LANES) {
        best = try_bytes(t, inv_h, v, g, kept, bytes + i, n - i < LANES ? n - i : LANES, best, &byte);
    }
    if (byte == 0) {         // nothing lowers the loss
        if (t->fresh) {      // all weights are 0, or kept
            t->bytes[r] = 0;
            for (int j = 0; j < GROUP; j++) {
                codes[j]  = 0;
                base[j]   = 0.0f;
                v[j]      = kept && kept[j] ? v[j] : 0.0f;
                change[j] = v[j] - before[j];
            }
        }
        return;
    }
    const float scale = t->scale_of_byte[byte], inverse = 1.0f/scale;
    const float * level = book_of(t, byte);
    t->bytes[r] = byte;
    for (int pass = 0; pass < t->passes; pass++) { // the first does again what try_bytes did
        int moved = 0;
        for (int j = 0; j < GROUP; j++) {
            const float * h = t->h + j*GROUP;
            const float wanted = v[j] - g[j]*inv_h[j], x = wanted*inverse;
            int code = 0;
            while (code + 1 < 1 << t->bits && x > 0.5f*(level[code] + level[code + 1])) {
                code++;
            }
            codes[j] = (uint8_t) code;
            base[j]  = level[code]*scale;
            const float value = kept && kept[j] ? wanted : base[j];
            const float delta = value - v[j];
            if (delta != 0.0f) {
                moved = 1;
                v[j]  = value;
                for (int k = 0; k < GROUP; k++) {
                    g[k] += h[k]*delta;
                }
            }
        }
        if (!moved) {
            break;
        }
    }
    for (int j = 0; j < GROUP; j++) {
        change[j] = v[j] - before[j];
    }
}

void tacq_descend(const struct tacq_descent * t, int64_t first_row, int64_t end_row) {
    float inv_h[GROUP];
    for (int j = 0; j < GROUP; j++) {
        inv_h[j] = 1.0f/t->h[j*GROUP + j];
    }
    for (int64_t r = first_row; r < end_row; r++) {
        descend_group(t, r, inv_h);
    }
}

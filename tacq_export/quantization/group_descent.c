// Block coordinate descent over groups of 32 weights, for the quantizer (quantize_gptq.py calls it through group_descent.py).
//
// A matrix V of quantized values stands for W; the loss is tr(D H D^T) / 2 with D = V - W and H [columns, columns] the
// (damped) second moment of the inputs. With everything else held still, it is a quadratic function of the 32 values of one
// group of one row, with gradient D H and matrix H_gg: every candidate scale byte is tried by one pass of coordinate descent
// over the group's codes, and the byte of least loss is taken.
//
// One call does one panel: the same group of columns in rows first_row .. end_row. Rows do not depend on each other, so the
// result does not depend on how they are shared out to threads.

#include "group_descent.h"

#include <math.h>
#include <string.h>

#define LEVELS 16 // of TACQ4, the one type whose codes do not depend on each other

static inline lanes where(choice c, lanes x) { return (lanes) ((choice) x & c); } // x, or 0

// Coordinate descent over one group under up to LANES scale bytes at once, from `v` with gradient `g`.
// Returns the least change of the loss, if it is below `best`, and its byte; else `best`.
static float try_bytes(const struct tacq_descent * t, const float * inv_h, const float * v, const float * g, const uint8_t * kept,
                       const uint8_t * bytes, int n, float best, uint8_t * best_byte) {
    lanes grad[GROUP], scale, inverse, loss = {0};
    lanes step[LEVELS], border[LEVELS]; // level i less level i - 1, and the middle between them

    for (int l = 0; l < LANES; l++) {
        scale[l] = t->scale_of_byte[bytes[l < n ? l : 0]];
    }
    step[0] = t->levels[0] - (lanes) {0};
    for (int i = 1; i < LEVELS; i++) {
        step[i]   = (t->levels[i] - t->levels[i - 1]) - (lanes) {0};
        border[i] = 0.5f*(t->levels[i] + t->levels[i - 1]) - (lanes) {0};
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
            for (int i = 1; i < LEVELS; i++) {
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

// Scale bytes worth trying for a group whose largest quantized weight is `peak`: both signs, a window of scales.
static int candidates(const struct tacq_descent * t, float peak, uint8_t * bytes) {
    const float top = fmaxf(fabsf(t->levels[0]), fabsf(t->levels[LEVELS - 1]));
    int k_high = 1;
    while (k_high < 127 && t->scale_of_byte[k_high]*top < peak) {
        k_high++;
    }
    return bytes_of_scales(k_high - t->below, k_high + t->above, bytes);
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
    const float * level = t->levels;
    t->bytes[r] = byte;
    for (int pass = 0; pass < t->passes; pass++) { // the first does again what try_bytes did
        int moved = 0;
        for (int j = 0; j < GROUP; j++) {
            const float * h = t->h + j*GROUP;
            const float wanted = v[j] - g[j]*inv_h[j], x = wanted*inverse;
            int code = 0;
            while (code + 1 < LEVELS && x > 0.5f*(level[code] + level[code + 1])) {
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
    if (t->bits < 4) {
        tacq_descend_trellis(t, first_row, end_row);
        return;
    }
    for (int j = 0; j < GROUP; j++) {
        inv_h[j] = 1.0f/t->h[j*GROUP + j];
    }
    for (int64_t r = first_row; r < end_row; r++) {
        descend_group(t, r, inv_h);
    }
}

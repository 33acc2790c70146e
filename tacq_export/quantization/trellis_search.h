#pragma once

// Viterbi's search for the best paths through the trellis of a group (group_trellis.c), LANES paths at once.

#include "group_descent.h"

#include <string.h>

#define STATES 4
#define SIDES  (LANES/STATES) // paths that are searched side by side: scales, or states to begin with

// x of lane 4*(l/4) + from[l]: of another state of the same path. from: 0 .. 3
static inline lanes of_state(lanes x, choice from) {
#if defined(__AVX512F__)
    return (lanes) _mm512_permutevar_ps((__m512) x, (__m512i) from);
#elif defined(__AVX__)
    __m256  half[2];
    __m256i half_from[2];
    memcpy(half,      &x,    sizeof(x));
    memcpy(half_from, &from, sizeof(from));
    half[0] = _mm256_permutevar_ps(half[0], half_from[0]);
    half[1] = _mm256_permutevar_ps(half[1], half_from[1]);
    memcpy(&x, half, sizeof(x));
    return x;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const choice  bytes = from*0x04040404 + 0x03020100;
    uint8x16_t    part[LANES/STATES], place[LANES/STATES];
    memcpy(part,  &x,     sizeof(x));
    memcpy(place, &bytes, sizeof(bytes));
    for (int i = 0; i < LANES/STATES; i++) {
        part[i] = vqtbl1q_u8(part[i], place[i]);
    }
    memcpy(&x, part, sizeof(x));
    return x;
#else
    lanes y;
    for (int l = 0; l < LANES; l++) {
        y[l] = x[(l & ~(STATES - 1)) + from[l]];
    }
    return y;
#endif
}

// a < b, and a choice between two by it
#if defined(__AVX512F__)
typedef __mmask16 mask;
static inline mask   is_less(lanes a, lanes b)               { return _mm512_cmp_ps_mask((__m512) a, (__m512) b, _CMP_LT_OQ); }
static inline lanes  if_else(mask m, lanes a, lanes b)       { return (lanes) _mm512_mask_blend_ps(m, (__m512) b, (__m512) a); }
static inline choice if_else_int(mask m, choice a, choice b) { return (choice) _mm512_mask_blend_epi32(m, (__m512i) b, (__m512i) a); }
#else
typedef choice mask;
static inline mask   is_less(lanes a, lanes b)               { return a < b; }
static inline lanes  if_else(mask m, lanes a, lanes b) {
#if defined(__AVX__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof(a));
    memcpy(y, &b, sizeof(b));
    memcpy(z, &m, sizeof(m));
    x[0] = _mm256_blendv_ps(y[0], x[0], z[0]);
    x[1] = _mm256_blendv_ps(y[1], x[1], z[1]);
    memcpy(&a, x, sizeof(a));
    return a;
#else
    return (lanes) (((choice) a & m) | ((choice) b & ~m));
#endif
}
static inline choice if_else_int(mask m, choice a, choice b) { return (choice) if_else(m, (lanes) a, (lanes) b); }
#endif

static inline choice every(int x) { return (choice) {0} + x; }

// a way into each state: what it costs, the error of its weight, the state before (bits 0, 1) and the high bit of the code (bit 2)
struct way {
    lanes  cost, err;
    choice from;
};

static inline struct way cheaper(struct way a, struct way b) {
    const mask m = is_less(b.cost, a.cost);
    return (struct way) { if_else(m, b.cost, a.cost), if_else(m, b.err, a.err), if_else_int(m, b.from, a.from) };
}

// Paths into every state, of SIDES scales; `met` holds what each state costs to begin in. came[j]: state before, and the
// high bit of the code in bit 2. Returns the costs; begin: the state that each path began in.
static inline lanes search(const int bits, const struct tacq_trellis * p, const float * target, const uint8_t * kept, lanes scale, lanes met,
                           choice * begin, choice came[GROUP]) {
    const int n_high = 1 << (bits - 2);
    lanes level[2][STATES], acc[GROUP];
    for (int before = 0; before < STATES; before++) {
        for (int high = 0; high < n_high; high++) {
            level[high][before] = scale*p->levels[high][before];
        }
    }
    *begin = (choice) { 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3 };
    for (int j = 0; j < GROUP; j++) {
        acc[j] = (lanes) {0};
    }
    for (int j = 0; j < GROUP; j++) {
        struct way way[STATES];
        for (int before = 0; before < STATES; before++) {
            const lanes met_before = of_state(met, every(before)), a = of_state(acc[j], every(before));
            if (kept && kept[j]) { // its error makes up for all others, and its code is free
                way[before] = (struct way) { met_before, -a, every(before) };
                continue;
            }
            lanes  e = level[0][before] - target[j], r = e + a;
            choice from = every(before);
            if (n_high == 2) {
                const lanes e1 = level[1][before] - target[j], r1 = e1 + a;
                const mask  nearer = is_less(r1*r1, r*r);
                e    = if_else(nearer, e1, e);
                r    = if_else(nearer, r1, r);
                from = if_else_int(nearer, every(before | STATES), from);
            }
            way[before] = (struct way) { met_before + p->d[j]*(r*r), e, from };
        }
        const struct way best = cheaper(cheaper(way[0], way[1]), cheaper(way[2], way[3]));
        const choice     from = best.from & (STATES - 1);
        met     = best.cost;
        came[j] = best.from;
        *begin  = (choice) of_state((lanes) *begin, from);
        if (p->diagonal) {
            continue;
        }
        for (int k = j + 1; k < GROUP; k++) {
            acc[k] = of_state(acc[k], from) + p->m[j][k]*best.err;
        }
    }
    return met;
}

static void trace(const choice came[GROUP], int lane, uint8_t * codes) {
    const int side = lane & ~(STATES - 1);
    int state = lane & (STATES - 1);
    for (int j = GROUP - 1; j >= 0; j--) {
        const int path = came[j][side + state];
        codes[j] = (uint8_t) (state | (path & STATES));
        state    = path & (STATES - 1);
    }
}

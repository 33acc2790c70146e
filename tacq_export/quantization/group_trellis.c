// The search for the codes of one group of a trellis type: TACQ2 and TACQ3 (group_descent.c calls it).
//
// The level of a weight is looked up with its code and the low two bits of the code before it (cpp_ext/FORMAT.md), so the codes of a
// group are a closed path through a trellis of four states (trellis-coded quantization: Marcellin and Fischer 1990). With the group's
// loss (v - target)^T H (v - target) and H = M^T D M, M unit lower triangular, the loss of a path adds up weight by weight, each
// seeing the errors before it: sum of d_j (e_j + sum_{i<j} m_ji e_i)^2, as GPTQ feeds errors forward. A Viterbi search keeps the best
// path into each state, and each survivor carries its own sums.

#include "trellis_search.h"

#include <math.h>
#include <string.h>

#define FAR 1e30f

// The code of weight order[t] is the t-th of the path: four at a time are unpacked with two shifts and a mask (cpp_ext/tacq-common.h).
static const uint8_t order[GROUP] = {
     0,  4,  8, 12,  1,  5,  9, 13,  2,  6, 10, 14,  3,  7, 11, 15,
    16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31,
};

// What one panel's groups share, all in the order of the path.
static void prepare(const struct tacq_descent * t, struct tacq_trellis * p) {
    for (int i = 0; i < 4 << t->bits; i++) { // 4*code + before, code = 4*high + state
        for (int l = i/4 % STATES; l < LANES; l += STATES) {
            p->levels[i/16][i % STATES][l] = t->levels[i];
        }
        p->power  += (double) t->levels[i]*t->levels[i]/(4 << t->bits);
        p->largest = fmax(p->largest, fabs(t->levels[i]));
    }
    static __thread double a[GROUP][GROUP], b[GROUP][2*GROUP];
    p->diagonal = 1;
    for (int i = 0; i < GROUP; i++) {
        for (int j = 0; j < GROUP; j++) {
            p->h[i][j]  = a[i][j] = t->h[order[i]*GROUP + order[j]];
            p->diagonal &= i == j || a[i][j] == 0.0;
        }
    }
    for (int j = GROUP - 1; j >= 0; j--) {
        p->d[j] = (float) a[j][j];
        for (int k = 0; k < j; k++) {
            p->m[k][j] = (float) (a[j][k]/a[j][j]);
        }
        for (int i = 0; i < j; i++) {
            for (int k = 0; k < j; k++) {
                a[i][k] -= a[i][j]*a[j][k]/a[j][j];
            }
        }
    }
    for (int i = 0; i < GROUP; i++) { // Gauss and Jordan: H is positive definite, and small
        for (int j = 0; j < GROUP; j++) {
            b[i][j] = p->h[i][j];
            b[i][GROUP + j] = i == j;
        }
    }
    for (int i = 0; i < GROUP; i++) {
        const double pivot = 1.0/b[i][i];
        for (int j = 0; j < 2*GROUP; j++) {
            b[i][j] *= pivot;
        }
        for (int k = 0; k < GROUP; k++) {
            const double f = b[k][i];
            for (int j = 0; k != i && j < 2*GROUP; j++) {
                b[k][j] -= f*b[i][j];
            }
        }
    }
    for (int i = 0; i < GROUP; i++) {
        for (int j = 0; j < GROUP; j++) {
            p->inverse[i][j] = b[i][GROUP + j];
        }
    }
}

static inline float level_of(const struct tacq_descent * t, const uint8_t * codes, int j) {
    return t->levels[4*codes[j] + (codes[(j + GROUP - 1) % GROUP] & 3)];
}

// Codes one by one, each with the level that it moves behind it, and kept weights, until nothing lowers the loss.
// e: errors of all weights in/out. after: the weights' values.
static void polish(const struct tacq_descent * t, const struct tacq_trellis * p, float scale, const float * target, const uint8_t * kept,
                   uint8_t * codes, double * e, float * after) {
    double he[GROUP];
    for (int j = 0; j < GROUP; j++) {
        he[j] = 0;
        for (int k = 0; k < GROUP; k++) {
            he[j] += p->h[j][k]*e[k];
        }
    }
    for (int pass = 0; pass < t->passes; pass++) {
        int moved = 0;
        for (int j = 0; j < GROUP; j++) {
            const int next = (j + 1) % GROUP;
            const int own_free = kept && kept[j], next_free = kept && kept[next];
            double best = 0, move_own = 0, move_next = 0;
            int    code = codes[j];
            for (int c = 0; c < 1 << t->bits; c++) {
                if (c == codes[j]) {
                    continue;
                }
                const double own  = own_free  ? 0 : (double) (scale*t->levels[4*c + (codes[(j + GROUP - 1) % GROUP] & 3)]) - target[j] - e[j];
                const double then = next_free ? 0 : (double) (scale*t->levels[4*codes[next] + (c & 3)]) - target[next] - e[next];
                const double loss = he[j]*own + he[next]*then + 0.5*(p->h[j][j]*own*own + p->h[next][next]*then*then) + p->h[j][next]*own*then;
                if (loss < best) {
                    best = loss; code = c; move_own = own; move_next = then;
                }
            }
            if (own_free) {
                move_own = -(he[j] + p->h[j][next]*move_next)/p->h[j][j];
            }
            if (code != codes[j] || own_free) {
                moved |= code != codes[j];
                codes[j] = (uint8_t) code;
                e[j]    += move_own;
                e[next] += move_next;
                for (int k = 0; k < GROUP; k++) {
                    he[k] += p->h[k][j]*move_own + p->h[k][next]*move_next;
                }
            }
        }
        if (!moved && !kept) { // kept weights come nearer to their least loss in each pass
            break;
        }
    }
    for (int j = 0; j < GROUP; j++) {
        after[j] = kept && kept[j] ? (float) (target[j] + e[j]) : scale*level_of(t, codes, j);
    }
}

// The loss with the values `after` less that with the values `before`.
static double change_of_loss(const struct tacq_trellis * p, const float * before, const float * after, const float * gradient) {
    double loss = 0;
    for (int j = 0; j < GROUP; j++) {
        double hd = 0;
        for (int k = 0; k < GROUP; k++) {
            hd += p->h[j][k]*((double) after[k] - before[k]);
        }
        loss += ((double) after[j] - before[j])*(gradient[j] + 0.5*hd);
    }
    return loss;
}

// Scale bytes worth trying: both signs, scales around the one under which the table has the group's mean square and up to the one
// that does not clip its largest weight; or around the present one.
static int candidates(const struct tacq_descent * t, const struct tacq_trellis * p, const float * target, const uint8_t * kept, uint8_t present, uint8_t * bytes) {
    double sum = 0, peak = 0;
    int n = 0, first = present & 0x7f, last = first;
    for (int j = 0; j < GROUP; j++) {
        if (!(kept && kept[j])) {
            sum += (double) target[j]*target[j];
            peak = fmax(peak, fabs(target[j]));
            n++;
        }
    }
    if (!(sum > 0)) {
        return 0;
    }
    if (t->fresh || first == 0) {
        const double usual = sqrt(sum/n/p->power), widest = peak/p->largest;
        for (first = 1; first < 127 && t->scale_of_byte[first] < usual; first++) {}
        for (last = first; last + t->above < 127 && t->scale_of_byte[last + t->above] < widest; last++) {}
    }
    return bytes_of_scales(first - t->below, last + t->above, bytes);
}

// The errors of a path, those of kept weights as the search left them.
static void errors_of(const struct tacq_descent * t, const struct tacq_trellis * p, float scale, const float * target, const uint8_t * kept,
                      const uint8_t * codes, double * e) {
    for (int j = 0; j < GROUP; j++) {
        e[j] = kept && kept[j] ? 0 : (double) (scale*level_of(t, codes, j)) - target[j];
        for (int k = 0; k < j && kept && kept[j]; k++) {
            e[j] -= p->m[k][j]*e[k];
        }
    }
}

// The best path under one scale that ends in the state it began in, if it costs less than `best`; else `codes` stay.
static inline float close_path(const int bits, const struct tacq_descent * t, const struct tacq_trellis * p, const float * target,
                               const uint8_t * kept, uint8_t byte, float best, uint8_t * codes) {
    choice begin, came[GROUP];
    lanes  cost;
    for (int l = 0; l < LANES; l++) {
        cost[l] = l % STATES == l/STATES ? 0.0f : FAR;
    }
    cost = search(bits, p, target, kept, (lanes) {0} + t->scale_of_byte[byte], cost, &begin, came);
    int lane = -1;
    for (int s = 0; s < STATES; s++) {
        if (cost[s*STATES + s] < best) {
            best = cost[s*STATES + s];
            lane = s*STATES + s;
        }
    }
    if (lane >= 0) {
        trace(came, lane, codes);
    }
    return best;
}

// The byte of least loss and its codes.
static inline uint8_t choose(const int bits, const struct tacq_descent * t, const struct tacq_trellis * p, const float * target, const uint8_t * kept,
                             const uint8_t * bytes, int n, uint8_t * codes) {
    float   bound[256], best = INFINITY;
    uint8_t byte = 0; // and codes of 0, should no loss be a finite number
    choice  came[GROUP], begin;
    memset(codes, 0, GROUP);
    // free to begin anywhere: what the scale can give at best, and a closed path if its ends happen to meet
    for (int i = 0; i < n; i += SIDES) {
        lanes scale;
        for (int l = 0; l < LANES; l++) {
            scale[l] = t->scale_of_byte[bytes[i + l/STATES < n ? i + l/STATES : i]];
        }
        const lanes cost = search(bits, p, target, kept, scale, (lanes) {0}, &begin, came);
        int closed = -1;
        for (int s = 0; s < SIDES && i + s < n; s++) {
            bound[i + s] = INFINITY;
            for (int l = s*STATES; l < (s + 1)*STATES; l++) {
                bound[i + s] = fminf(bound[i + s], cost[l]);
                if (begin[l] == l % STATES && cost[l] < best) {
                    best   = cost[l];
                    byte   = bytes[i + s];
                    closed = l;
                }
            }
        }
        if (closed >= 0) {
            trace(came, closed, codes);
        }
    }
    for (int top = 0; top < t->closed; top++) {
        int least = 0;
        for (int i = 1; i < n; i++) {
            least = bound[i] < bound[least] ? i : least;
        }
        if (!(bound[least] < best)) {
            break;
        }
        bound[least] = INFINITY;
        const float cost = close_path(bits, t, p, target, kept, bytes[least], best, codes);
        if (cost < best) {
            best = cost;
            byte = bytes[least];
        }
    }
    return byte;
}

static inline void descend_group(const int bits, const struct tacq_descent * t, const struct tacq_trellis * p, int64_t r) {
    float   * v      = t->values + r*GROUP;
    float   * base   = t->base   + r*GROUP;
    float   * change = t->change + r*GROUP;
    uint8_t * codes  = t->codes  + r*GROUP;
    float   target[GROUP], before[GROUP], gradient[GROUP];
    uint8_t mask[GROUP], bytes[256], found[GROUP];
    const uint8_t * kept = NULL;

    for (int j = 0; j < GROUP; j++) {
        before[j]   = v[order[j]];
        gradient[j] = t->gradient[r*GROUP + order[j]];
        if (t->kept && t->kept[r*GROUP + order[j]]) {
            if (!kept) {
                memset(mask, 0, sizeof(mask));
            }
            kept = mask;
            mask[j] = 1;
        }
    }
    for (int j = 0; j < GROUP; j++) {
        double wanted = before[j];
        for (int k = 0; k < GROUP; k++) {
            wanted -= p->inverse[j][k]*gradient[k];
        }
        target[j] = (float) wanted;
    }
    memset(change, 0, sizeof(before));
    const int n = candidates(t, p, target, kept, t->bytes[r], bytes);
    if (n == 0) {            // all weights are 0, or kept
        if (t->fresh) {
            t->bytes[r] = 0;
            for (int j = 0; j < GROUP; j++) {
                codes[j]  = 0;
                base[j]   = 0.0f;
            }
        }
        return;
    }
    uint8_t byte  = choose(bits, t, p, target, kept, bytes, n, found);
    float   scale = t->scale_of_byte[byte];
    float   after[GROUP];
    double  e[GROUP];
    errors_of(t, p, scale, target, kept, found, e);
    polish(t, p, scale, target, kept, found, e, after);
    if (!t->fresh && !(change_of_loss(p, before, after, gradient) < 0)) {
        if (!kept) {
            return;
        }
        byte  = t->bytes[r]; // the present codes, but kept weights may still move
        scale = t->scale_of_byte[byte];
        for (int j = 0; j < GROUP; j++) {
            found[j] = codes[order[j]];
            e[j]     = (double) before[j] - target[j];
        }
        polish(t, p, scale, target, kept, found, e, after);
        if (!(change_of_loss(p, before, after, gradient) < 0)) {
            return;
        }
    }
    t->bytes[r] = byte;
    for (int j = 0; j < GROUP; j++) {
        const int i = order[j];
        codes[i]  = found[j];
        base[i]   = scale*level_of(t, found, j);
        v[i]      = after[j];
        change[i] = after[j] - before[j];
    }
}

void tacq_descend_trellis(const struct tacq_descent * t, int64_t first_row, int64_t end_row) {
    static __thread struct tacq_trellis p;
    p.power = p.largest = 0;
    prepare(t, &p);
    for (int64_t r = first_row; r < end_row; r++) {
        if (t->bits == 2) {
            descend_group(2, t, &p, r);
        } else {
            descend_group(3, t, &p, r);
        }
    }
}

#pragma once

// What group_descent.c and group_trellis.c share. group_descent.py has the layout of the first struct.

#include <stdint.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define GROUP 32  // weights that share a scale byte
#define LANES 16  // candidates tried side by side

struct tacq_descent {
    int32_t       bits;
    int32_t       passes;        // over the codes of a group, once its byte is chosen
    int32_t       below;         // scales tried, in steps around the one that the group's size asks for
    int32_t       above;
    int32_t       fresh;         // 1: there is no byte yet
    int32_t       closed;        // how many scales' paths are closed from every state (group_trellis.c)
    const float * scale_of_byte; // [256]
    const float * levels;        // of the codec: tacq4 [16] ascending, else [1 << bits][4]
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

_Static_assert(sizeof(struct tacq_descent) == 6*4 + 2*8 + 8*8, "group_descent.py has the same layout");

typedef float   lanes  __attribute__((vector_size(LANES*sizeof(float))));   // a vector type of GCC and clang, on any machine
typedef int32_t choice __attribute__((vector_size(LANES*sizeof(int32_t)))); // -1 where a comparison holds, else 0

// What the groups of a panel share, in the order of the ring
struct tacq_trellis {
    lanes   levels[2][4];          // [high bit of the code][state before]: the level of a code that leads to the lane's state
    double  power;                 // mean square of the table
    double  largest;               // magnitude in it
    double  h[GROUP][GROUP];
    double  inverse[GROUP][GROUP];
    float   m[GROUP][GROUP];       // m[i][j], i < j: what the error of i adds to that of j
    float   d[GROUP];
    int32_t diagonal;              // no error adds to another
};

// The bytes of both signs of the scales first .. last, as far as there are such; returns how many.
static inline int bytes_of_scales(int first, int last, uint8_t * bytes) {
    int n = 0;
    for (int sign = 0; sign < 2; sign++) {
        for (int k = first; k <= last; k++) {
            if (k >= 1 && k <= 127) {
                bytes[n++] = (uint8_t) (sign << 7 | k);
            }
        }
    }
    return n;
}

void tacq_descend        (const struct tacq_descent * t, int64_t first_row, int64_t end_row);
void tacq_descend_trellis(const struct tacq_descent * t, int64_t first_row, int64_t end_row);

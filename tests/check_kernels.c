// The fast kernels against the generic ones, for processors that only an emulator runs here (test_fast_kernels.py compiles this with a
// cross compiler). Prints a line a case; exit status 1 if any differs by more than rounding.

#include "tacq-kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t state = 88172645463325252ull;

static uint32_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t) (state >> 11);
}

enum { N_TOKENS = 13, MAX_N = 896, MAX_ROWS = 37 };

static float results[2][N_TOKENS][MAX_ROWS];
static char  acts[N_TOKENS][MAX_N*2];

// largest difference of the two results, as a share of the largest value
static double difference(int n_tokens, int n_rows) {
    double largest = 0, off = 0;
    for (int t = 0; t < n_tokens; t++) {
        for (int r = 0; r < n_rows; r++) {
            largest = fmax(largest, fabs(results[0][t][r]));
            off     = fmax(off,     fabs(results[0][t][r] - results[1][t][r]));
        }
    }
    return off/largest;
}

static int check(int bits, int n, int n_rows, int n_tokens) {
    const size_t row_size = (size_t) n/64*(2 + 8*bits);
    uint8_t * x = malloc(row_size*n_rows); // exactly: an emulator or a sanitizer sees what is read behind it
    for (size_t i = 0; i < row_size*n_rows; i++) {
        x[i] = (uint8_t) next_random();
    }
    const void * act_rows[N_TOKENS];
    float      * ys[2][N_TOKENS];
    for (int t = 0; t < n_tokens; t++) {
        float values[MAX_N];
        for (int i = 0; i < n; i++) {
            values[i] = ((int) (next_random() % 2001) - 1000)/500.0f;
        }
        tacq_quantize_act(values, acts[t], n, 0, n/32);
        act_rows[t] = acts[t];
        ys[0][t] = results[0][t];
        ys[1][t] = results[1][t];
    }
    tacq_gemv_generic(bits, n, n_rows, n_tokens, x, row_size, NULL, act_rows, ys[0]);
    tacq_gemv        (bits, n, n_rows, n_tokens, x, row_size, NULL, act_rows, ys[1]);
    const double few = difference(n_tokens, n_rows);

    uint8_t * side_by_side = malloc(row_size*n_rows);
    tacq_interleave(bits, n, n_rows, x, side_by_side);
    tacq_gemv_interleaved(bits, n, n_rows, n_tokens, side_by_side, row_size, NULL, act_rows, ys[1]);
    const double interleaved = difference(n_tokens, n_rows);

    double many = 0;
    if (n_rows <= TACQ_TILE) {
        char * tile = malloc(tacq_tile_size(n));
        tacq_unpack(bits, n, n_rows, x, row_size, tile);
        tacq_gemm(n, n_rows, n_tokens, tile, act_rows, ys[1]);
        many = difference(n_tokens, n_rows);
        tacq_unpack_interleaved(bits, n, n_rows, side_by_side, row_size, tile);
        tacq_gemm(n, n_rows, n_tokens, tile, act_rows, ys[1]);
        many = fmax(many, difference(n_tokens, n_rows));
        free(tile);
    }
    free(x);
    free(side_by_side);
    const int ok = few < 1e-6 && interleaved < 1e-6 && many < 1e-6;
    printf("%s: bits %d, n %d, rows %d, tokens %d: %.1e %.1e %.1e\n", ok ? "ok" : "FAILED", bits, n, n_rows, n_tokens, few, interleaved, many);
    return ok;
}

int main(void) {
    int ok = 1;
    for (int bits = 2; bits <= 4; bits++) {
        ok &= check(bits,  64,  1,  1);
        ok &= check(bits, 576,  3,  2);
        ok &= check(bits, 128,  4, 13);
        ok &= check(bits, 896, 21,  7);
        ok &= check(bits, 576, 32,  6);
        ok &= check(bits, 192, 37,  4);
    }
    return ok ? 0 : 1;
}

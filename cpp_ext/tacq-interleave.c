// Rows side by side (tacq-kernels.h): what the kernels' loader of interleaved blocks reads (tacq-block.h).

#include "tacq-block.h"

#if defined(TACQ_LANES)

int64_t tacq_lanes(void) {
    return TACQ_LANES;
}

// Every 2-byte piece of scales and 4-byte piece of codes of a group of rows, from its place in one order to that in the other.
static void reorder(int bits, int64_t n, int64_t n_rows, const uint8_t * x, uint8_t * out, bool interleave) {
    const int64_t n_blocks = n/QK_TACQ;
    const size_t  row_size = n_blocks*TACQ_BLOCK_BYTES(bits);
    const int64_t n_whole  = n_rows/TACQ_LANES*TACQ_LANES;
    for (int64_t row = 0; row < n_whole; row++) {
        const size_t group = row/TACQ_LANES*TACQ_LANES*row_size;
        const size_t lane  = row % TACQ_LANES;
        for (int64_t ib = 0; ib < n_blocks; ib++) {
            const size_t block  = row*row_size + ib*TACQ_BLOCK_BYTES(bits);
            const size_t scales = group + (ib*TACQ_LANES + lane)*2;
            memcpy(out + (interleave ? scales : block), x + (interleave ? block : scales), 2);
            for (int i = 0; i < 2*bits; i++) {
                const size_t in_row = block + 2 + 4*i;
                const size_t codes  = group + n_blocks*2*TACQ_LANES + ((ib*2*bits + i)*TACQ_LANES + lane)*4;
                memcpy(out + (interleave ? codes : in_row), x + (interleave ? in_row : codes), 4);
            }
        }
    }
    memcpy(out + n_whole*row_size, x + n_whole*row_size, (n_rows - n_whole)*row_size);
}

#else

int64_t tacq_lanes(void) {
    return 0;
}

static void reorder(int bits, int64_t n, int64_t n_rows, const uint8_t * x, uint8_t * out, bool interleave) {
    GGML_UNUSED(interleave);
    memcpy(out, x, n_rows*(n/QK_TACQ*TACQ_BLOCK_BYTES(bits)));
}

#endif

void tacq_interleave(int bits, int64_t n, int64_t n_rows, const void * x, void * out) {
    reorder(bits, n, n_rows, x, out, true);
}

void tacq_deinterleave(int bits, int64_t n, int64_t n_rows, const void * x, void * out) {
    reorder(bits, n, n_rows, x, out, false);
}

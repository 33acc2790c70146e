#pragma once

// The tensor types of this project: which id is which, and what it is made of. No codec numbers: those are in tacq-common.h.
// ggml-impl.h includes this file, so every upstream file that needs a type list has it.
//
//   base  TACQ<b>       b = 2, 3, 4: an ordinary ggml block type, 64 weights a block
//   mixed TACQ<b>_S<p>  a whole tensor: n/64 base blocks, then a sparse section of n/64 * p bytes

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// the `tacq.format_version` of the files that this code reads
#define TACQ_FORMAT_VERSION 2

// lists of types for upstream's switches
#define TACQ_BASE_CASES \
    case GGML_TYPE_TACQ2: case GGML_TYPE_TACQ3: case GGML_TYPE_TACQ4:
#define TACQ_MIXED_CASES_OF(b) \
    case GGML_TYPE_TACQ##b##_S1: case GGML_TYPE_TACQ##b##_S2: case GGML_TYPE_TACQ##b##_S3: case GGML_TYPE_TACQ##b##_S4: \
    case GGML_TYPE_TACQ##b##_S6: case GGML_TYPE_TACQ##b##_S8: case GGML_TYPE_TACQ##b##_S12: case GGML_TYPE_TACQ##b##_S16:
#define TACQ_TYPE_CASES \
    TACQ_BASE_CASES TACQ_MIXED_CASES_OF(2) TACQ_MIXED_CASES_OF(3) TACQ_MIXED_CASES_OF(4)

static inline bool tacq_is_base(enum ggml_type type) {
    return type >= GGML_TYPE_TACQ2 && type <= GGML_TYPE_TACQ4;
}

static inline bool tacq_is_mixed(enum ggml_type type) {
    return type >= GGML_TYPE_TACQ2_S1 && type <= GGML_TYPE_TACQ4_S16;
}

static inline bool tacq_is_ours(enum ggml_type type) {
    return tacq_is_base(type) || tacq_is_mixed(type);
}

// bits a weight of the base section
static inline int tacq_bits(enum ggml_type type) {
    return tacq_is_base(type) ? 2 + (int) type - (int) GGML_TYPE_TACQ2 : 2 + ((int) type - (int) GGML_TYPE_TACQ2_S1)/8;
}

static inline enum ggml_type tacq_base_type(enum ggml_type type) {
    return (enum ggml_type) ((int) GGML_TYPE_TACQ2 + tacq_bits(type) - 2);
}

// bytes of the base section per 64 weights
static inline size_t tacq_base_bytes(enum ggml_type type) {
    return 2 + 8*(size_t) tacq_bits(type);
}

// bytes of the sparse section per 64 weights, the <p> of the name; 0 for a base type
static inline size_t tacq_sparse_bytes(enum ggml_type type) {
    static const uint8_t densities[8] = { 1, 2, 3, 4, 6, 8, 12, 16 };
    return tacq_is_mixed(type) ? densities[((int) type - (int) GGML_TYPE_TACQ2_S1) % 8] : 0;
}

// For readers of files: true, after a line in the log that names the tensor, if `type` is one of the ids that mean nothing.
// Upstream only checks for 0 <= type < GGML_TYPE_COUNT, and ids 43..511 and 515..519 are holes with block size 0.
GGML_API bool tacq_reject_unknown_type(const char * tensor_name, int type);

#ifdef __cplusplus
}
#endif

#pragma once

// Reference codec (in ggml-base): plain rounding, decoding, and the checks of a sparse section.

#include "tacq-common.h"

#ifdef __cplusplus
extern "C" {
#endif

// the same bytes as tacq_export/format/quantize_ref.py; k a multiple of 64
GGML_API void quantize_row_tacq2_ref(const float * x, block_tacq2 * y, int64_t k);
GGML_API void quantize_row_tacq3_ref(const float * x, block_tacq3 * y, int64_t k);
GGML_API void quantize_row_tacq4_ref(const float * x, block_tacq4 * y, int64_t k);

GGML_API void dequantize_row_tacq2(const block_tacq2 * x, float * y, int64_t k);
GGML_API void dequantize_row_tacq3(const block_tacq3 * x, float * y, int64_t k);
GGML_API void dequantize_row_tacq4(const block_tacq4 * x, float * y, int64_t k);

// for ggml_quantize_chunk: bytes written; imatrix (n_per_row squared activations) may be NULL
GGML_API size_t quantize_tacq2(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_tacq3(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_tacq4(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

// All that a correct writer cannot have written fails: false, and one line in `message` that names the tensor.
// The same checks as unpack_sparse of tacq_export/format/sparse_section.py. Reads no byte outside section[0 .. size).
GGML_API bool tacq_validate_section(
        const void * section, size_t size, int64_t n_rows, int64_t n_columns,
        const char * tensor_name, char * message, size_t message_size);

// the rows of upstream's table of types (ggml.c)
#define TACQ_BASE_TRAITS(b)                                                       \
    [GGML_TYPE_TACQ##b] = {                                                       \
        .type_name                = "tacq" #b,                                    \
        .blck_size                = QK_TACQ,                                      \
        .type_size                = sizeof(block_tacq##b),                        \
        .is_quantized             = true,                                         \
        .to_float                 = (ggml_to_float_t) dequantize_row_tacq##b,     \
        .from_float_ref           = (ggml_from_float_t) quantize_row_tacq##b##_ref, \
    },

// No to_float: a row of a mixed tensor cannot be decoded without the section behind the last row, so whoever tries is refused.
#define TACQ_MIXED_TRAITS(b, p)                                                   \
    [GGML_TYPE_TACQ##b##_S##p] = {                                                \
        .type_name                = "tacq" #b "_s" #p,                            \
        .blck_size                = QK_TACQ,                                      \
        .type_size                = sizeof(block_tacq##b) + p,                    \
        .is_quantized             = true,                                         \
    },

#define TACQ_TRAITS_OF(b) \
    TACQ_BASE_TRAITS(b) \
    TACQ_MIXED_TRAITS(b, 1) TACQ_MIXED_TRAITS(b, 2) TACQ_MIXED_TRAITS(b, 3)  TACQ_MIXED_TRAITS(b, 4) \
    TACQ_MIXED_TRAITS(b, 6) TACQ_MIXED_TRAITS(b, 8) TACQ_MIXED_TRAITS(b, 12) TACQ_MIXED_TRAITS(b, 16)

#define TACQ_TYPE_TRAITS TACQ_TRAITS_OF(2) TACQ_TRAITS_OF(3) TACQ_TRAITS_OF(4)

#ifdef __cplusplus
}
#endif

#pragma once

// CPU backend: dot products of the base types with Q8_0 activations, and the hook that computes with mixed tensors as
// base part + sparse part.

#include "tacq-quants.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// what upstream's table calls: the fastest there is on this machine
GGML_BACKEND_API void tacq_vec_dot_tacq2_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
GGML_BACKEND_API void tacq_vec_dot_tacq3_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
GGML_BACKEND_API void tacq_vec_dot_tacq4_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

// plain C, what the others are compared with
GGML_BACKEND_API void tacq_vec_dot_tacq2_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
GGML_BACKEND_API void tacq_vec_dot_tacq3_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
GGML_BACKEND_API void tacq_vec_dot_tacq4_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

// the rows of upstream's table of types (ggml-cpu.c); the mixed types have none: the hook takes them before the table is read
#define TACQ_TRAITS_CPU_OF(b)                                                  \
    [GGML_TYPE_TACQ##b] = {                                                    \
        .from_float               = (ggml_from_float_t) quantize_row_tacq##b##_ref, \
        .vec_dot                  = tacq_vec_dot_tacq##b##_q8_0,               \
        .vec_dot_type             = GGML_TYPE_Q8_0,                            \
        .nrows                    = 1,                                         \
    },
#define TACQ_TYPE_TRAITS_CPU TACQ_TRAITS_CPU_OF(2) TACQ_TRAITS_CPU_OF(3) TACQ_TRAITS_CPU_OF(4)

struct ggml_compute_params;

// ggml_compute_forward of ggml-cpu.c, which is static there: how the hook computes the base part
void tacq_cpu_compute(struct ggml_compute_params * params, struct ggml_tensor * op);

// for the list of extra buffer types: holds interleaved weights (tacq-buffer.h), and sees every op
ggml_backend_buffer_type_t tacq_cpu_buffer_type(void);

// false for an op that would read or write a mixed tensor in a way that is not implemented
bool tacq_cpu_supports_op(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif

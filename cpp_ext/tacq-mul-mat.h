#pragma once

// MUL_MAT and MUL_MAT_ID with weights of our types and F32 activations, by the kernels of tacq-kernels.h: weights as the
// file has them, read where it was mapped, or interleaved at load (tacq-buffer.h).

#include "tacq-kernels.h"

struct ggml_compute_params;

// whether these functions take the op; the rest is upstream's
bool tacq_mul_mat_takes(const ggml_tensor * op);

// bytes of work memory for all threads
size_t tacq_mul_mat_work_size(int n_threads, const ggml_tensor * op);

// s: the sparse section of the whole tensor, or nullptr for a base type
void tacq_mul_mat   (const ggml_compute_params * params, ggml_tensor * dst, const tacq_sparse * s);
void tacq_mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst, const tacq_sparse * s);

#pragma once

// Weights whose rows are interleaved when they are loaded (tacq-kernels.h): a buffer type beside those into which upstream repacks
// its own types. The loader puts a tensor there if all that is done with it is a matrix product; `--no-repack` keeps it mapped.

#include "ggml-backend.h"

// whether `t` is in such a buffer
bool tacq_is_interleaved(const ggml_tensor * t);

// whether the op can be computed if its weights are
bool tacq_takes_interleaved(const ggml_tensor * op);

// `context`: a ggml::cpu::extra_buffer_type
ggml_backend_buffer_type tacq_interleaved_buffer_type(void * context);

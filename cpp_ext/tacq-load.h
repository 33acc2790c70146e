#pragma once

// Checks at load time, in libllama.

#include "llama.h"

#include "tacq-types.h"

struct llama_model_loader;

// Throws std::runtime_error, one clear line, if the file is of another format version or a sparse section is malformed.
// Reads the sections from the files, so it does not matter how the tensors are loaded afterwards (mmap, read, upload, lazy).
void tacq_check_model(const llama_model_loader & ml);

// llama-quantize: throws std::runtime_error for a conversion from or to a mixed type, which only tacq-export can do.
void tacq_check_quantize(const ggml_tensor * tensor, ggml_type target);

// A file type of ours is the id of the base type that holds most weights of the linear matrices. NULL for upstream's file types.
const char * tacq_ftype_name(llama_ftype ftype);

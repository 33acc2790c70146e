#include "tacq-load.h"

#include "tacq-quants.h"

#include "llama-model-loader.h"

#include <stdexcept>
#include <vector>

static void check_format_version(const gguf_context * metadata) {
    const int64_t key = metadata ? gguf_find_key(metadata, "tacq.format_version") : -1;
    if (key < 0) {
        return; // not written by tacq-export; its tensors may still be ours, for example from llama-quantize
    }
    if (gguf_get_kv_type(metadata, key) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("tacq.format_version is not an unsigned 32-bit number; the file is damaged, export it again");
    }
    const uint32_t version = gguf_get_val_u32(metadata, key);
    if (version < TACQ_FORMAT_VERSION) {
        throw std::runtime_error(format("this file has tacq.format_version %u, which this program does not read any more; "
            "export it again", version));
    }
    if (version > TACQ_FORMAT_VERSION) {
        throw std::runtime_error(format("this file has tacq.format_version %u and this program reads version %d; "
            "upgrade tacq-export and build its runtime again", version, TACQ_FORMAT_VERSION));
    }
}

void tacq_check_model(const llama_model_loader & ml) {
    check_format_version(ml.metadata);
    if (ml.files.empty()) {
        return; // built from metadata alone: there is no data to read
    }
    std::vector<uint8_t> section;
    for (const auto & it : ml.weights_map) {
        const auto & w = it.second;
        const size_t n_blocks = ggml_nelements(w.tensor)/QK_TACQ;
        const size_t size     = n_blocks*tacq_sparse_bytes(w.tensor->type);
        if (!tacq_is_mixed(w.tensor->type)) {
            continue;
        }
        section.resize(size);
        ml.files.at(w.idx)->seek(w.offs + n_blocks*tacq_base_bytes(w.tensor->type), SEEK_SET);
        ml.files.at(w.idx)->read_raw(section.data(), size);
        char message[512];
        if (!tacq_validate_section(section.data(), size, ggml_nrows(w.tensor), w.tensor->ne[0], w.tensor->name, message, sizeof(message))) {
            throw std::runtime_error(message);
        }
    }
}

void tacq_check_quantize(const ggml_tensor * tensor, ggml_type target) {
    if (tensor->type == target || !(tacq_is_mixed(tensor->type) || tacq_is_mixed(target))) {
        return;
    }
    throw std::runtime_error(format("tensor '%s' cannot be converted from %s to %s here: types with kept weights are written and "
        "read as a whole, by tacq-export only", tensor->name, ggml_type_name(tensor->type), ggml_type_name(target)));
}

const char * tacq_ftype_name(llama_ftype ftype) {
    const int type = (int) ftype & ~(int) LLAMA_FTYPE_GUESSED;
    return type < GGML_TYPE_COUNT && tacq_is_ours((ggml_type) type) ? ggml_type_name((ggml_type) type) : nullptr;
}

#include "tacq-buffer.h"

#include "tacq-mul-mat.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

static const char * buffer_type_name(ggml_backend_buffer_type_t) { return "CPU_TACQ"; }

static size_t buffer_type_alignment(ggml_backend_buffer_type_t) { return GGML_MEM_ALIGN; }

bool tacq_is_interleaved(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return buffer && buffer->buft->iface.get_name == buffer_type_name;
}

bool tacq_takes_interleaved(const ggml_tensor * op) {
    const ggml_tensor * src1 = op->src[1];
    return tacq_lanes() > 0 && tacq_mul_mat_takes(op) && op->src[0]->view_src == nullptr && ggml_is_contiguous(op->src[0]) &&
        !(src1->buffer && !ggml_backend_buft_is_host(src1->buffer->buft));
}

// Every matrix of a tensor by `reorder`; the sparse section of a mixed one stays as it is.
static void reorder_tensor(const ggml_tensor * t, const void * from, void * to, void (*reorder)(int, int64_t, int64_t, const void *, void *)) {
    const size_t n_base = ggml_nelements(t)/QK_TACQ*tacq_base_bytes(t->type);
    const size_t size2  = ggml_row_size(tacq_base_type(t->type), t->ne[0])*t->ne[1];
    for (size_t offset = 0; offset < n_base; offset += size2) {
        reorder(tacq_bits(t->type), t->ne[0], t->ne[1], (const char *) from + offset, (char *) to + offset);
    }
    memcpy((char *) to + n_base, (const char *) from + n_base, ggml_nbytes(t) - n_base);
}

static void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(t) && tacq_is_ours(t->type));
    reorder_tensor(t, data, t->data, tacq_interleave);
}

static void get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(t) && tacq_is_ours(t->type));
    reorder_tensor(t, t->data, data, tacq_deinterleave);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = buft;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = get_tensor;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

ggml_backend_buffer_type tacq_interleaved_buffer_type(void * context) {
    return {
        /* .iface    = */ {
            /* .get_name       = */ buffer_type_name,
            /* .alloc_buffer   = */ alloc_buffer,
            /* .get_alignment  = */ buffer_type_alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ context,
    };
}

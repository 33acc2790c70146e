// The hook: ops with tensors of our types on the CPU. Matrix products are in tacq-mul-mat.cpp; get_rows of a mixed tensor is that of
// its base view, by upstream's code, + sparse part.

#include "tacq-buffer.h"
#include "tacq-cpu.h"
#include "tacq-mul-mat.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"
#include "traits.h"

#include <algorithm>

static_assert(TACQ_FORMAT_VERSION == 2 && TACQ_SPARSE_VERSION == 1, "these kernels know version 1 of the sparse section");

// All rows, in their order: the sparse section lies behind the last row and counts rows from the first.
static bool is_whole(const ggml_tensor * t) {
    const ggml_tensor * src = t->view_src;
    return ggml_is_contiguous(t) &&
        (src == nullptr || (t->view_offs == 0 && src->type == t->type && src->ne[0] == t->ne[0] &&
            ggml_nelements(src) == ggml_nelements(t)));
}

static const ggml_tensor * mixed_operand(const ggml_tensor * op) {
    if (tacq_is_mixed(op->type)) {
        return op;
    }
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (op->src[i] && tacq_is_mixed(op->src[i]->type)) {
            return op->src[i];
        }
    }
    return nullptr;
}

// views compute nothing; whether the view itself can be used is asked when an op reads it
static bool is_no_op(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_RESHAPE ||
        op->op == GGML_OP_PERMUTE || op->op == GGML_OP_TRANSPOSE;
}

bool tacq_cpu_supports_op(const ggml_tensor * op) {
    if (is_no_op(op) || !mixed_operand(op)) {
        return true;
    }
    for (int i = 1; i < GGML_MAX_SRC; i++) {
        if (op->src[i] && tacq_is_mixed(op->src[i]->type)) {
            return false;
        }
    }
    if (op->type != GGML_TYPE_F32 || !is_whole(op->src[0]) || (tacq_is_interleaved(op->src[0]) && !tacq_takes_interleaved(op))) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            // with this hint upstream transforms the activations and never reads the weights
            return tacq_mul_mat_takes(op);
        case GGML_OP_MUL_MAT_ID:
            return tacq_mul_mat_takes(op);
        case GGML_OP_GET_ROWS:
            return op->src[1]->type == GGML_TYPE_I32;
        default:
            return false;
    }
}

// `op` with its mixed weights replaced by a view of their base section
struct base_op {
    ggml_tensor weights;
    ggml_tensor op;

    explicit base_op(const ggml_tensor * mixed_op) : weights(*mixed_op->src[0]), op(*mixed_op) {
        weights.type  = tacq_base_type(weights.type);
        weights.nb[0] = ggml_type_size(weights.type);
        weights.nb[1] = ggml_row_size(weights.type, weights.ne[0]);
        weights.nb[2] = weights.nb[1]*weights.ne[1];
        weights.nb[3] = weights.nb[2]*weights.ne[2];
        op.src[0] = &weights;
    }
};

// The loader has checked the whole section; this costs nothing and stops tensors that came another way (RPC, the C API).
static tacq_sparse sparse_part(const ggml_compute_params * params, const ggml_tensor * t) {
    const size_t n_blocks = ggml_nelements(t)/QK_TACQ;
    const size_t size     = n_blocks*tacq_sparse_bytes(t->type);
    const size_t n_rows   = ggml_nrows(t);
    const size_t fixed    = sizeof(tacq_sparse_header) + 4*(n_rows + 1);
    tacq_sparse s = {};
    if (size >= fixed) {
        s = tacq_sparse_parts((const char *) t->data + n_blocks*tacq_base_bytes(t->type));
    }
    if (s.header.magic != TACQ_SPARSE_MAGIC || s.header.version != TACQ_SPARSE_VERSION || s.header.n_rows != n_rows ||
        fixed + 4*(size_t) s.header.nnz > size) {
        if (params->ith > 0) {
            ggml_barrier(params->threadpool); // one thread ends the process; several at once block each other in the backtrace
        }
        GGML_ABORT("tacq: tensor '%s' of type %s has no valid sparse section for %zu rows", t->name, ggml_type_name(t->type), n_rows);
    }
    return s;
}

// this thread's share [first, last) of n rows
static void share(const ggml_compute_params * params, int64_t n, int64_t & first, int64_t & last) {
    const int64_t each = (n + params->nth - 1)/params->nth;
    first = std::min(each*params->ith, n);
    last  = std::min(first + each, n);
}

static void add_sparse_get_rows(const ggml_compute_params * params, ggml_tensor * dst, const tacq_sparse & s) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    int64_t first, last;
    share(params, ggml_nelements(src1), first, last);

    for (int64_t i = first; i < last; i++) {
        const int64_t i12 = i/(ne11*ne10);
        const int64_t i11 = (i - i12*ne11*ne10)/ne10;
        const int64_t i10 = i - i12*ne11*ne10 - i11*ne10;
        const int64_t i01 = *(const int32_t *) ((const char *) src1->data + i10*nb10 + i11*nb11 + i12*nb12);
        const int64_t row = (i12*ne02 + i11)*ne01 + i01;
        float * y = (float *) ((char *) dst->data + i10*nb1 + i11*nb2 + i12*nb3);
        for (uint32_t j = tacq_row_begin(&s, row); j < tacq_row_begin(&s, row + 1); j++) {
            y[s.columns[j]] += GGML_CPU_FP16_TO_FP32(s.values[j]);
        }
    }
}

namespace ggml::cpu::tacq {

class tensor_traits : public ggml::cpu::tensor_traits {
    // Planning runs on one thread and before any op is computed, so this is where an op that is not implemented ends.
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        if (!tacq_cpu_supports_op(op)) {
            const ggml_tensor * t = mixed_operand(op);
            GGML_ABORT("tacq: %s cannot use tensor '%s' of type %s: only MUL_MAT, MUL_MAT_ID and GET_ROWS with a whole mixed tensor "
                "as weights, F32 activations and F32 result are implemented", ggml_op_desc(op), t->name, ggml_type_name(t->type));
        }
        if (tacq_mul_mat_takes(op)) {
            size = tacq_mul_mat_work_size(n_threads, op);
            return true;
        }
        base_op base(op);
        ggml_tensor * node = &base.op;
        ggml_cgraph graph = {};
        graph.n_nodes = 1;
        graph.nodes   = &node;
        size = ggml_graph_plan(&graph, n_threads, nullptr).work_size; // upstream's own formulas
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        GGML_ASSERT(tacq_cpu_supports_op(op));
        const bool is_mixed = tacq_is_mixed(op->src[0]->type);
        tacq_sparse s;
        if (is_mixed) {
            s = sparse_part(params, op->src[0]);
        }
        if (tacq_mul_mat_takes(op)) {
            const auto compute = op->op == GGML_OP_MUL_MAT ? tacq_mul_mat : tacq_mul_mat_id;
            compute(params, op, is_mixed ? &s : nullptr);
            return true;
        }
        base_op base(op);
        tacq_cpu_compute(params, &base.op);
        ggml_barrier(params->threadpool); // upstream splits the result among the threads in its own way
        add_sparse_get_rows(params, op, s);
        return true;
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        return op->src[0] && tacq_is_interleaved(op->src[0]) && tacq_takes_interleaved(op);
    }

    // of all ops with our tensors, wherever those are
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static tensor_traits traits;
        return !is_no_op(op) && (mixed_operand(op) || tacq_mul_mat_takes(op)) ? &traits : nullptr;
    }
};

} // namespace ggml::cpu::tacq

ggml_backend_buffer_type_t tacq_cpu_buffer_type(void) {
    static ggml::cpu::tacq::extra_buffer_type context;
    static ggml_backend_buffer_type buffer_type = tacq_interleaved_buffer_type(&context);
    return &buffer_type;
}

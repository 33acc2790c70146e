// The ops over the kernels: who computes which rows, and where the work memory is (tacq-mul-mat.h).
//
// One way for both ops: activations are quantized once by all threads; then threads take chunks of rows of one matrix. A chunk is
// multiplied with all tokens of its matrix, base part and kept weights one after the other while the results are in the cache.

#include "tacq-mul-mat.h"

#include "tacq-buffer.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>

static const int64_t FEW_TOKENS = 4;  // up to here packed rows are read once per token or few; above, a tile is unpacked
static const int64_t BATCH      = TACQ_STRIPE; // tokens handed to a kernel at once; whole passes of tacq_gemm

// rows of `op` as the kernels see it
struct mul_mat_shape {
    int     bits;
    int64_t n;        // weights a row
    int64_t n_rows;   // of one matrix
    size_t  act_size;
    bool    interleaved;

    explicit mul_mat_shape(const ggml_tensor * op)
        : bits(tacq_bits(op->src[0]->type)), n(op->src[0]->ne[0]), n_rows(op->src[0]->ne[1]), act_size(tacq_act_size(n)),
          interleaved(tacq_is_interleaved(op->src[0])) {}
};

// Work memory, in this order; every part begins at a multiple of 64 bytes from the first.
struct work_memory {
    char    * acts;       // quantized rows of src1, in their order
    float   * stripes;    // transposed activations, for kept weights and many tokens: [matrix][stripe][n][TACQ_STRIPE]
    int32_t * experts;    // MUL_MAT_ID: begin of each expert's list, n_experts + 1
    int32_t * list;       // MUL_MAT_ID: token*n_used + id, expert by expert
    char    * tiles;      // one a thread
    size_t    size;
};

static int64_t n_stripes(int64_t n_tokens) {
    return (n_tokens + TACQ_STRIPE - 1)/TACQ_STRIPE;
}

static bool uses_stripes(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT && tacq_is_mixed(op->src[0]->type) && op->src[1]->ne[1] > FEW_TOKENS;
}

static work_memory work_memory_of(int n_threads, const ggml_tensor * op, void * data) {
    const mul_mat_shape shape(op);
    const ggml_tensor * src1 = op->src[1];
    work_memory w = {};
    char * const begin = (char *) (((uintptr_t) data + 63)/64*64);
    char * p = begin;
    const auto take = [&p](size_t size) {
        char * part = p;
        p += (size + 63)/64*64;
        return part;
    };
    w.acts = take(ggml_nrows(src1)*shape.act_size);
    if (uses_stripes(op)) {
        w.stripes = (float *) take(src1->ne[2]*src1->ne[3]*n_stripes(src1->ne[1])*shape.n*TACQ_STRIPE*sizeof(float));
    }
    if (op->op == GGML_OP_MUL_MAT_ID) {
        w.experts = (int32_t *) take((op->src[0]->ne[2] + 1)*sizeof(int32_t));
        w.list    = (int32_t *) take(ggml_nelements(op->src[2])*sizeof(int32_t));
    }
    w.tiles = take(n_threads*((tacq_tile_size(shape.n) + 63)/64*64));
    w.size  = p - begin + 63; // the alignment of `data`
    return w;
}

bool tacq_mul_mat_takes(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    return tacq_is_ours(src0->type) && src1->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 &&
        src0->nb[0] == ggml_type_size(src0->type) && src1->nb[0] == sizeof(float) && op->nb[0] == sizeof(float) &&
        (op->op == GGML_OP_MUL_MAT_ID || ggml_get_op_params_i32(op, 1) != GGML_HINT_SRC0_IS_HADAMARD);
}

size_t tacq_mul_mat_work_size(int n_threads, const ggml_tensor * op) {
    return work_memory_of(n_threads, op, nullptr).size;
}

// All rows of src1: thread ith takes a share of the groups of every row, so that one token is shared too.
static void quantize_activations(const ggml_compute_params * params, const ggml_tensor * src1, const mul_mat_shape & shape, const work_memory & w) {
    const int64_t n_groups = shape.n/TACQ_GROUP;
    const int64_t n_rows   = ggml_nrows(src1);
    // whole rows if there are many: a thread then writes whole cache lines
    const bool    whole    = n_rows >= 4*params->nth;
    const int64_t first    = whole ? 0        : n_groups*params->ith/params->nth;
    const int64_t last     = whole ? n_groups : n_groups*(params->ith + 1)/params->nth;
    for (int64_t i = whole ? params->ith : 0; i < n_rows; i += whole ? params->nth : 1) {
        const int64_t i11 = i % src1->ne[1];
        const int64_t i12 = i/src1->ne[1] % src1->ne[2];
        const int64_t i13 = i/src1->ne[1]/src1->ne[2];
        const char * x = (const char *) src1->data + i11*src1->nb[1] + i12*src1->nb[2] + i13*src1->nb[3];
        tacq_quantize_act((const float *) x, w.acts + i*shape.act_size, shape.n, first, last);
    }
}

static void transpose_activations(const ggml_compute_params * params, const ggml_tensor * src1, const mul_mat_shape & shape, const work_memory & w) {
    const int64_t per_matrix = n_stripes(src1->ne[1]);
    const int64_t n          = per_matrix*src1->ne[2]*src1->ne[3];
    for (int64_t i = params->ith; i < n; i += params->nth) {
        const int64_t i12 = i/per_matrix % src1->ne[2];
        const int64_t i13 = i/per_matrix/src1->ne[2];
        const int64_t t0  = i % per_matrix*TACQ_STRIPE;
        const int64_t n_tokens = std::min<int64_t>(TACQ_STRIPE, src1->ne[1] - t0);
        const float * x[TACQ_STRIPE];
        for (int64_t t = 0; t < TACQ_STRIPE; t++) {
            x[t] = (const float *) ((const char *) src1->data + (t0 + std::min(t, n_tokens - 1))*src1->nb[1] + i12*src1->nb[2] + i13*src1->nb[3]);
        }
        tacq_transpose_stripe(x, w.stripes + i*shape.n*TACQ_STRIPE, shape.n);
    }
}

// One chunk of rows of one matrix with all its tokens.
struct chunk_job {
    const char  * rows;       // first row of the chunk
    size_t        row_size;
    const char  * next;       // what this thread reads after it
    int64_t       n_rows;
    int64_t       sparse_row; // number of the first row in the sparse section
    int64_t       next_sparse_row; // that of the next chunk, or -1
    const float * stripes;    // of this matrix, or nullptr
    bool          few;        // rows are used as they are packed; else there are at most TACQ_TILE
};

// token(t, act, x, y): where token t's quantized activations, activations and results are
template <typename Token>
static void compute_chunk(const mul_mat_shape & shape, const chunk_job & job, const tacq_sparse * s, void * tile, int64_t first_token, int64_t last_token, Token token) {
    const bool few = job.few || last_token - first_token <= FEW_TOKENS;
    if (s) {
        tacq_sparse_prefetch(s, job.sparse_row, job.n_rows, job.next_sparse_row);
    }
    if (!few) {
        (shape.interleaved ? tacq_unpack_interleaved : tacq_unpack)(shape.bits, shape.n, job.n_rows, job.rows, job.row_size, tile);
    }
    for (int64_t t0 = first_token; t0 < last_token; t0 += BATCH) {
        const int64_t n_tokens = std::min(BATCH, last_token - t0);
        const void  * acts[BATCH];
        const float * xs[BATCH];
        float       * ys[BATCH];
        for (int64_t t = 0; t < n_tokens; t++) {
            token(t0 + t, acts[t], xs[t], ys[t]);
        }
        if (few) {
            (shape.interleaved ? tacq_gemv_interleaved : tacq_gemv)(shape.bits, shape.n, job.n_rows, n_tokens, job.rows, job.row_size, job.next, acts, ys);
        } else {
            tacq_gemm(shape.n, job.n_rows, n_tokens, tile, acts, ys);
        }
        if (!s) {
            continue;
        }
        if (few || !job.stripes) {
            for (int64_t t = 0; t < n_tokens; t++) {
                tacq_sparse_gemv(s, job.sparse_row, job.n_rows, xs[t], ys[t]);
            }
        } else {
            tacq_sparse_gemm(s, job.sparse_row, job.n_rows, n_tokens, job.stripes + t0*shape.n, ys);
        }
    }
}

// How n_rows are cut: the last chunk takes what is left over, because fewer rows than lanes are slow. Chunks begin at multiples
// of 16, which every machine's number of interleaved rows divides.
struct row_chunks {
    int64_t n_rows, size, n;

    row_chunks(int64_t n_rows_, int64_t size_) : n_rows(n_rows_), size(size_), n(std::max<int64_t>(1, n_rows_/size_)) {}

    int64_t begin(int64_t i) const { return i*size; }
    int64_t end  (int64_t i) const { return i + 1 == n ? n_rows : (i + 1)*size; }
};

// Tiles take at most TACQ_TILE rows, so there the last chunk is a short one.
static row_chunks tile_chunks(int64_t n_rows) {
    row_chunks c(n_rows, TACQ_TILE);
    c.n = (n_rows + TACQ_TILE - 1)/TACQ_TILE;
    return c;
}

// Chunks of a few tokens: about 8 a thread, so that a thread that is held up leaves its share to others.
static row_chunks few_chunks(int64_t n_rows, int n_threads) {
    const int64_t size = n_rows/(8*n_threads)/16*16;
    return row_chunks(n_rows, std::min<int64_t>(std::max<int64_t>(size, 16), 256));
}

void tacq_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, const tacq_sparse * s) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    const mul_mat_shape shape(dst);
    const work_memory   w = work_memory_of(params->nth, dst, params->wdata);
    GGML_ASSERT(params->wsize >= w.size);

    // rows of a mixed tensor lie as those of its base type
    const ggml_type type     = tacq_base_type(src0->type);
    const size_t    row_size = tacq_is_mixed(src0->type) ? ggml_row_size(type, ne00) : nb01;
    const size_t    size2    = tacq_is_mixed(src0->type) ? row_size*ne01             : nb02;
    const size_t    size3    = tacq_is_mixed(src0->type) ? row_size*ne01*ne02        : nb03;

    quantize_activations(params, src1, shape, w);
    if (w.stripes) {
        transpose_activations(params, src1, shape, w);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const row_chunks rows = ne11 <= FEW_TOKENS ? few_chunks(ne01, params->nth) : tile_chunks(ne01);
    // many threads and few rows: tokens are shared too, at the price of unpacking more than once
    const int64_t n_matrices = ne12*ne13;
    const int64_t n_parts    = ne11 <= FEW_TOKENS ? 1 :
        std::max<int64_t>(1, std::min(2*params->nth/(rows.n*n_matrices), (ne11 + BATCH - 1)/BATCH));
    const int64_t n_chunks   = n_matrices*rows.n*n_parts;
    const int64_t part       = ((ne11 + n_parts - 1)/n_parts + BATCH - 1)/BATCH*BATCH; // tokens

    const int64_t r2 = ne12/ne02; // broadcast factors, as in upstream's mul_mat
    const int64_t r3 = ne13/ne03;

    const auto rows_of = [&](int64_t chunk) {
        const int64_t matrix = chunk/n_parts/rows.n;
        return (const char *) src0->data + rows.begin(chunk/n_parts % rows.n)*row_size + matrix % ne12/r2*size2 + matrix/ne12/r3*size3;
    };

    const auto sparse_row_of = [&](int64_t chunk) {
        const int64_t matrix = chunk/n_parts/rows.n;
        return (matrix/ne12/r3*ne02 + matrix % ne12/r2)*ne01 + rows.begin(chunk/n_parts % rows.n);
    };

    void * tile = w.tiles + params->ith*((tacq_tile_size(shape.n) + 63)/64*64);
    for (int64_t chunk = params->ith; chunk < n_chunks; ) {
        const int64_t next   = ggml_threadpool_chunk_add(params->threadpool, 1); // now, so that the kernel knows what comes
        const int64_t matrix = chunk/n_parts/rows.n;
        const int64_t i12    = matrix % ne12;
        const int64_t i13    = matrix/ne12;
        const int64_t row    = rows.begin(chunk/n_parts % rows.n);

        chunk_job job;
        job.rows       = rows_of(chunk);
        job.row_size   = row_size;
        job.next       = next < n_chunks ? rows_of(next) : nullptr;
        job.n_rows     = rows.end(chunk/n_parts % rows.n) - row;
        job.sparse_row = sparse_row_of(chunk);
        job.next_sparse_row = next < n_chunks ? sparse_row_of(next) : -1;
        job.few        = ne11 <= FEW_TOKENS;
        job.stripes    = w.stripes ? w.stripes + matrix*n_stripes(ne11)*TACQ_STRIPE*shape.n : nullptr;

        compute_chunk(shape, job, s, tile, chunk % n_parts*part, std::min(ne11, (chunk % n_parts + 1)*part),
            [&](int64_t t, const void *& act, const float *& x, float *& y) {
                act = w.acts + (matrix*ne11 + t)*shape.act_size;
                x   = (const float *) ((const char *) src1->data + t*nb11 + i12*nb12 + i13*nb13);
                y   = (float *) ((char *) dst->data + t*nb1 + i12*nb2 + i13*nb3) + row;
            });
        chunk = next;
    }
}

// Lists of the (token, id) pairs of every expert, by counting.
static void group_by_expert(const ggml_tensor * ids, int64_t n_experts, const work_memory & w) {
    const int64_t n_used = ids->ne[0];
    const auto expert_of = [&](int64_t i) {
        const int32_t e = *(const int32_t *) ((const char *) ids->data + i/n_used*ids->nb[1] + i % n_used*ids->nb[0]);
        GGML_ASSERT(e >= 0 && e < n_experts);
        return e;
    };
    std::fill(w.experts, w.experts + n_experts + 1, 0);
    for (int64_t i = 0; i < n_used*ids->ne[1]; i++) {
        w.experts[expert_of(i) + 1]++;
    }
    for (int64_t e = 0; e < n_experts; e++) {
        w.experts[e + 1] += w.experts[e];
    }
    for (int64_t i = 0; i < n_used*ids->ne[1]; i++) {
        w.list[w.experts[expert_of(i)]++] = (int32_t) i; // leaves every begin at its end, which is the next one's begin
    }
    for (int64_t e = n_experts; e > 0; e--) {
        w.experts[e] = w.experts[e - 1];
    }
    w.experts[0] = 0;
}

void tacq_mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst, const tacq_sparse * s) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];

    GGML_TENSOR_BINARY_OP_LOCALS

    const mul_mat_shape shape(dst);
    const work_memory   w = work_memory_of(params->nth, dst, params->wdata);
    GGML_ASSERT(params->wsize >= w.size);

    const ggml_type type     = tacq_base_type(src0->type);
    const size_t    row_size = tacq_is_mixed(src0->type) ? ggml_row_size(type, ne00) : nb01;
    const size_t    size2    = tacq_is_mixed(src0->type) ? row_size*ne01             : nb02;

    quantize_activations(params, src1, shape, w);
    if (params->ith == 0) {
        group_by_expert(ids, ne02, w);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t    n_used   = ids->ne[0];
    const bool       few      = ids->ne[1] <= FEW_TOKENS; // then no expert has more
    const row_chunks rows     = few ? few_chunks(ne01, params->nth) : tile_chunks(ne01);
    const int64_t    n_chunks = ne02*rows.n;

    void * tile = w.tiles + params->ith*((tacq_tile_size(shape.n) + 63)/64*64);
    for (int64_t chunk = params->ith; chunk < n_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t   expert = chunk/rows.n;
        const int64_t   row    = rows.begin(chunk % rows.n);
        const int32_t * list   = w.list + w.experts[expert];
        const int64_t   n_list = w.experts[expert + 1] - w.experts[expert];
        if (n_list == 0) {
            continue;
        }
        chunk_job job;
        job.rows       = (const char *) src0->data + expert*size2 + row*row_size;
        job.row_size   = row_size;
        job.next       = nullptr;
        job.n_rows     = rows.end(chunk % rows.n) - row;
        job.sparse_row = expert*ne01 + row;
        job.next_sparse_row = -1;
        job.few        = few;
        job.stripes    = nullptr; // an expert's tokens are scattered

        compute_chunk(shape, job, s, tile, 0, n_list, [&](int64_t t, const void *& act, const float *& x, float *& y) {
            const int64_t token = list[t]/n_used;
            const int64_t id    = list[t] % n_used;
            act = w.acts + (token*ne11 + id % ne11)*shape.act_size;
            x   = (const float *) ((const char *) src1->data + token*nb12 + id % ne11*nb11);
            y   = (float *) ((char *) dst->data + token*nb2 + id*nb1) + row;
        });
    }
}

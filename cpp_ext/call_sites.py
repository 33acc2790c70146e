"""The call sites in upstream files: every line that llama.cpp gets from us, and where.

Data only; `patch_llama_cpp.py` applies it. Upstream files hold calls, never code of ours: that lives in this folder.
A new call site goes at the end of the list of its file, then `python patch_llama_cpp.py TREE --update` renews the committed diff.
"""

from patch_llama_cpp import CallSite

CALL_SITES = [
    # -- ggml/include/ggml.h: the ids --------------------------------------------------------------------------------
    CallSite(
        name="type ids",
        file="ggml/include/ggml.h",
        inside="    enum ggml_type {\n",
        anchor="        GGML_TYPE_COUNT   = 43,\n",
        where="replace",
        # Far above upstream's own ids, so that upstream can grow without a clash; 43..511 and 515..519 stay holes.
        insert="""\
        GGML_TYPE_TACQ2     = 512, // cpp_ext/tacq-common.h
        GGML_TYPE_TACQ3     = 513,
        GGML_TYPE_TACQ4     = 514,
        GGML_TYPE_TACQ2_S1 = 520, GGML_TYPE_TACQ2_S2, GGML_TYPE_TACQ2_S3, GGML_TYPE_TACQ2_S4, GGML_TYPE_TACQ2_S6, GGML_TYPE_TACQ2_S8, GGML_TYPE_TACQ2_S12, GGML_TYPE_TACQ2_S16,
        GGML_TYPE_TACQ3_S1 = 528, GGML_TYPE_TACQ3_S2, GGML_TYPE_TACQ3_S3, GGML_TYPE_TACQ3_S4, GGML_TYPE_TACQ3_S6, GGML_TYPE_TACQ3_S8, GGML_TYPE_TACQ3_S12, GGML_TYPE_TACQ3_S16,
        GGML_TYPE_TACQ4_S1 = 536, GGML_TYPE_TACQ4_S2, GGML_TYPE_TACQ4_S3, GGML_TYPE_TACQ4_S4, GGML_TYPE_TACQ4_S6, GGML_TYPE_TACQ4_S8, GGML_TYPE_TACQ4_S12, GGML_TYPE_TACQ4_S16,
        GGML_TYPE_COUNT     = 544,
""",
    ),
    # -- CMakeLists.txt: our sources, once the targets ggml-base, ggml-cpu and llama exist ------------------------------
    CallSite(
        name="sources",
        file="CMakeLists.txt",
        inside="add_subdirectory(src)\n",
        anchor="add_subdirectory(src)\n",
        where="after",
        insert="include(${TACQ_CPP_EXT}/tacq.cmake)\n",
    ),
    # -- ggml-base: the types ------------------------------------------------------------------------------------------
    CallSite(
        name="types header",
        file="ggml/src/ggml-impl.h",
        inside='#include "ggml.h"\n',
        anchor='#include "ggml.h"\n',
        where="after",
        insert='#include "tacq-types.h"\n',
    ),
    CallSite(
        name="quants header",
        file="ggml/src/ggml.c",
        inside='#include "ggml-quants.h"\n',
        anchor='#include "ggml-quants.h"\n',
        where="after",
        insert='#include "tacq-quants.h"\n',
    ),
    CallSite(
        name="type traits",
        file="ggml/src/ggml.c",
        inside="static const struct ggml_type_traits type_traits[GGML_TYPE_COUNT] = {\n",
        anchor="static const struct ggml_type_traits type_traits[GGML_TYPE_COUNT] = {\n",
        where="after",
        insert="    TACQ_TYPE_TRAITS\n",
    ),
    CallSite(
        name="quantize chunk",
        file="ggml/src/ggml.c",
        inside="size_t ggml_quantize_chunk(\n",
        anchor="        case GGML_TYPE_IQ4_XS:  result = quantize_iq4_xs (src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;\n",
        where="after",
        insert=(
            "        case GGML_TYPE_TACQ2:    result = quantize_tacq2  (src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;\n"
            "        case GGML_TYPE_TACQ3:    result = quantize_tacq3  (src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;\n"
            "        case GGML_TYPE_TACQ4:    result = quantize_tacq4  (src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;\n"
        ),
    ),
    CallSite(
        name="validate row data",
        file="ggml/src/ggml-quants.c",
        inside="bool ggml_validate_row_data(enum ggml_type type, const void * data, size_t nbytes) {\n",
        anchor="        case GGML_TYPE_NVFP4:\n",
        where="before",
        insert="        TACQ_TYPE_CASES break; // every byte of a base block is legal; sparse sections are checked by the loader\n",
    ),
    CallSite(
        name="unknown types in files",
        file="ggml/src/gguf.cpp",
        inside="static struct gguf_context * gguf_init_from_reader(const struct gguf_reader & gr, struct gguf_init_params params) {\n",
        anchor="            // check that tensor type is within defined range\n",
        where="before",
        insert="            if (ok && tacq_reject_unknown_type(info.t.name, info.t.type)) { ok = false; break; }\n",
    ),
    # -- ggml-cpu: kernels and the hook --------------------------------------------------------------------------------
    CallSite(
        name="cpu header",
        file="ggml/src/ggml-cpu/ggml-cpu.c",
        inside='#include "traits.h"\n',
        anchor='#include "traits.h"\n',
        where="after",
        insert='#include "tacq-cpu.h"\n',
    ),
    CallSite(
        name="cpu type traits",
        file="ggml/src/ggml-cpu/ggml-cpu.c",
        inside="static const struct ggml_type_traits_cpu type_traits_cpu[GGML_TYPE_COUNT] = {\n",
        anchor="static const struct ggml_type_traits_cpu type_traits_cpu[GGML_TYPE_COUNT] = {\n",
        where="after",
        insert="    TACQ_TYPE_TRAITS_CPU\n",
    ),
    CallSite(
        name="cpu compute",
        file="ggml/src/ggml-cpu/ggml-cpu.c",
        inside='// Android\'s libc implementation "bionic" does not support setting affinity\n',
        anchor='// Android\'s libc implementation "bionic" does not support setting affinity\n',
        where="before",
        insert="void tacq_cpu_compute(struct ggml_compute_params * params, struct ggml_tensor * op) { ggml_compute_forward(params, op); }\n",
    ),
    CallSite(
        name="hook header",
        file="ggml/src/ggml-cpu/ggml-cpu.cpp",
        inside='#include "amx/amx.h"\n',
        anchor='#include "amx/amx.h"\n',
        where="after",
        insert='#include "tacq-cpu.h"\n',
    ),
    CallSite(
        name="hook",
        file="ggml/src/ggml-cpu/ggml-cpu.cpp",
        inside="std::vector<ggml_backend_buffer_type_t> & ggml_backend_cpu_get_extra_buffer_types() {\n",
        anchor="        return bufts;\n",
        where="before",
        insert="        bufts.push_back(tacq_cpu_buffer_type());\n",
    ),
    CallSite(
        name="supports op",
        file="ggml/src/ggml-cpu/ggml-cpu.cpp",
        inside="static bool ggml_backend_cpu_device_supports_op(ggml_backend_dev_t dev, const struct ggml_tensor * op) {\n",
        anchor="    // check extra buffer types\n",
        where="before",
        insert="    if (!tacq_cpu_supports_op(op)) { return false; }\n",
    ),
    CallSite(
        name="add of base types",
        file="ggml/src/ggml-cpu/ops.cpp",
        inside="void ggml_compute_forward_add(\n",
        anchor="        case GGML_TYPE_Q4_0:\n",
        where="before",
        insert="        TACQ_BASE_CASES\n",
    ),
    CallSite(
        name="add1 of base types",
        file="ggml/src/ggml-cpu/ops.cpp",
        inside="void ggml_compute_forward_add1(\n",
        anchor="        case GGML_TYPE_Q4_0:\n",
        where="before",
        insert="        TACQ_BASE_CASES\n",
    ),
    CallSite(
        name="out prod of base types",
        file="ggml/src/ggml-cpu/ops.cpp",
        inside="void ggml_compute_forward_out_prod(\n",
        anchor="        case GGML_TYPE_Q4_0:\n",
        where="before",
        insert="        TACQ_BASE_CASES\n",
    ),
    CallSite(
        name="get rows of base types",
        file="ggml/src/ggml-cpu/ops.cpp",
        inside="void ggml_compute_forward_get_rows(\n",
        anchor="        case GGML_TYPE_Q4_0:\n",
        where="before",
        insert="        TACQ_BASE_CASES\n",
    ),
    CallSite(
        name="clamp of our types",
        file="ggml/src/ggml-cpu/ops.cpp",
        inside="void ggml_compute_forward_clamp(\n",
        anchor="        case GGML_TYPE_Q4_0:\n",
        where="before",
        insert="        TACQ_TYPE_CASES\n",
    ),
    # -- libllama: checks at load time ---------------------------------------------------------------------------------
    CallSite(
        name="load header",
        file="src/llama-model-loader.cpp",
        inside='#include "llama-model-loader.h"\n',
        anchor='#include "llama-model-loader.h"\n',
        where="after",
        insert='#include "tacq-load.h"\n',
    ),
    CallSite(
        name="check model",
        file="src/llama-model-loader.cpp",
        inside="llama_model_loader::llama_model_loader(\n",
        anchor="    this->check_tensors = check_tensors;\n",
        where="before",
        insert="    tacq_check_model(*this);\n",
    ),
    CallSite(
        name="guessed file type",
        file="src/llama-model-loader.cpp",
        inside="llama_model_loader::llama_model_loader(\n",
        anchor="            case GGML_TYPE_Q2_0:    ftype = LLAMA_FTYPE_MOSTLY_Q2_0;    break;\n",
        where="after",
        insert="            TACQ_TYPE_CASES         ftype = (llama_ftype) type_max;     break; // tacq_ftype_name\n",
    ),
    CallSite(
        name="file type name",
        file="src/llama-model-loader.cpp",
        inside="const char * llama_ftype_name(llama_ftype ftype) {\n",
        anchor="const char * llama_ftype_name(llama_ftype ftype) {\n",
        where="after",
        insert="    if (const char * tacq_name = tacq_ftype_name(ftype)) { return tacq_name; }\n",
    ),
    CallSite(
        name="quantize header",
        file="src/llama-quant.cpp",
        inside='#include "llama-model-loader.h"\n',
        anchor='#include "llama-model-loader.h"\n',
        where="after",
        insert='#include "tacq-load.h"\n',
    ),
    CallSite(
        name="refuse to requantize",
        file="src/llama-quant.cpp",
        inside="static void llama_model_quantize_impl(const std::string & fname_inp, const std::string & fname_out, const llama_model_quantize_params * params) {\n",
        anchor="        metadata[i].requires_imatrix = tensor_requires_imatrix(tensor->name, metadata[i].target_type, ftype);\n",
        where="before",
        insert="        tacq_check_quantize(tensor, metadata[i].target_type);\n",
    ),
    # -- common: what a person reads -----------------------------------------------------------------------------------
    CallSite(
        name="log at exit",
        file="common/log.cpp",
        inside="struct common_log * common_log_main() {\n",
        anchor="        log->set_colors(tty_can_use_colors());\n",
        where="after",
        insert="        atexit([]() { log->pause(); }); // else a program that refuses a file and ends may lose the line that says why\n",
    ),
    # -- upstream's own tests ------------------------------------------------------------------------------------------
    CallSite(
        name="test all_types",
        file="tests/test-backend-ops.cpp",
        inside="static const ggml_type all_types[] = {\n",
        anchor="static const ggml_type all_types[] = {\n",
        where="after",
        insert="    GGML_TYPE_TACQ2, GGML_TYPE_TACQ3, GGML_TYPE_TACQ4,\n",
    ),
    CallSite(
        name="test base_types",
        file="tests/test-backend-ops.cpp",
        inside="static const ggml_type base_types[] = {\n",
        anchor="static const ggml_type base_types[] = {\n",
        where="after",
        insert="    GGML_TYPE_TACQ2, GGML_TYPE_TACQ3, GGML_TYPE_TACQ4,\n",
    ),
    CallSite(
        name="quantization error limits",
        file="tests/test-quantize-fns.cpp",
        inside="static int test_vec_dot_q(bool verbose) {\n",
        anchor="                type == GGML_TYPE_Q2_K    ? MAX_QUANTIZATION_TOTAL_ERROR_2BITS :\n",
        where="before",
        insert=(
            "                type == GGML_TYPE_TACQ2   ? MAX_QUANTIZATION_TOTAL_ERROR_2BITS : // measured 0.0059\n"
            "                type == GGML_TYPE_TACQ3   ? MAX_QUANTIZATION_TOTAL_ERROR_3BITS : // measured 0.0030\n"
        ),
    ),
    CallSite(
        name="dot product error limits",
        file="tests/test-quantize-fns.cpp",
        inside="static int test_vec_dot_q(bool verbose) {\n",
        anchor="                ? MAX_DOT_PRODUCT_ERROR_LOWBIT\n",
        where="after",
        # Rounding of least squares shrinks a vector by its relative squared error, with 2 bits and this test's two waves 7 %,
        # and their product per weight is 1.09: 0.076 is expected of TACQ2. (The levels are made for the bell curves of models, with
        # which it is 8 %; a wave is at its ends most of the time.)
        insert="""\
                : type == GGML_TYPE_TACQ2 ? 0.09f // measured 0.0793
                : type == GGML_TYPE_TACQ3 ? MAX_DOT_PRODUCT_ERROR_LOWBIT // measured 0.0161
""",
    ),
]

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
        GGML_TYPE_TACQ2_S1  = 520, // mixed types: 520 + (bits - 2)*8 + i, bytes a block in the sparse section = {1,2,3,4,6,8,12,16}[i]
        GGML_TYPE_TACQ4_S16 = 543,
        GGML_TYPE_COUNT     = 544,
""",
    ),
    # -- ggml/src/CMakeLists.txt: our sources ------------------------------------------------------------------------
    CallSite(
        name="sources",
        file="ggml/src/CMakeLists.txt",
        inside="ggml_add_backend(CPU)\n",
        anchor="ggml_add_backend(CPU)\n",
        where="after",
        insert="include(${TACQ_CPP_EXT}/tacq.cmake)\n",
    ),
]

# Our sources in upstream's targets. Included once, by call site "sources", when those targets exist.
set(TACQ_DIR ${CMAKE_CURRENT_LIST_DIR})

# One CPU library only: GGML_CPU_ALL_VARIANTS makes several, each with its own flags, under other names.
if (NOT TARGET ggml-cpu)
    message(FATAL_ERROR "tacq: no target ggml-cpu; build with GGML_CPU=ON and GGML_CPU_ALL_VARIANTS=OFF")
endif()

target_sources(ggml-base PRIVATE ${TACQ_DIR}/tacq-quants.c ${TACQ_DIR}/tacq-validate.c)
target_sources(ggml-cpu  PRIVATE 
    ${TACQ_DIR}/tacq-vec-dot.c ${TACQ_DIR}/tacq-activations.c ${TACQ_DIR}/tacq-interleave.c ${TACQ_DIR}/tacq-gemv.c ${TACQ_DIR}/tacq-gemm.c ${TACQ_DIR}/tacq-sparse.c
    ${TACQ_DIR}/tacq-mul-mat.cpp ${TACQ_DIR}/tacq-buffer.cpp ${TACQ_DIR}/tacq-cpu.cpp)
target_sources(llama     PRIVATE ${TACQ_DIR}/tacq-load.cpp)

# Public: ggml-impl.h includes tacq-types.h, and every backend includes ggml-impl.h.
target_include_directories(ggml-base PUBLIC $<BUILD_INTERFACE:${TACQ_DIR}>)
target_include_directories(ggml-cpu  PRIVATE ${PROJECT_SOURCE_DIR}/ggml/src/ggml-cpu)

# Quantization must give the same bytes as numpy everywhere: a fused multiply-add rounds once where numpy rounds twice.
if (NOT MSVC)
    set_source_files_properties(${TACQ_DIR}/tacq-quants.c TARGET_DIRECTORY ggml-base
        PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
    # A token's result must have the same bits alone and in a batch: vectors and scalars round alike.
    set_source_files_properties(${TACQ_DIR}/tacq-sparse.c TARGET_DIRECTORY ggml-cpu
        PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
endif()
# No AMX. ggml configures the tiles of a thread once, and torch, whose threads they are too in a Python program, does it
# its own way and as often: then either reads tiles of another shape, or faults. gcc 12 cannot configure them at all
# (bug 114098), and MLA's three-dimensional weights are taken and refused later. Our types have no use for AMX.
include(CheckCCompilerFlag)
foreach (part tile int8 bf16)
    check_c_compiler_flag(-mno-amx-${part} TACQ_COMPILER_KNOWS_AMX_${part})
    if (TACQ_COMPILER_KNOWS_AMX_${part})
        target_compile_options(ggml-cpu PRIVATE -mno-amx-${part})
    endif()
endforeach()
# upstream's sources are merged into a few units; ours must not depend on what stands before it there
set_source_files_properties(${TACQ_DIR}/tacq-load.cpp TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# DT_RPATH in place of DT_RUNPATH: programs and libraries then load those beside them, whatever LD_LIBRARY_PATH names
# first. Another libllama.so or libggml.so there cannot read our types. Targets made before this file are named.
if (UNIX AND NOT APPLE)
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_LINK_OPTIONS -Wl,--disable-new-dtags)
    check_cxx_source_compiles("int main() { return 0; }" TACQ_LINKER_KNOWS_RPATH)
    unset(CMAKE_REQUIRED_LINK_OPTIONS)
    if (TACQ_LINKER_KNOWS_RPATH)
        add_link_options(-Wl,--disable-new-dtags)
        foreach (target ggml-base ggml-cpu ggml llama)
            target_link_options(${target} PRIVATE -Wl,--disable-new-dtags)
        endforeach()
    endif()
endif()

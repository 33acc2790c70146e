# Our sources in upstream's targets. Included once, at the end of ggml/src/CMakeLists.txt, by call site "sources".
set(TACQ_DIR ${CMAKE_CURRENT_LIST_DIR})

target_sources(ggml-base PRIVATE ${TACQ_DIR}/tacq-quants.c ${TACQ_DIR}/tacq-quants.h ${TACQ_DIR}/tacq-common.h)
target_include_directories(ggml-base PRIVATE ${TACQ_DIR})

# One CPU library only: GGML_CPU_ALL_VARIANTS makes several, each with its own flags, under other names.
if (NOT TARGET ggml-cpu)
    message(FATAL_ERROR "tacq: no target ggml-cpu; build with GGML_CPU=ON and GGML_CPU_ALL_VARIANTS=OFF")
endif()
target_sources(ggml-cpu PRIVATE ${TACQ_DIR}/tacq-cpu.cpp ${TACQ_DIR}/tacq-cpu.h)
target_include_directories(ggml-cpu PRIVATE ${TACQ_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/ggml-cpu)

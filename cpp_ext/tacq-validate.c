// Checks of what a file says: type ids and sparse sections. Nothing read here is trusted.

#include "tacq-quants.h"

#include "ggml-impl.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

bool tacq_reject_unknown_type(const char * tensor_name, int type) {
    if (type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((enum ggml_type) type) > 0) {
        return false;
    }
    GGML_LOG_ERROR("tacq: tensor '%s' has type %d, which does not exist in this version; the file is damaged, or needs a newer version\n",
        tensor_name, type);
    return true;
}

typedef struct {
    const char * tensor_name;
    char       * message;
    size_t       size;
} tacq_report;

static bool fail(const tacq_report * report, const char * what, ...) {
    if (report->message && report->size > 0) {
        char text[160];
        va_list args;
        va_start(args, what);
        vsnprintf(text, sizeof(text), what, args);
        va_end(args);
        snprintf(report->message, report->size,
            "tensor '%s': %s; the file is damaged or was not written by tacq-export, export it again", report->tensor_name, text);
    }
    return false;
}

static bool check_header(const tacq_report * report, const tacq_sparse_header * h, size_t size, int64_t n_rows) {
    if (h->magic != TACQ_SPARSE_MAGIC) {
        return fail(report, "sparse section has magic 0x%08" PRIx32 ", expected 0x%08" PRIx32, h->magic, TACQ_SPARSE_MAGIC);
    }
    if (h->version > TACQ_SPARSE_VERSION) {
        if (report->message && report->size > 0) {
            snprintf(report->message, report->size,
                "tensor '%s': sparse section version %d is newer than this program's %d; upgrade tacq-export and build its runtime again",
                report->tensor_name, h->version, TACQ_SPARSE_VERSION);
        }
        return false;
    }
    if (h->version != TACQ_SPARSE_VERSION || h->flags != 0) {
        return fail(report, "sparse section has version %d and flags %d, expected %d and 0", h->version, h->flags, TACQ_SPARSE_VERSION);
    }
    if (h->n_rows != n_rows) {
        return fail(report, "sparse section has %" PRIu32 " rows, expected %" PRId64, h->n_rows, n_rows);
    }
    if (sizeof(*h) + 4*((uint64_t) n_rows + 1) + 4*(uint64_t) h->nnz > size) {
        return fail(report, "%" PRIu32 " kept weights do not fit a sparse section of %zu bytes", h->nnz, size);
    }
    return true;
}

bool tacq_validate_section(
        const void * section, size_t size, int64_t n_rows, int64_t n_columns,
        const char * tensor_name, char * message, size_t message_size) {
    const tacq_report report = { tensor_name, message, message_size };

    if (n_rows < 0 || n_rows >= UINT32_MAX || size < sizeof(tacq_sparse_header) + 4*((uint64_t) n_rows + 1)) {
        return fail(&report, "sparse section of %zu bytes is too small for %" PRId64 " rows", size, n_rows);
    }
    const tacq_sparse s = tacq_sparse_parts(section); // the pointers are good once the header is
    if (!check_header(&report, &s.header, size, n_rows)) {
        return false;
    }

    const uint32_t first = tacq_row_begin(&s, 0);
    const uint32_t last  = tacq_row_begin(&s, n_rows);
    if (first != 0 || last != s.header.nnz) {
        return fail(&report, "row pointers run from %" PRIu32 " to %" PRIu32 ", expected 0 to %" PRIu32, first, last, s.header.nnz);
    }
    for (int64_t row = 0; row < n_rows; row++) { // all of them first: only then is every index below nnz
        if (tacq_row_begin(&s, row + 1) < tacq_row_begin(&s, row)) {
            return fail(&report, "row pointers decrease at row %" PRId64, row);
        }
    }
    for (int64_t row = 0; row < n_rows; row++) {
        const uint32_t end = tacq_row_begin(&s, row + 1);
        int32_t before = -1;
        for (uint32_t i = tacq_row_begin(&s, row); i < end; i++) {
            uint16_t column, value;
            memcpy(&column, s.columns + i, sizeof(column));
            memcpy(&value,  s.values  + i, sizeof(value));
            if (column >= n_columns) {
                return fail(&report, "column index %d is out of range, the tensor has %" PRId64 " columns", column, n_columns);
            }
            if (column <= before) {
                return fail(&report, "column indices do not ascend within a row (row %" PRId64 ")", row);
            }
            if ((value & 0x7c00) == 0x7c00) {
                return fail(&report, "a kept value is NaN or Inf (row %" PRId64 ")", row);
            }
            before = column;
        }
    }
    return true;
}

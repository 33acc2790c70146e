// One call of tacq_descend on data from a file, for the test that runs it on another processor: run_descent IN OUT.
// IN: nine int32 (bits, number of levels, passes, below, above, closed, fresh, whether there are kept weights, rows), then
// the arrays in the order of `read_part` below. OUT: values, base, change, codes, bytes.

#include "group_descent.h"

#include <stdio.h>
#include <stdlib.h>

static void * read_part(FILE * in, size_t bytes) {
    void * part = malloc(bytes);
    if (!part || fread(part, 1, bytes, in) != bytes) {
        fprintf(stderr, "the input is too short\n");
        exit(2);
    }
    return part;
}

static void write_part(FILE * out, const void * part, size_t bytes) {
    if (fwrite(part, 1, bytes, out) != bytes) {
        exit(3);
    }
}

int main(int argc, char ** argv) {
    FILE * in = argc == 3 ? fopen(argv[1], "rb") : NULL, * out = argc == 3 ? fopen(argv[2], "wb") : NULL;
    if (!in || !out) {
        return 1;
    }
    const int32_t * size = read_part(in, 9*sizeof(int32_t));
    const size_t rows = (size_t) size[8], floats = rows*GROUP*sizeof(float);
    struct tacq_descent t = { .bits = size[0], .passes = size[2], .below = size[3], .above = size[4], .closed = size[5], .fresh = size[6] };
    t.scale_of_byte = read_part(in, 256*sizeof(float));
    t.levels        = read_part(in, (size_t) size[1]*sizeof(float));
    t.h             = read_part(in, GROUP*GROUP*sizeof(float));
    const uint8_t * kept = read_part(in, rows*GROUP);
    t.kept          = size[7] ? kept : NULL;
    t.gradient      = read_part(in, floats);
    t.values        = read_part(in, floats);
    t.base          = read_part(in, floats);
    t.codes         = read_part(in, rows*GROUP);
    t.bytes         = read_part(in, rows);
    t.change        = malloc(floats);
    tacq_descend(&t, 0, (int64_t) rows);
    write_part(out, t.values, floats);
    write_part(out, t.base,   floats);
    write_part(out, t.change, floats);
    write_part(out, t.codes,  rows*GROUP);
    write_part(out, t.bytes,  rows);
    return fclose(out);
}

// The SPEC of --io fault: taken, or refused with a line; nothing is leaked.

#include "fuzz.h"

#include <string.h>

#include "core/device.h"
#include "io/io.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct image image = {.is_direct = true, .dio_offset_align = 512, .dio_mem_align = 4};
    struct device dev = {.image = &image};
    char *text = malloc(6 + len + 1);
    struct err err = {""};
    struct io *io;
    int ret;

    memcpy(text, "fault:", 6);
    memcpy(text + 6, data, len);
    text[6 + len] = '\0';
    (void)io_wants_direct(text);
    ret = io_create(&io, &dev, &image, text, &err);
    must(ret <= 0);
    if (ret < 0) {
        must(err.line[0] && strlen(err.line) < sizeof(err.line));
    } else {
        must(io->ops == &io_fault_ops && io->dev == &dev && io->lower);
        io_destroy(io);
    }
    free(text);
    return 0;
}

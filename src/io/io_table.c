// Which ios there are. Cold.

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "io/io.h"
#include "util/util.h"

static const struct io_ops *const io_table[] = {
    &io_direct_ops,
    &io_buffered_ops,
    &io_null_ops,
    &io_fault_ops,
};

// The ops that text names, and what stands after the colon.
static const struct io_ops *io_find(const char *text, const char **spec)
{
    size_t name_len = strcspn(text, ":");

    *spec = text[name_len] ? text + name_len + 1 : NULL;
    for (unsigned i = 0; i < ARRAY_SIZE(io_table); i++) {
        if (strlen(io_table[i]->name) == name_len && !strncmp(io_table[i]->name, text, name_len))
            return io_table[i];
    }
    return NULL;
}

bool io_wants_direct(const char *text)
{
    const char *spec;
    const struct io_ops *ops = io_find(text, &spec);

    return ops && ops->wants_direct && ops->wants_direct(spec);
}

int io_create(struct io **io, struct device *dev, const struct image *image, const char *text,
              struct err *err)
{
    const char *spec;
    const struct io_ops *ops = io_find(text, &spec);
    int ret;

    if (!ops)
        return err_usage(err, "--io: %s: no such io; use direct, buffered, null or fault:SPEC", text);
    if (ops == &io_direct_ops && !image->is_direct) {
        log_line("%s: its file system cannot do direct I/O; using --io buffered", image->path);
        ops = &io_buffered_ops;
    }
    if (spec && !ops->takes_spec)
        return err_usage(err, "--io: %s takes no \":%s\"; leave it out", ops->name, spec);
    *io = calloc(1, ops->io_bytes);
    if (!*io)
        return err_set(err, -ENOMEM, "--io: %s: out of memory", ops->name);
    (*io)->ops = ops;
    (*io)->dev = dev;
    (*io)->image = image;
    ret = ops->init ? ops->init(*io, spec, err) : 0;
    if (ret < 0) {
        free(*io);
        *io = NULL;
    }
    return ret;
}

void io_destroy(struct io *io)
{
    if (io->ops->exit)
        io->ops->exit(io);
    free(io);
}

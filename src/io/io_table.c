// Which ios there are. Cold.

#include <assert.h>
#include <errno.h>
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

int io_create(struct io **io, struct device *dev, const char *text, struct err *err)
{
    const char *spec;
    const struct io_ops *ops = io_find(text, &spec);
    int ret;

    if (!ops)
        return err_set(err, -EINVAL, "--io: %s: no such io; use direct, buffered, null or fault:SPEC", text);
    if (ops == &io_direct_ops && !dev->image.is_direct) {
        log_line("%s: its file system cannot do direct I/O; using --io buffered", dev->image.path);
        ops = &io_buffered_ops;
    }
    ret = ops->create(io, dev, spec, err);
    if (ret < 0)
        return ret;
    assert((*io)->ops == ops);
    (*io)->dev = dev;
    return 0;
}

void io_destroy(struct io *io)
{
    io->ops->destroy(io);
}

// Messages of FUSE's kernel side, on a real device. The input is a list of them: opcode, flags, the length of
// what follows the header, and that. Every one that is whole is answered once, but for those that never are.

#include "fuzz.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../unit/fuse_kernel.h"

#define DEVICE_BYTES (64 * KiB + 777)

static struct device *devs[2]; // one on each kind of ring
static struct ring *main_ring;

static struct device *make_device(const char *ring_name)
{
    struct device_options options = {
        .name = "fuzz", .io = "buffered", .map = "linear", .nr_queues = 1, .depth = 8};
    int fd = memfd_create("disk", MFD_CLOEXEC);
    struct device *dev;
    struct err err;
    char path[40];

    must(fd >= 0 && !ftruncate(fd, DEVICE_BYTES));
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    options.ring = ring_choose(ring_name, &err);
    must(options.ring);
    must(!device_create(&dev, path, &options, &err));
    close(fd);
    return dev;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct err err;

    (void)argc;
    (void)argv;
    devs[0] = make_device("auto");
    devs[1] = make_device("threads");
    must(!ring_create(devs[0]->queues[0].ring->ops, &main_ring, &err));
    return 0;
}

static bool is_answered(const struct fuse_in_header *header)
{
    return header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET &&
           header->opcode != FUSE_INTERRUPT;
}

// The answer to each of uniques 1 to nr, once.
static void take_answers(struct kernel *kernel, bool *is_due, unsigned nr, unsigned nr_due)
{
    const struct fuse_out_header *out = (const struct fuse_out_header *)(const void *)kernel->in;

    for (; nr_due; nr_due--) {
        must(kernel_receive(kernel, KERNEL_PATIENCE_MS));
        must(out->unique >= 1 && out->unique <= nr && is_due[out->unique - 1]);
        must(!out->error || out->len == sizeof(*out));
        is_due[out->unique - 1] = false;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct kernel kernel;
    bool is_due[64] = {false};
    unsigned nr = 0, nr_due = 0;
    size_t at = 1;

    must(kernel_begin(&kernel, devs[len ? data[0] & 1 : 0], main_ring));
    while (at + 4 <= len && nr < ARRAY_SIZE(is_due)) {
        size_t args_bytes = min_of(data[at + 2] + 256UL * data[at + 3], len - at - 4);
        struct fuse_in_header header = {.len = (uint32_t)(sizeof(header) + args_bytes), .opcode = data[at]};
        bool is_whole = !(data[at + 1] & 1);

        args_bytes = min_of(args_bytes, KERNEL_PAYLOAD_BYTES);
        header.len = (uint32_t)(sizeof(header) + args_bytes);
        if (!is_whole)
            header.len += data[at + 1];
        header.unique = ++nr;
        header.nodeid = FUSE_ROOT_ID;
        is_due[nr - 1] = is_whole && is_answered(&header);
        nr_due += is_due[nr - 1];
        must(kernel_send(&kernel, header, data + at + 4, args_bytes));
        at += 4 + args_bytes;
    }
    take_answers(&kernel, is_due, nr, nr_due);
    must(!kernel_receive(&kernel, 0));
    must(kernel_end(&kernel));
    kernel_free(&kernel);
    return 0;
}

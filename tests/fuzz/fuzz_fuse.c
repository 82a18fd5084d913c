// Messages of FUSE's kernel side, on a real device. The input is a list of them: opcode, flags, the length of
// what follows the header, and that. Every one that is whole is answered once, but for those that never are.

#include "fuzz_device.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../unit/fuse_kernel.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    make_devices();
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

    must(kernel_begin(&kernel, devs[len ? data[0] & 1 : 0], the_main_ring));
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

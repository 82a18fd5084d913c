// The handshake: any bytes, cut in any way. The first byte says how they are cut.

#include "fuzz.h"

#include <string.h>

#include "core/device.h"
#include "transport/nbd/handshake.h"
#include "transport/nbd/proto.h"
#include "util/util.h"

#define MAX_OUT_BYTES 4096 // for one message

static char name_a[] = "a", name_b[] = "second";
static struct image writable, read_only = {.is_read_only = true};
static struct device a = {.name = name_a,
                          .image = &writable,
                          .limits = {MiB, 1, 4096, LIMITS_MAX_TRANSFER_BYTES}};
static struct device b = {.name = name_b, .image = &read_only, .limits = {4096, 512, 4096, 4096}};
static struct device *const devs[] = {&a, &b};

static bool is_ours(const struct device *dev)
{
    return dev == &a || dev == &b;
}

// One message as server.c has it looked at. Bytes used up.
static size_t look(struct nbd_handshake *handshake, const uint8_t *in, size_t in_len)
{
    enum nbd_mode mode = handshake->mode;
    uint8_t *exact = malloc(in_len + !in_len);
    size_t used;

    memcpy(exact, in, in_len);
    used = nbd_handshake_input(handshake, exact, in_len);
    free(exact);
    must(used <= in_len);
    must(handshake->out_len <= MAX_OUT_BYTES && handshake->out_len <= handshake->out_size);
    must(handshake->out_size <= 2 * MAX_OUT_BYTES);
    must(handshake->mode >= mode);
    must(handshake->state != NBD_HANDSHAKE_DONE || is_ours(handshake->dev));
    must(!handshake->meta_dev || is_ours(handshake->meta_dev));
    must(used || handshake->state != NBD_HANDSHAKE_GOES_ON || in_len < NBD_HANDSHAKE_IN_BYTES);
    must(used || !handshake->out_len);
    handshake->out_len = 0;
    return used;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct nbd_handshake handshake;
    uint8_t *in = malloc(NBD_HANDSHAKE_IN_BYTES);
    size_t in_len = 0, piece = len && data[0] ? data[0] : 1 << 16, used;

    must(!nbd_handshake_begin(&handshake, devs, ARRAY_SIZE(devs)));
    must(handshake.out_len == 18);
    handshake.out_len = 0;
    for (size_t at = len ? 1 : 0; at < len && handshake.state == NBD_HANDSHAKE_GOES_ON;) {
        size_t n = min_of(min_of(piece, len - at), NBD_HANDSHAKE_IN_BYTES - in_len);

        must(n);
        memcpy(in + in_len, data + at, n);
        at += n;
        in_len += n;
        do {
            used = look(&handshake, in, in_len);
            in_len -= used;
            memmove(in, in + used, in_len);
        } while (used && handshake.state == NBD_HANDSHAKE_GOES_ON);
    }
    nbd_handshake_end(&handshake);
    free(in);
    return 0;
}

// Fixed newstyle negotiation. Cold.

#include "transport/nbd/handshake.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "transport/nbd/proto.h"
#include "util/be.h"
#include "util/util.h"

#define OPTION_HEADER_BYTES 16

// len more bytes of out, or NULL: the connection cannot go on, state is CLOSE then.
static uint8_t *out_grow(struct nbd_handshake *handshake, size_t len)
{
    uint8_t *at;

    if (handshake->out_len + len > handshake->out_size) {
        size_t size = max_of(2 * handshake->out_size, handshake->out_len + len);
        uint8_t *out = realloc(handshake->out, size);

        if (!out) {
            handshake->state = NBD_HANDSHAKE_CLOSE;
            return NULL;
        }
        handshake->out = out;
        handshake->out_size = size;
    }
    at = handshake->out + handshake->out_len;
    handshake->out_len += len;
    return at;
}

// A reply with room for len bytes of data, which are returned.
static uint8_t *reply(struct nbd_handshake *handshake, uint32_t option, uint32_t type, size_t len)
{
    uint8_t *at = out_grow(handshake, 20 + len);

    if (!at)
        return NULL;
    be_put64(at, NBD_OPT_REPLY_MAGIC);
    be_put32(at + 8, option);
    be_put32(at + 12, type);
    be_put32(at + 16, (uint32_t)len);
    return at + 20;
}

static void reply_error(struct nbd_handshake *handshake, uint32_t option, uint32_t type, const char *why)
{
    uint8_t *data = reply(handshake, option, type, strlen(why));

    if (data)
        memcpy(data, why, strlen(why));
}

static struct device *find_export(const struct nbd_handshake *handshake, const void *name, size_t name_len)
{
    if (!name_len)
        return handshake->devs[0];
    for (unsigned i = 0; i < handshake->nr_devs; i++) {
        struct device *dev = handshake->devs[i];

        if (strlen(dev->name) == name_len && !memcmp(dev->name, name, name_len))
            return dev;
    }
    return NULL;
}

uint16_t nbd_transmission_flags(const struct device *dev, enum nbd_mode mode)
{
    // MULTI_CONN: a flush covers the writes of all connections (core/flush.c F1).
    unsigned flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;

    if (dev->image->is_read_only)
        flags |= NBD_FLAG_READ_ONLY;
    else
        flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    if (dev->durability.has_volatile_cache)
        flags |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
    if (mode != NBD_MODE_SIMPLE)
        flags |= NBD_FLAG_SEND_DF;
    return (uint16_t)flags;
}

// There is no way to answer an error here but to hang up.
static void option_export_name(struct nbd_handshake *handshake, const uint8_t *data, uint32_t len)
{
    struct device *dev = find_export(handshake, data, len);
    size_t reply_len = handshake->want_no_zeroes ? 10 : 10 + 124;
    uint8_t *at;

    if (!dev || handshake->mode == NBD_MODE_EXTENDED) {
        handshake->state = NBD_HANDSHAKE_CLOSE;
        return;
    }
    at = out_grow(handshake, reply_len);
    if (!at)
        return;
    memset(at, 0, reply_len);
    be_put64(at, dev->limits.size_bytes);
    be_put16(at + 8, nbd_transmission_flags(dev, handshake->mode));
    handshake->dev = dev;
    handshake->state = NBD_HANDSHAKE_DONE;
}

static void option_list(struct nbd_handshake *handshake, uint32_t option, uint32_t len)
{
    if (len) {
        reply_error(handshake, option, NBD_REP_ERR_INVALID, "LIST has no data");
        return;
    }
    for (unsigned i = 0; i < handshake->nr_devs; i++) {
        const char *name = handshake->devs[i]->name;
        uint8_t *at = reply(handshake, option, NBD_REP_SERVER, 4 + strlen(name));

        if (!at)
            return;
        be_put32(at, (uint32_t)strlen(name));
        memcpy(at + 4, name, strlen(name));
    }
    reply(handshake, option, NBD_REP_ACK, 0);
}

static void reply_info(struct nbd_handshake *handshake, uint32_t option, const struct device *dev,
                       uint16_t info)
{
    const struct limits *limits = &dev->limits;
    uint8_t *at;

    switch (info) {
    case NBD_INFO_EXPORT:
        at = reply(handshake, option, NBD_REP_INFO, 12);
        if (at) {
            be_put64(at + 2, limits->size_bytes);
            be_put16(at + 10, nbd_transmission_flags(dev, handshake->mode));
        }
        break;
    case NBD_INFO_NAME:
        at = reply(handshake, option, NBD_REP_INFO, 2 + strlen(dev->name));
        if (at)
            memcpy(at + 2, dev->name, strlen(dev->name));
        break;
    case NBD_INFO_BLOCK_SIZE:
        at = reply(handshake, option, NBD_REP_INFO, 14);
        if (at) {
            be_put32(at + 2, limits->min_block_bytes);
            be_put32(at + 6, limits->preferred_block_bytes);
            be_put32(at + 10, limits->max_transfer_bytes);
        }
        break;
    default:
        return;
    }
    if (at)
        be_put16(at, info);
}

// INFO and GO. "NBD_OPT_INFO": name length32, name, number of requests16, requests16 each.
static void option_go(struct nbd_handshake *handshake, uint32_t option, const uint8_t *data, uint32_t len)
{
    uint32_t name_len = len >= 6 ? be_get32(data) : UINT32_MAX;
    struct device *dev;
    unsigned nr_infos;
    bool is_name_wanted = false;

    if (len < 6 || name_len > len - 6 ||
        (nr_infos = be_get16(data + 4 + name_len)) * 2 != len - 6 - name_len) {
        reply_error(handshake, option, NBD_REP_ERR_INVALID, "lengths do not add up");
        return;
    }
    dev = find_export(handshake, data + 4, name_len);
    if (!dev) {
        reply_error(handshake, option, NBD_REP_ERR_UNKNOWN, "no such export");
        return;
    }
    for (unsigned i = 0; i < nr_infos; i++)
        is_name_wanted |= be_get16(data + 6 + name_len + i * 2) == NBD_INFO_NAME;
    reply_info(handshake, option, dev, NBD_INFO_EXPORT);
    reply_info(handshake, option, dev, NBD_INFO_BLOCK_SIZE);
    if (is_name_wanted)
        reply_info(handshake, option, dev, NBD_INFO_NAME);
    if (!reply(handshake, option, NBD_REP_ACK, 0) || option == NBD_OPT_INFO)
        return;
    handshake->dev = dev;
    handshake->state = NBD_HANDSHAKE_DONE;
}

static void option_mode(struct nbd_handshake *handshake, uint32_t option, uint32_t len, enum nbd_mode mode)
{
    if (len)
        reply_error(handshake, option, NBD_REP_ERR_INVALID, "this option has no data");
    else if (handshake->mode == mode)
        reply_error(handshake, option, NBD_REP_ERR_INVALID, "negotiated already");
    else if (handshake->mode > mode)
        reply_error(handshake, option, NBD_REP_ERR_EXT_HEADER_REQD,
                    "extended headers are negotiated already");
    else if (reply(handshake, option, NBD_REP_ACK, 0))
        handshake->mode = mode;
}

// "Metadata querying": an empty leaf name is a wildcard when listing only.
static bool query_matches(const uint8_t *query, uint32_t len, bool is_list)
{
    static const char name[] = NBD_CONTEXT_BASE_ALLOCATION;

    return (len == strlen(name) && !memcmp(query, name, len)) ||
           (is_list && len == strlen("base:") && !memcmp(query, "base:", len));
}

// Name length32, name, number of queries32, each length32 and text. Lengths are checked in full before
// anything is answered. -EINVAL, or whether base:allocation is asked for.
static int match_queries(const uint8_t *data, uint32_t len, bool is_list)
{
    uint32_t nr_queries;
    int found;

    nr_queries = be_get32(data);
    data += 4;
    len -= 4;
    found = is_list && !nr_queries;
    for (; nr_queries; nr_queries--) {
        uint32_t query_len = len >= 4 ? be_get32(data) : UINT32_MAX;

        if (len < 4 || query_len > len - 4)
            return -EINVAL;
        found |= query_matches(data + 4, query_len, is_list);
        data += 4 + query_len;
        len -= 4 + query_len;
    }
    return len ? -EINVAL : found;
}

static void option_meta_context(struct nbd_handshake *handshake, uint32_t option, const uint8_t *data,
                                uint32_t len)
{
    static const char name[] = NBD_CONTEXT_BASE_ALLOCATION;
    bool is_list = option == NBD_OPT_LIST_META_CONTEXT;
    uint32_t name_len = len >= 8 ? be_get32(data) : UINT32_MAX;
    struct device *dev;
    int found = -EINVAL;
    uint8_t *at;

    if (!is_list)
        handshake->meta_dev = NULL; // also when this one fails
    if (len >= 8 && name_len <= len - 8 && handshake->mode != NBD_MODE_SIMPLE)
        found = match_queries(data + 4 + name_len, len - 4 - name_len, is_list);
    if (found < 0) {
        reply_error(handshake, option, NBD_REP_ERR_INVALID,
                    handshake->mode == NBD_MODE_SIMPLE ? "negotiate structured replies first"
                                                       : "lengths do not add up");
        return;
    }
    dev = find_export(handshake, data + 4, name_len);
    if (!dev) {
        reply_error(handshake, option, NBD_REP_ERR_UNKNOWN, "no such export");
        return;
    }
    if (found) {
        at = reply(handshake, option, NBD_REP_META_CONTEXT, 4 + strlen(name));
        if (!at)
            return;
        be_put32(at, is_list ? 0 : NBD_CONTEXT_ID);
        memcpy(at + 4, name, strlen(name));
        if (!is_list)
            handshake->meta_dev = dev;
    }
    reply(handshake, option, NBD_REP_ACK, 0);
}

static void handle_option(struct nbd_handshake *handshake, uint32_t option, const uint8_t *data, uint32_t len)
{
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
        option_export_name(handshake, data, len);
        break;
    case NBD_OPT_ABORT:
        reply(handshake, option, NBD_REP_ACK, 0);
        handshake->state = NBD_HANDSHAKE_CLOSE;
        break;
    case NBD_OPT_LIST:
        option_list(handshake, option, len);
        break;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        option_go(handshake, option, data, len);
        break;
    case NBD_OPT_STRUCTURED_REPLY:
        option_mode(handshake, option, len, NBD_MODE_STRUCTURED);
        break;
    case NBD_OPT_EXTENDED_HEADERS:
        option_mode(handshake, option, len, NBD_MODE_EXTENDED);
        break;
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        option_meta_context(handshake, option, data, len);
        break;
    default:
        reply_error(handshake, option, NBD_REP_ERR_UNSUP, "unknown option");
    }
}

static size_t input_client_flags(struct nbd_handshake *handshake, const uint8_t *in, size_t in_len)
{
    uint32_t flags;

    if (in_len < 4)
        return 0;
    flags = be_get32(in);
    // "Newstyle negotiation": a server that does not know a flag must close the connection.
    if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))
        handshake->state = NBD_HANDSHAKE_CLOSE;
    handshake->want_no_zeroes = flags & NBD_FLAG_NO_ZEROES;
    handshake->has_client_flags = true;
    return 4;
}

size_t nbd_handshake_input(struct nbd_handshake *handshake, const uint8_t *in, size_t in_len)
{
    uint32_t option, len;

    if (!handshake->has_client_flags)
        return input_client_flags(handshake, in, in_len);
    if (handshake->skip_bytes) {
        size_t n = min_of(handshake->skip_bytes, in_len);

        handshake->skip_bytes -= n;
        return n;
    }
    if (in_len < OPTION_HEADER_BYTES)
        return 0;
    if (be_get64(in) != NBD_OPT_MAGIC) {
        handshake->state = NBD_HANDSHAKE_CLOSE;
        return in_len;
    }
    option = be_get32(in + 8);
    len = be_get32(in + 12);
    if (len > NBD_MAX_OPTION_BYTES) {
        if (option == NBD_OPT_EXPORT_NAME)
            handshake->state = NBD_HANDSHAKE_CLOSE;
        else
            reply_error(handshake, option, NBD_REP_ERR_TOO_BIG, "too much data");
        if (option == NBD_OPT_SET_META_CONTEXT)
            handshake->meta_dev = NULL;
        handshake->skip_bytes = len;
        return OPTION_HEADER_BYTES;
    }
    if (in_len < OPTION_HEADER_BYTES + len)
        return 0;
    handle_option(handshake, option, in + OPTION_HEADER_BYTES, len);
    return OPTION_HEADER_BYTES + len;
}

int nbd_handshake_begin(struct nbd_handshake *handshake, struct device *const *devs, unsigned nr_devs)
{
    uint8_t *at;

    *handshake = (struct nbd_handshake){.devs = devs, .nr_devs = nr_devs};
    at = out_grow(handshake, 18);
    if (!at)
        return -ENOMEM;
    be_put64(at, NBD_MAGIC);
    be_put64(at + 8, NBD_OPT_MAGIC);
    be_put16(at + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    return 0;
}

void nbd_handshake_end(struct nbd_handshake *handshake)
{
    free(handshake->out);
    handshake->out = NULL;
}

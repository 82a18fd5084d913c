// Reading request headers and naming errors: pure, hot.

#include <errno.h>

#include "transport/nbd/conn.h"
#include "util/be.h"

// "Request types": the flags that go with each. FUA goes with all ("Command flags").
static unsigned allowed_flags(uint16_t type, enum nbd_mode mode)
{
    switch (type) {
    case NBD_CMD_READ:
        return NBD_CMD_FLAG_FUA | (mode != NBD_MODE_SIMPLE ? NBD_CMD_FLAG_DF : 0);
    case NBD_CMD_WRITE:
        return NBD_CMD_FLAG_FUA | (mode == NBD_MODE_EXTENDED ? NBD_CMD_FLAG_PAYLOAD_LEN : 0);
    case NBD_CMD_WRITE_ZEROES:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
    default:
        return NBD_CMD_FLAG_FUA;
    }
}

static int request_check(const struct nbd_request *request, enum nbd_mode mode, bool has_meta_context)
{
    if (request->flags & ~allowed_flags(request->type, mode))
        return -EINVAL;
    switch (request->type) {
    case NBD_CMD_READ:
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM:
    case NBD_CMD_CACHE:
    case NBD_CMD_WRITE_ZEROES:
    case NBD_CMD_DISC:
        return 0;
    case NBD_CMD_FLUSH: // offset and length are reserved
        return request->offset_bytes || request->len_bytes ? -EINVAL : 0;
    case NBD_CMD_BLOCK_STATUS:
        return has_meta_context && request->len_bytes ? 0 : -EINVAL;
    default:
        return -EINVAL;
    }
}

int nbd_request_parse(const uint8_t *head, enum nbd_mode mode, bool has_meta_context,
                      struct nbd_request *request)
{
    bool is_extended = mode == NBD_MODE_EXTENDED;

    if (be_get32(head) != (is_extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC))
        return -EBADMSG;
    request->flags = be_get16(head + 4);
    request->type = be_get16(head + 6);
    request->cookie = be_get64(head + 8);
    request->offset_bytes = be_get64(head + 16);
    request->len_bytes = is_extended ? be_get64(head + 24) : be_get32(head + 24);
    request->error = request_check(request, mode, has_meta_context);
    // A write without PAYLOAD_LEN breaks the rules of extended headers, yet cannot mean anything else.
    request->payload_bytes =
        request->type == NBD_CMD_WRITE || (is_extended && (request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
            ? request->len_bytes
            : 0;
    return 0;
}

uint32_t nbd_error(int error)
{
    switch (-error) {
    case 0:
        return 0;
    case EPERM:
    case EACCES:
    case EROFS:
        return NBD_EPERM;
    case ENOMEM:
        return NBD_ENOMEM;
    case EINVAL:
        return NBD_EINVAL;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return NBD_ENOSPC;
    case EOVERFLOW:
        return NBD_EOVERFLOW;
    case EOPNOTSUPP:
        return NBD_ENOTSUP;
    default:
        return NBD_EIO;
    }
}

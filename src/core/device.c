// The checks at the device's door. Hot; lifecycle.c is the cold part.

#include "core/device.h"

#include <errno.h>

#include "core/rq.h"

int device_check(const struct limits *limits, const struct rq *rq)
{
    if (rq->op == REQ_OP_FLUSH)
        return 0;
    if (rq_is_write(rq) && limits->is_read_only)
        return -EPERM;
    if (rq->offset_bytes > limits->size_bytes || rq->len_bytes > limits->size_bytes - rq->offset_bytes)
        return rq->op == REQ_OP_WRITE || rq->op == REQ_OP_WRITE_ZEROES ? -ENOSPC : -EINVAL;
    if ((rq->offset_bytes | rq->len_bytes) & (limits->min_block_bytes - 1))
        return -EINVAL;
    if ((rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE) && rq->len_bytes > limits->max_transfer_bytes)
        return -EINVAL;
    return 0;
}

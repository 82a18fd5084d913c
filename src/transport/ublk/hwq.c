// What the kernel asks for, as requests. Hot.

#include <errno.h>

#include "core/device.h"
#include "transport/ublk/ublk.h"
#include "util/util.h"

static void hwq_send(struct ublk_rq *urq, uint32_t cmd_op)
{
    urq->op.cmd.op = cmd_op;
    ring_queue(urq->hwq->queue->ring, &urq->op);
}

static void hwq_commit(struct ublk_rq *urq, int result)
{
    urq->cmd.result = result;
    urq->hwq->queue->ring->nr_answered++;
    hwq_send(urq, urq->hwq->commit_op);
}

static void hwq_rq_done(struct rq *rq)
{
    struct ublk_rq *urq = container_of(rq, struct ublk_rq, rq);
    bool has_data = rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE;

    hwq_commit(urq, rq->error ? rq->error : has_data ? (int)rq->len_bytes : 0);
}

// B4. 0, or what the request is to be answered.
static int hwq_parse(struct ublk_rq *urq, struct ublk_io_desc desc)
{
    struct rq *rq = &urq->rq;

    rq->flags = 0;
    rq->offset_bytes = desc.start_sector * SECTOR_BYTES;
    rq->len_bytes = (uint64_t)desc.nr_sectors * SECTOR_BYTES;
    if (desc.op_flags & UBLK_IO_F_FUA)
        rq->flags |= RQ_FUA;
    switch (desc.op_flags & 0xff) {
    case UBLK_OP_READ:
        rq->op = REQ_OP_READ;
        rq->flags = 0;
        break;
    case UBLK_OP_WRITE:
        rq->op = REQ_OP_WRITE;
        break;
    case UBLK_OP_FLUSH: // its sector means nothing
        rq->op = REQ_OP_FLUSH;
        rq->flags = 0;
        rq->offset_bytes = rq->len_bytes = 0;
        return 0;
    case UBLK_OP_DISCARD:
        rq->op = REQ_OP_DISCARD;
        break;
    case UBLK_OP_WRITE_ZEROES:
        rq->op = REQ_OP_WRITE_ZEROES;
        if (desc.op_flags & UBLK_IO_F_NOUNMAP)
            rq->flags |= RQ_NOUNMAP;
        break;
    default:
        return -EOPNOTSUPP;
    }
    if (desc.start_sector > UINT64_MAX / SECTOR_BYTES)
        return -EINVAL;
    if (rq->op <= REQ_OP_WRITE && (!rq->len_bytes || rq->len_bytes > urq->hwq->max_io_bytes))
        return -EINVAL;
    return 0;
}

void ublk_hwq_fetched(struct ring_op *op, int res)
{
    struct ublk_rq *urq = container_of(op, struct ublk_rq, op);
    struct ublk_hwq *hwq = urq->hwq;
    struct rq *rq = &urq->rq;

    if (res) { // B3
        if (res != -ENODEV && !hwq->error)
            hwq->error = res < 0 ? res : -EPROTO;
        if (!--hwq->nr_tags)
            ublk_hwq_end(hwq);
        return;
    }
    res = hwq_parse(urq, hwq->descs[rq->tag]);
    if (res < 0) {
        hwq_commit(urq, res);
        return;
    }
    urq->iov = (struct iovec){hwq->bufs + (size_t)rq->tag * hwq->max_io_bytes, rq->len_bytes};
    rq->iov = &urq->iov;
    rq->nr_iov = 1;
    rq->buf_index = -1;
    rq->done = hwq_rq_done;
    queue_submit(hwq->queue, rq);
}

void ublk_hwq_start(struct ring_op *op, int res)
{
    struct ublk_hwq *hwq = container_of(op, struct ublk_hwq, start_op);

    (void)res;
    for (unsigned i = 0; i < hwq->depth; i++)
        hwq_send(&hwq->rqs[i], hwq->fetch_op);
}

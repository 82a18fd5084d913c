// What the kernel asks for, as requests. Hot.

#include <errno.h>
#include <unistd.h>

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

static char *hwq_buf(const struct ublk_rq *urq)
{
    return urq->hwq->bufs + (size_t)urq->rq.tag * urq->hwq->max_io_bytes;
}

// Between the request and the tag's memory, from from_bytes to the end.
static int hwq_copy(struct ublk_rq *urq, uint64_t from_bytes)
{
    const struct ublk_hwq *hwq = urq->hwq;
    uint64_t pos = UBLK_DATA_OFFSET + ((uint64_t)hwq->index << UBLK_DATA_QUEUE_SHIFT) +
                   ((uint64_t)urq->rq.tag << UBLK_DATA_TAG_SHIFT);

    while (from_bytes < urq->rq.len_bytes) {
        char *buf = hwq_buf(urq) + from_bytes;
        size_t left_bytes = urq->rq.len_bytes - from_bytes;
        ssize_t ret = urq->rq.op == REQ_OP_READ ? pwrite(hwq->fd, buf, left_bytes, (off_t)(pos + from_bytes))
                                                : pread(hwq->fd, buf, left_bytes, (off_t)(pos + from_bytes));

        if (ret < 0 && errno == EINTR)
            continue;
        if (ret <= 0)
            return ret < 0 ? -errno : -EIO;
        from_bytes += (uint64_t)ret;
    }
    return 0;
}

// B7; what is before iov has been moved without us.
static int hwq_give_memory(struct rq *rq)
{
    struct ublk_rq *urq = container_of(rq, struct ublk_rq, rq);
    uint64_t from_bytes = (uintptr_t)urq->iov.iov_base;

    urq->iov.iov_base = hwq_buf(urq) + from_bytes;
    if (rq->op == REQ_OP_WRITE)
        return hwq_copy(urq, from_bytes);
    urq->is_copied = true;
    urq->copied_from_bytes = from_bytes;
    return 0;
}

static void hwq_rq_done(struct rq *rq)
{
    struct ublk_rq *urq = container_of(rq, struct ublk_rq, rq);
    bool has_data = rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE;
    int error = rq->error;

    if (!error && urq->is_copied)
        error = hwq_copy(urq, urq->copied_from_bytes);
    hwq_commit(urq, error ? error : has_data ? (int)rq->len_bytes : 0);
}

// The request's data: pages that the kernel has, or has copied to or will copy from the tag's memory.
static int hwq_take_data(struct ublk_rq *urq, bool is_registered)
{
    struct rq *rq = &urq->rq;

    urq->iov = (struct iovec){hwq_buf(urq), rq->len_bytes};
    rq->iov = &urq->iov;
    rq->nr_iov = 1;
    rq->buf_index = -1;
    rq->give_memory = NULL;
    urq->is_copied = false;
    if (!urq->hwq->is_zero_copy || rq->op > REQ_OP_WRITE)
        return 0;
    urq->iov.iov_base = NULL;
    rq->give_memory = hwq_give_memory;
    if (!is_registered)
        return rq_need_memory(rq);
    rq->buf_index = (int16_t)(urq->hwq->first_buf + rq->tag);
    return 0;
}

// 0, or what the request is to be answered.
static int hwq_parse(struct ublk_rq *urq, const struct ublk_io_desc *desc)
{
    struct rq *rq = &urq->rq;

    rq->flags = 0;
    rq->offset_bytes = desc->start_sector * SECTOR_BYTES;
    rq->len_bytes = (uint64_t)desc->nr_sectors * SECTOR_BYTES;
    if (desc->op_flags & UBLK_IO_F_FUA)
        rq->flags |= RQ_FUA;
    switch (desc->op_flags & 0xff) {
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
        if (desc->op_flags & UBLK_IO_F_NOUNMAP)
            rq->flags |= RQ_NOUNMAP;
        break;
    default:
        return -EOPNOTSUPP;
    }
    if (desc->start_sector > UINT64_MAX / SECTOR_BYTES)
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
    struct ublk_io_desc desc;

    if (res) { // B3
        if (res != -ENODEV && !hwq->error)
            hwq->error = res < 0 ? res : -EPROTO;
        if (!--hwq->nr_tags)
            ublk_hwq_end(hwq);
        return;
    }
    desc = hwq->descs[rq->tag]; // B4
    res = hwq_parse(urq, &desc);
    if (!res)
        res = hwq_take_data(urq, !(desc.op_flags & UBLK_IO_F_NEED_REG_BUF));
    if (res < 0) {
        hwq_commit(urq, res);
        return;
    }
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

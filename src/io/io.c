// The wrappers around an io's ops, and what ios share. Hot; io_table.c is the cold part.

#include "io/io.h"

#include <assert.h>
#include <errno.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "ring/workers.h"
#include "util/util.h"

void io_rw(struct io *io, struct rq *rq)
{
    int ret = io->ops->takes_bufs ? 0 : rq_need_memory(rq);

    assert(rq->ext.state == EXTENT_MAPPED && rq->ext.len_bytes && rq->part_nr_iov);
    if (__builtin_expect(ret < 0, 0))
        rq_part_done(rq, ret);
    else
        io->ops->rw(io, rq);
}

void io_flush(struct io *io, struct rq *rq)
{
    assert(rq->op == REQ_OP_FLUSH && rq->ring_op.done);
    io->ops->flush(io, rq);
}

void io_submit_other(struct io *io, struct rq *rq)
{
    assert(rq->op == REQ_OP_DISCARD || rq->op == REQ_OP_WRITE_ZEROES || rq->op == REQ_OP_PREFETCH);
    io->ops->other(io, rq);
}

// Workers need memory; and this is what the kernel says where the file cannot take a buffer without.
static bool io_retries_without_buf(int res)
{
    return io_is_retried(res) || res == -EINVAL || res == -EFAULT || res == -EOPNOTSUPP;
}

void io_rw_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (res < 0 && rq->give_memory) {
        int ret = io_retries_without_buf(res) ? rq_need_memory(rq) : res;

        if (ret < 0) {
            res = ret;
        } else if (!io_is_retried(res)) {
            io_rw(rq->queue->dev->io, rq);
            return;
        }
    }
    if (io_is_retried(res)) {
        // Nothing has moved: once more, where it may block.
        workers_submit(op);
        return;
    }
    if (res < 0 && op->code == RING_WRITE)
        flush_write_failed(rq, res);
    rq_part_done(rq, res);
}

void io_prep_rw(struct rq *rq, void (*done)(struct ring_op *op, int res))
{
    struct ring_op *op = &rq->ring_op;
    bool is_write = rq->op == REQ_OP_WRITE;

    op->done = done;
    op->code = is_write ? RING_WRITE : RING_READ;
    op->fd = rq->ext.fd;
    op->rw_flags = is_write ? flush_rw_flags(rq) : 0;
    op->buf_index = rq->buf_index;
    op->rw.iov = rq->iov;
    op->rw.nr_iov = rq->part_nr_iov;
    op->rw.offset_bytes = rq->ext.offset_bytes;
    op->ring = rq->queue->ring;
}

void io_queue_rw(struct rq *rq, void (*done)(struct ring_op *op, int res))
{
    io_prep_rw(rq, done);
    ring_queue(rq->queue->ring, &rq->ring_op);
}

void io_queue_fsync(struct io *io, struct rq *rq)
{
    rq->ring_op.code = RING_FSYNC;
    (void)io;
    rq->ring_op.fd = rq->ext.fd;
    ring_queue(rq->queue->ring, &rq->ring_op);
}

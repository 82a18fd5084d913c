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
    assert(rq->ext.state == EXTENT_MAPPED && rq->ext.len_bytes && rq->part_nr_iov);
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

void io_rw_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (res == -EINTR || res == -EAGAIN) {
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

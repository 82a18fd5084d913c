// buffered: through the kernel's page cache.
//
//  U1. Reads are tried without blocking on the queue's own thread (RWF_NOWAIT): what is cached costs a
//      copy and no switch. What is not goes to the ring, many at once.
//  U2. Writes to one file only fight for its lock: one worker hands them to the kernel in the order in
//      which they came (writer.c). A write is first tried without blocking, but not while others are
//      queued: it would overtake them, and fail for the lock anyway.
//  U3. With one worker (--workers 1) everything goes through that thread in order: the loop driver as
//      it was, the baseline to compare with.

#include <errno.h>
#include <fcntl.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "io/io.h"
#include "io/writer.h"
#include "io/zero.h"
#include "ring/workers.h"
#include "util/util.h"

// More than this is a long copy, for which the other requests of the queue would have to wait.
#define NOWAIT_MAX_BYTES (256 * 1024)

struct buffered {
    struct io io;
    bool is_single;                                      // U3
    atomic_bool cannot_read_nowait, cannot_write_nowait; // the file system has none; latched
    struct writer writer;
};

static int buffered_try_nowait(const struct ring_op *op)
{
    int flags = op->rw_flags | RWF_NOWAIT;
    ssize_t n;

    if (op->code == RING_READ)
        n = preadv2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, flags);
    else
        n = pwritev2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, flags);
    return n < 0 ? -errno : (int)n;
}

static void buffered_read(struct buffered *buffered, struct rq *rq)
{
    int res = -EAGAIN;

    if (rq_part_bytes(rq) <= NOWAIT_MAX_BYTES &&
        !atomic_load_explicit(&buffered->cannot_read_nowait, memory_order_relaxed))
        res = buffered_try_nowait(&rq->ring_op); // U1
    if (res == -EOPNOTSUPP)
        atomic_store(&buffered->cannot_read_nowait, true);
    if (res > 0)
        rq_part_done(rq, res);
    else // 0 as well: the end of the file is looked for where it may block
        ring_queue(rq->queue->ring, &rq->ring_op);
}

static void buffered_write(struct buffered *buffered, struct rq *rq)
{
    if (!atomic_load_explicit(&buffered->cannot_write_nowait, memory_order_relaxed) &&
        !rq->ring_op.rw_flags && rq_part_bytes(rq) <= NOWAIT_MAX_BYTES && writer_is_idle(&buffered->writer)) {
        int res = buffered_try_nowait(&rq->ring_op); // U2

        if (res > 0) {
            rq_part_done(rq, res);
            return;
        }
        if (res == -EOPNOTSUPP)
            atomic_store(&buffered->cannot_write_nowait, true);
    }
    writer_queue(&buffered->writer, rq);
}

static void buffered_rw(struct io *io, struct rq *rq)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    io_prep_rw(rq, io_rw_done);
    if (buffered->is_single)
        workers_submit(&rq->ring_op);
    else if (rq->op == REQ_OP_READ)
        buffered_read(buffered, rq);
    else
        buffered_write(buffered, rq);
}

static void buffered_flush(struct io *io, struct rq *rq)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    if (!buffered->is_single) {
        io_queue_fsync(io, rq);
        return;
    }
    rq->ring_op.code = RING_FSYNC;
    rq->ring_op.fd = io->dev->image.fd;
    rq->ring_op.ring = rq->queue->ring;
    workers_submit(&rq->ring_op);
}

static int buffered_prefetch_work(struct rq *rq)
{
    const struct image *image = &rq->queue->dev->image;

    if (!rq->len_bytes) // would mean the rest of the file
        return 0;
    return -posix_fadvise(image->fd, (off_t)(image->offset_bytes + rq->offset_bytes), (off_t)rq->len_bytes,
                          POSIX_FADV_WILLNEED);
}

static void buffered_other(struct io *io, struct rq *rq)
{
    (void)io;
    rq_call_worker(rq, rq->op == REQ_OP_PREFETCH ? buffered_prefetch_work : zero_work, rq_work_done);
}

static int buffered_init(struct io *io, const char *spec, struct err *err)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    (void)spec;
    (void)err;
    buffered->is_single = workers_max() == 1;
    writer_init(&buffered->writer);
    return 0;
}

const struct io_ops io_buffered_ops = {
    .name = "buffered",
    .is_stored = true,
    .io_bytes = sizeof(struct buffered),
    .init = buffered_init,
    .rw = buffered_rw,
    .flush = buffered_flush,
    .other = buffered_other,
};

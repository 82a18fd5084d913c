// null: reads are zeroes, writes are forgotten. Measures the core and the transport alone.

#include <string.h>

#include "core/queue.h"
#include "io/io.h"

static void null_rw(struct io *io, struct rq *rq)
{
    (void)io;
    if (rq->op == REQ_OP_READ) {
        for (unsigned i = 0; i < rq->part_nr_iov; i++)
            memset(rq->iov[i].iov_base, 0, rq->iov[i].iov_len);
    }
    // Parts are at most as long as a transfer (core/limits.h): an int holds them.
    rq_part_done(rq, (int)rq_part_bytes(rq));
}

static void null_flush(struct io *io, struct rq *rq)
{
    (void)io;
    rq->ring_op.done(&rq->ring_op, 0);
}

static void null_other(struct io *io, struct rq *rq)
{
    (void)io;
    rq_end(rq, 0);
}

const struct io_ops io_null_ops = {
    .name = "null",
    .is_stored = false,
    .io_bytes = sizeof(struct io),
    .rw = null_rw,
    .flush = null_flush,
    .other = null_other,
};

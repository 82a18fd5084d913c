// FLUSH and FUA.
//
//  F1. FLUSH covers every write that was complete when it was submitted: all of them have been handed
//      to the kernel by then, and fdatasync covers all that the kernel has of the file, whichever
//      queue or connection wrote it.
//  F2. An fsync that failed is never retried as if it had succeeded: the kernel may have dropped the
//      dirty pages and marked them clean. The first failure stays with the device.
//  F3. FUA on a write is RWF_DSYNC: that write alone, no neighbour pays.

#include "core/flush.h"

#include <errno.h>
#include <stdatomic.h>

#include "core/device.h"
#include "core/queue.h"
#include "io/io.h"
#include "util/util.h"

struct durability flush_durability(const struct durability_in *in)
{
    // Nothing is written, nothing is kept, or all is on the disk before a write is complete.
    if (in->is_read_only || !in->is_stored || (in->is_sync && !in->has_writeback))
        return (struct durability){false, FLUSH_NOTHING, FUA_NOTHING};
    // Direct I/O as well: the disk below has a cache, and a file has metadata.
    return (struct durability){true, FLUSH_FDATASYNC, FUA_DSYNC};
}

void flush_failed(struct device *dev, int error)
{
    int none = 0;

    atomic_compare_exchange_strong(&dev->flush_error, &none, error);
}

// The kernel does not say whether it was the write or its fsync. Direct: what is full says so before
// anything is synced. Buffered: the pages of earlier writes may be the ones that found no space.
void flush_write_failed(const struct rq *rq, int error)
{
    struct device *dev = rq->queue->dev;

    if (flush_rw_flags(rq) && (error == -EIO || !dev->image->is_direct))
        flush_failed(dev, error); // F2
}

static void flush_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (res < 0)
        flush_failed(rq->queue->dev, res); // F2
    else
        res = atomic_load(&rq->queue->dev->flush_error); // one that failed meanwhile
    rq_end(rq, res);
}

void flush_submit(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    int error = atomic_load_explicit(&dev->flush_error, memory_order_relaxed);

    if (error || dev->durability.flush == FLUSH_NOTHING) {
        rq_end(rq, error);
        return;
    }
    rq->ring_op.done = flush_done;
    io_flush(dev->io, rq); // F1
}

int flush_rw_flags(const struct rq *rq)
{
    const struct device *dev = rq->queue->dev;

    return (rq->flags & RQ_FUA) && dev->durability.fua == FUA_DSYNC ? RWF_DSYNC : 0; // F3
}

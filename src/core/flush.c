// FLUSH and FUA.
//
//  F1. FLUSH covers every write that was complete when it was submitted: all of them have been handed
//      to the kernel by then, and fdatasync covers all that the kernel has of the file, whichever
//      queue or connection wrote it.
//  F2. An fsync that failed is never retried as if it had succeeded: the kernel may have dropped the
//      dirty pages and marked them clean. The first failure stays with the device.
//  F3. FUA on a write is RWF_DSYNC: that write alone, no neighbour pays.
//  F4. Where writes go both ways, FLUSH is fdatasync of the image first, when it was written to, and a flush
//      of the device last, always: what the image's fdatasync has the file system write, its journal
//      included, is in the device's cache by then whether or not the file system asks for a flush (mounted
//      with nobarrier it does not). nr_synced says how many of nr_image_writes, counted when they are
//      complete, an fdatasync that is over has covered: one that is on its way spares nobody his own.

#include "core/flush.h"

#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "io/io.h"
#include "map/map.h"
#include "util/util.h"

struct durability flush_durability(const struct durability_in *in)
{
    // Nothing is written, nothing is kept, or all is on the disk before a write is complete.
    if (in->is_read_only || !in->is_stored || (in->is_sync && !in->has_writeback && !in->has_device_fd))
        return (struct durability){false, FLUSH_NOTHING, FUA_NOTHING};
    // Direct I/O as well: the disk below has a cache, and a file has metadata.
    return (struct durability){true, in->has_device_fd ? FLUSH_BOTH : FLUSH_FDATASYNC, FUA_DSYNC};
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

void flush_note_write(const struct rq *rq)
{
    struct device *dev = rq->queue->dev;

    if (dev->durability.flush == FLUSH_BOTH && (rq->op != REQ_OP_WRITE || rq->ext.fd == dev->image->fd))
        atomic_fetch_add(&dev->nr_image_writes, 1); // F4
}

static void flush_note_sync(struct device *dev, uint64_t nr_writes)
{
    uint64_t nr_synced = atomic_load(&dev->nr_synced);

    while (nr_synced < nr_writes && !atomic_compare_exchange_weak(&dev->nr_synced, &nr_synced, nr_writes))
        ;
}

static void flush_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (res < 0)
        flush_failed(rq->queue->dev, res); // F2
    else
        res = atomic_load(&rq->queue->dev->flush_error); // one that failed meanwhile
    rq_ran(rq, res);
}

static void flush_fd(struct rq *rq, int fd, void (*done)(struct ring_op *op, int res))
{
    rq->ext.fd = fd;
    rq->ring_op.done = done;
    io_flush(rq->queue->dev->io, rq); // F1
}

static void flush_image_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);
    struct device *dev = rq->queue->dev;

    if (res < 0) {
        flush_done(op, res);
        return;
    }
    flush_note_sync(dev, rq->ext.offset_bytes);
    flush_fd(rq, dev->map->device_fd, flush_done); // F4
}

void flush_submit(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    int error = atomic_load_explicit(&dev->flush_error, memory_order_relaxed);

    if (error || dev->durability.flush == FLUSH_NOTHING) {
        rq_ran(rq, error);
    } else if (dev->durability.flush == FLUSH_FDATASYNC) {
        flush_fd(rq, dev->image->fd, flush_done);
    } else {
        rq->ext.offset_bytes = atomic_load(&dev->nr_image_writes); // a FLUSH has no other use for it
        if (rq->ext.offset_bytes == atomic_load(&dev->nr_synced))
            flush_fd(rq, dev->map->device_fd, flush_done);
        else
            flush_fd(rq, dev->image->fd, flush_image_done);
    }
}

int flush_all(struct device *dev)
{
    uint64_t nr_writes = atomic_load(&dev->nr_image_writes);
    int ret;

    if (dev->durability.flush == FLUSH_NOTHING || atomic_load(&dev->flush_error))
        return atomic_load(&dev->flush_error);
    ret = fdatasync(dev->image->fd) < 0 ? -errno : map_sync(dev->map); // F4
    if (ret < 0)
        flush_failed(dev, ret);
    else
        flush_note_sync(dev, nr_writes);
    return atomic_load(&dev->flush_error);
}

int flush_rw_flags(const struct rq *rq)
{
    const struct device *dev = rq->queue->dev;

    return (rq->flags & RQ_FUA) && dev->durability.fua == FUA_DSYNC ? RWF_DSYNC : 0; // F3
}

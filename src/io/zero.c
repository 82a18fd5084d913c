// How zeroes are made and space is given back, by what the file below can do. Cold: on a worker.
//
// WRITE_ZEROES, in this order, each tried until the file says that it cannot (latched in struct io):
//   1. PUNCH_HOLE, unless NOUNMAP: reads as zeroes, gives the space back. On a block device the kernel
//      does it only where the device itself can, so it is fast there too.
//   2. ZERO_RANGE: zeroes that stay allocated. Not on a block device under FAST_ZERO: the kernel falls
//      back to writing them there without a word.
//   3. Writing zeroes; not under FAST_ZERO, which is answered with -EOPNOTSUPP. But for the edges: who is
//      refused them takes it that there are no fast zeroes here at all (the kernel's loop device does).
// DISCARD: PUNCH_HOLE of the whole blocks in the range (BLKDISCARD on a block device), else nothing:
// it is a hint.

#include "io/zero.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "io/bounce.h"
#include "io/io.h"
#include "util/util.h"

// EINVAL is not latched: it may be for this range only.
static bool cannot(int error, atomic_bool *latch)
{
    if (error == -EOPNOTSUPP || error == -ENOTTY)
        atomic_store(latch, true);
    return error == -EOPNOTSUPP || error == -ENOTTY || error == -EINVAL;
}

static int do_fallocate(const struct image *image, int mode, uint64_t offset, uint64_t len)
{
    int ret;

    do {
        ret = fallocate(image->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : 0;
}

// 0, a real error, or -EOPNOTSUPP: the kernel will not do this for us.
static int zero_by_fallocate(struct io *io, const struct rq *rq, uint64_t offset, uint64_t len)
{
    const struct image *image = io->dev->image;
    int ret;

    if (!(rq->flags & RQ_NOUNMAP) && !atomic_load(&io->cannot_punch)) {
        ret = do_fallocate(image, FALLOC_FL_PUNCH_HOLE, offset, len);
        if (!cannot(ret, &io->cannot_punch))
            return ret;
    }
    if (!atomic_load(&io->cannot_zero_range) && !(image->is_block_device && (rq->flags & RQ_FAST_ZERO))) {
        ret = do_fallocate(image, FALLOC_FL_ZERO_RANGE, offset, len);
        if (!cannot(ret, &io->cannot_zero_range))
            return ret;
    }
    return -EOPNOTSUPP;
}

// What lies beside whole sectors is written, but for a hole, which is left one.
static int zero_edge(const struct rq *rq, uint64_t offset, uint64_t end)
{
    const struct image *image = rq->queue->dev->image;
    off_t data;

    if (offset == end)
        return 0;
    if (!(rq->flags & RQ_NOUNMAP)) {
        data = lseek(image->fd, (off_t)offset, SEEK_DATA);
        if (data < 0 ? errno == ENXIO : (uint64_t)data >= end)
            return 0;
    }
    return bounce_write_zeroes(image, offset, end - offset, flush_rw_flags(rq));
}

static int zero_write_zeroes(struct io *io, const struct rq *rq, uint64_t offset, uint64_t len)
{
    const struct image *image = io->dev->image;
    uint64_t align = image->sector_bytes;
    uint64_t end = offset + len, first = round_up(offset, align), last = round_down(end, align);
    int ret;

    if (first >= last)
        return (rq->flags & RQ_FAST_ZERO) && atomic_load(&io->cannot_punch) ? -EOPNOTSUPP
                                                                            : zero_edge(rq, offset, end);
    ret = zero_by_fallocate(io, rq, first, last - first);
    if (ret == -EOPNOTSUPP && !(rq->flags & RQ_FAST_ZERO))
        return bounce_write_zeroes(image, offset, len, flush_rw_flags(rq));
    if (!ret)
        ret = zero_edge(rq, offset, first);
    if (!ret)
        ret = zero_edge(rq, last, end);
    return ret;
}

static int zero_discard(struct io *io, uint64_t offset, uint64_t len)
{
    const struct image *image = io->dev->image;
    uint64_t align = max_of(image->dio_offset_align, image->sector_bytes);
    uint64_t first = round_up(offset, align), last = round_down(offset + len, align);
    uint64_t range[2] = {first, last - first};
    int ret;

    if (first >= last || atomic_load(&io->cannot_discard))
        return 0;
    if (image->is_block_device)
        ret = ioctl(image->fd, BLKDISCARD, range) < 0 ? -errno : 0;
    else
        ret = do_fallocate(image, FALLOC_FL_PUNCH_HOLE, first, last - first);
    return cannot(ret, &io->cannot_discard) ? 0 : ret;
}

int zero_work(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    uint64_t offset = dev->image->offset_bytes + rq->offset_bytes;
    int ret;

    if (!rq->len_bytes)
        return 0;
    if (rq->op == REQ_OP_DISCARD)
        ret = zero_discard(dev->io, offset, rq->len_bytes);
    else
        ret = zero_write_zeroes(dev->io, rq, offset, rq->len_bytes);
    if (!ret && (rq->flags & RQ_FUA) && dev->durability.fua == FUA_DSYNC) {
        ret = fdatasync(dev->image->fd) < 0 ? -errno : map_sync(dev->map); // F4 of flush.c
        if (ret < 0)
            flush_failed(dev, ret); // F2
    }
    flush_note_write(rq); // also when it failed: some of it may have been done
    return ret;
}

#include "core/block_status.h"

#include "core/device.h"
#include "core/queue.h"
#include "util/util.h"
#include "writeback/writeback.h"

static int extent_look_up(struct device *dev, uint64_t at, uint64_t end, struct extent *ext)
{
    uint64_t len = end - at;

    // What is cached is not below yet; what is not, is.
    if (dev->writeback && writeback_extent(dev->writeback, at, &len, ext))
        return 0;
    return map_extent(dev->map, at, len, false, true, ext);
}

// A client that has blocks is told of whole ones: where two states meet in a block, it is data.
static int extent_end_with_block(struct device *dev, uint64_t end, uint64_t block_bytes, struct extent *ext)
{
    uint64_t next = ext->start_bytes + ext->len_bytes;
    struct extent more;
    int ret;

    for (; next < end && next % block_bytes; next += more.len_bytes) {
        ret = extent_look_up(dev, next, end, &more);
        if (ret < 0)
            return ret;
        if (more.state != ext->state) {
            if (ext->state == EXTENT_MAPPED || round_down(next, block_bytes) == ext->start_bytes) {
                ext->state = EXTENT_MAPPED;
                next += block_bytes;
            }
            next = round_down(next, block_bytes);
            break;
        }
    }
    ext->len_bytes = next - ext->start_bytes;
    return 0;
}

int block_status_work(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    struct extent *exts = rq->iov[0].iov_base;
    unsigned max_extents = (unsigned)(rq->iov[0].iov_len / sizeof(*exts));
    uint64_t at = rq->offset_bytes, end = at + rq->len_bytes;

    rq->nr_extents = 0;
    while (at < end) {
        struct extent ext, *last = rq->nr_extents ? &exts[rq->nr_extents - 1] : NULL;
        int ret = extent_look_up(dev, at, end, &ext);

        if (!ret)
            ret = extent_end_with_block(dev, end, rq->queue->limits.min_block_bytes, &ext);
        if (ret < 0)
            return ret;
        if (last && last->state == ext.state) {
            last->len_bytes += ext.len_bytes;
        } else {
            if (rq->nr_extents == max_extents || (last && (rq->flags & RQ_ONE_EXTENT)))
                break;
            exts[rq->nr_extents++] = ext;
        }
        at += ext.len_bytes;
    }
    return 0;
}

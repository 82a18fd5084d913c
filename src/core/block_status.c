#include "core/block_status.h"

#include "core/device.h"
#include "core/queue.h"
#include "writeback/writeback.h"

int block_status_work(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    struct extent *exts = rq->iov[0].iov_base;
    unsigned max_extents = (unsigned)(rq->iov[0].iov_len / sizeof(*exts));
    uint64_t at = rq->offset_bytes, end = at + rq->len_bytes;

    rq->nr_extents = 0;
    while (at < end) {
        struct extent ext, *last = rq->nr_extents ? &exts[rq->nr_extents - 1] : NULL;
        uint64_t len = end - at;

        // What is cached is not below yet; what is not, is.
        if (!dev->writeback || !writeback_extent(dev->writeback, at, &len, &ext)) {
            int ret = map_extent(dev->map, at, len, false, true, &ext);

            if (ret < 0)
                return ret;
        }
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

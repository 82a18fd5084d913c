#include "core/block_status.h"

#include "core/device.h"
#include "core/queue.h"

int block_status_work(struct rq *rq)
{
    struct extent *exts = rq->iov[0].iov_base;
    unsigned max_extents = (unsigned)(rq->iov[0].iov_len / sizeof(*exts));
    uint64_t at = rq->offset_bytes, end = at + rq->len_bytes;

    rq->nr_extents = 0;
    while (at < end) {
        struct extent ext, *last = rq->nr_extents ? &exts[rq->nr_extents - 1] : NULL;
        int ret = map_extent(rq->queue->dev->map, at, end - at, false, true, &ext);

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

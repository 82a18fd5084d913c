// The data path of fastfs. Hot; fastfs_keeper.c is the cold part. Invariants: fastfs.h.

#include "map/fastfs.h"

#include "image/image.h"
#include "util/util.h"

// F1, F2: whoever finds that the time is over ends it; if the keeper has just gone on, it is not over.
static bool fastfs_is_redirecting(struct fastfs *fastfs)
{
    uint64_t until_ns = atomic_load_explicit(&fastfs->redirect_until_ns, memory_order_acquire);

    while (until_ns && util_coarse_ns() >= until_ns) {
        if (atomic_compare_exchange_weak(&fastfs->redirect_until_ns, &until_ns, 0))
            return false;
    }
    return until_ns;
}

static int fastfs_extent(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create,
                         bool may_block, struct extent *ext)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);
    struct found found;
    int ret;

    // The truth about holes is the file system's; and by way of the file is always right.
    ret = map_linear_ops.extent(map, start_bytes, len_bytes, create, may_block, ext);
    if (ret < 0 || may_block || !fastfs_is_redirecting(fastfs))
        return ret;
    ret = extent_map_find(&fastfs->extents, ext->offset_bytes, len_bytes, &found);
    if (ret < 0)
        return ret;
    ext->len_bytes = found.len_bytes;
    if (found.place == ON_DEVICE) {
        ext->fd = map->device_fd;
        ext->offset_bytes = found.offset_bytes;
    } else if (found.place == NOWHERE) {
        ext->state = EXTENT_HOLE;
    }
    return 0;
}

static void fastfs_begin_write(struct map *map, struct extent *ext)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);
    bool is_due;

    if (ext->state == EXTENT_MAPPED && ext->fd == map->device_fd)
        return;
    ext->state = EXTENT_MAPPED;
    is_due = extent_map_mark(&fastfs->extents, ext->offset_bytes, ext->len_bytes);
    if (!atomic_load(&fastfs->has_marks)) // behind the mark: who takes it back looks for marks then
        atomic_store(&fastfs->has_marks, true);
    if (is_due && !atomic_exchange(&fastfs->is_refill_asked, true))
        ring_post(fastfs->ring, &fastfs->refill_op, 0);
}

const struct map_ops map_fastfs_ops = {
    .name = "fastfs",
    .map_bytes = sizeof(struct fastfs),
    .open = fastfs_open,
    .adjust = fastfs_adjust,
    .extent = fastfs_extent,
    .begin_write = fastfs_begin_write,
    .call = fastfs_call,
    .describe = fastfs_describe,
    .stop = fastfs_stop,
    .close = fastfs_close,
};

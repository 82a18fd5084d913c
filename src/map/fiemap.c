#include "map/fiemap.h"

#include <errno.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "util/util.h"

#define FIEMAP_BATCH 512 // extents a call

static enum file_state fiemap_state(const struct fiemap_extent *ext, uint32_t block_bytes)
{
    uint32_t flags = ext->fe_flags & ~(uint32_t)(FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED);

    // Any flag that is not known here means that the place is not to be relied on.
    if (flags & ~(uint32_t)(FIEMAP_EXTENT_UNWRITTEN | FIEMAP_EXTENT_SHARED) ||
        (ext->fe_logical | ext->fe_physical | ext->fe_length) & (block_bytes - 1) ||
        ext->fe_physical + ext->fe_length < ext->fe_physical)
        return FILE_OTHER;
    if (flags & FIEMAP_EXTENT_UNWRITTEN)
        return FILE_UNWRITTEN;
    return flags & FIEMAP_EXTENT_SHARED ? FILE_SHARED : FILE_WRITTEN;
}

static int fiemap_give(struct fiemap_walk *walk, uint64_t end, enum file_state state, uint64_t physical)
{
    struct file_extent ext = {.start_bytes = walk->at,
                              .len_bytes = end - walk->at,
                              .state = state,
                              .physical_bytes = physical};

    walk->at = end;
    return walk->take(walk->arg, &ext);
}

int fiemap_next(struct fiemap_walk *walk, const struct fiemap_extent *ext)
{
    uint64_t start = ext->fe_logical, end = start + ext->fe_length;
    int ret = 0;

    // The first may begin before the range; they come in order and do not overlap.
    if (end <= start || end <= walk->at || (start < walk->at && walk->at & (walk->block_bytes - 1)))
        return -EIO;
    if (start > walk->at)
        ret = fiemap_give(walk, min_of(start, walk->end), FILE_HOLE, 0);
    if (!ret && walk->at < walk->end)
        ret = fiemap_give(walk, min_of(end, walk->end), fiemap_state(ext, walk->block_bytes),
                          ext->fe_physical + (walk->at - start));
    return ret;
}

int fiemap_end(struct fiemap_walk *walk)
{
    return walk->at < walk->end ? fiemap_give(walk, walk->end, FILE_HOLE, 0) : 0;
}

int fiemap_run(int fd, struct fiemap_walk *walk, bool is_synced)
{
    struct fiemap *fiemap = malloc(sizeof(*fiemap) + FIEMAP_BATCH * sizeof(fiemap->fm_extents[0]));
    bool is_last = false;
    int ret = fiemap ? 0 : -ENOMEM;

    while (!ret && !is_last && walk->at < walk->end) {
        *fiemap = (struct fiemap){
            .fm_start = walk->at,
            .fm_length = walk->end - walk->at,
            .fm_flags = is_synced ? FIEMAP_FLAG_SYNC : 0,
            .fm_extent_count = FIEMAP_BATCH,
        };
        if (ioctl(fd, FS_IOC_FIEMAP, fiemap) < 0) {
            ret = errno == ENOTTY ? -EOPNOTSUPP : -errno;
            break;
        }
        is_last = fiemap->fm_mapped_extents < FIEMAP_BATCH;
        for (uint32_t i = 0; !ret && walk->at < walk->end && i < fiemap->fm_mapped_extents; i++)
            ret = fiemap_next(walk, &fiemap->fm_extents[i]);
    }
    free(fiemap);
    return ret ? ret : fiemap_end(walk);
}

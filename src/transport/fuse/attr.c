// What the file looks like. Cold, on a worker.

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "core/device.h"
#include "transport/fuse/fuse.h"
#include "util/util.h"

#define ATTR_VALID_SEC 1 // how long the kernel may go without asking again

// Owner, mode and times are the image's, so that who may read it may read this.
int fuse_attr_work(struct ring_op *op)
{
    struct fuse_rq *frq = container_of(op, struct fuse_rq, op);
    const struct device *dev = frq->chan->dev;
    uint64_t size = dev->limits.size_bytes;
    mode_t mask = dev->image->is_read_only ? 0444 : 0666;
    struct fuse_attr_out out;
    struct stat st;

    if (fstat(dev->image->fd, &st) < 0)
        return -errno;
    out = (struct fuse_attr_out){
        .attr_valid = ATTR_VALID_SEC,
        .attr =
            {
                .ino = FUSE_ROOT_ID,
                .size = size,
                .blocks = min_of(S_ISREG(st.st_mode) ? (uint64_t)st.st_blocks : UINT64_MAX,
                                 (size + SECTOR_BYTES - 1) / SECTOR_BYTES),
                .atime = (uint64_t)st.st_atim.tv_sec,
                .mtime = (uint64_t)st.st_mtim.tv_sec,
                .ctime = (uint64_t)st.st_ctim.tv_sec,
                .atimensec = (uint32_t)st.st_atim.tv_nsec,
                .mtimensec = (uint32_t)st.st_mtim.tv_nsec,
                .ctimensec = (uint32_t)st.st_ctim.tv_nsec,
                .mode = S_IFREG | (st.st_mode & mask),
                .nlink = 1,
                .uid = st.st_uid,
                .gid = st.st_gid,
                .blksize = dev->limits.preferred_block_bytes,
            },
    };
    memcpy(frq->payload, &out, sizeof(out));
    return sizeof(out);
}

// A file system that is full with one file.
int fuse_statfs_work(struct ring_op *op)
{
    struct fuse_rq *frq = container_of(op, struct fuse_rq, op);
    const struct limits *limits = &frq->chan->dev->limits;
    struct fuse_statfs_out out = {
        .st = {.blocks = limits->size_bytes / limits->preferred_block_bytes,
               .files = 1,
               .bsize = limits->preferred_block_bytes,
               .namelen = 255,
               .frsize = limits->preferred_block_bytes},
    };

    memcpy(frq->payload, &out, sizeof(out));
    return sizeof(out);
}

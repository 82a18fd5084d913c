// linear: byte N of the device is byte N of the image, past the image's offset. Holes are looked up
// only for who asks (may_block): on the data path somebody else may have written there meanwhile.

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "image/image.h"
#include "map/map.h"
#include "util/util.h"

static int linear_open(struct map *map, struct err *err)
{
    (void)map;
    (void)err;
    return 0;
}

// lseek(2): SEEK_DATA fails with ENXIO when there is only hole up to the end, and a file system or
// device that knows no holes answers as if all were data, or with EINVAL or EOPNOTSUPP.
static int linear_look_up(const struct image *image, uint64_t len_bytes, struct extent *ext)
{
    off_t at = (off_t)ext->offset_bytes;
    off_t next = lseek(image->fd, at, SEEK_DATA);

    if (next == at) {
        next = lseek(image->fd, at, SEEK_HOLE);
    } else if (next > at || errno == ENXIO) {
        ext->state = EXTENT_HOLE;
        if (next < 0)
            return 0;
    }
    if (next > at)
        ext->len_bytes = min_of(len_bytes, (uint64_t)(next - at));
    return 0;
}

// Where the file system has no fallocate, the write allocates: a HOLE.
static int linear_allocate(const struct image *image, struct extent *ext)
{
    int ret;

    if (image->is_block_device)
        return 0;
    do {
        ret = fallocate(image->fd, FALLOC_FL_KEEP_SIZE, (off_t)ext->offset_bytes, (off_t)ext->len_bytes);
    } while (ret < 0 && errno == EINTR);
    if (ret < 0 && errno == EOPNOTSUPP)
        ext->state = EXTENT_HOLE;
    else if (ret < 0)
        return -errno;
    return 0;
}

static int linear_extent(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create,
                         bool may_block, struct extent *ext)
{
    const struct image *image = map->image;

    *ext = (struct extent){
        .start_bytes = start_bytes,
        .len_bytes = len_bytes,
        .state = EXTENT_MAPPED,
        .fd = image->fd,
        .offset_bytes = image->offset_bytes + start_bytes,
    };
    if (!may_block)
        return 0;
    if (!create)
        return linear_look_up(image, len_bytes, ext);
    return linear_allocate(image, ext);
}

const struct map_ops map_linear_ops = {
    .name = "linear",
    .open = linear_open,
    .extent = linear_extent,
};

// The wrapper around a map's ops. Hot; map_table.c is the cold part.

#include "map/map.h"

#include <assert.h>
#include <errno.h>

int map_extent(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create, bool may_block,
               struct extent *ext)
{
    int ret;

    assert(len_bytes && (may_block || !create));
    ret = map->ops->extent(map, start_bytes, len_bytes, create, may_block, ext);
    assert(ret < 0 || (ext->start_bytes == start_bytes && ext->len_bytes && ext->len_bytes <= len_bytes));
    assert(ret != -EAGAIN || !may_block);
    return ret;
}

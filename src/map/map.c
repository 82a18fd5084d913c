#include "map/map.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "util/util.h"

static const struct map_ops *const map_table[] = {
    &map_linear_ops,
};

const struct map_ops *map_find(const char *name, struct err *err)
{
    for (unsigned i = 0; i < ARRAY_SIZE(map_table); i++) {
        if (!strcmp(name, map_table[i]->name))
            return map_table[i];
    }
    err_usage(err, "--map: %s: no such map; use linear", name);
    return NULL;
}

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

// Which maps there are. Cold.

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "map/map.h"
#include "util/util.h"

static const struct map_ops *const map_table[] = {
    &map_linear_ops,
    &map_fastfs_ops,
};

static const struct map_ops *map_find(const char *name)
{
    for (unsigned i = 0; i < ARRAY_SIZE(map_table); i++) {
        if (!strcmp(name, map_table[i]->name))
            return map_table[i];
    }
    return NULL;
}

int map_create(struct map **map, const char *name, struct device *dev, struct image *image, struct err *err)
{
    const struct map_ops *ops = map_find(name);
    int ret;

    if (!ops)
        return err_usage(err, "--map: %s: no such map; use linear or fastfs", name);
    *map = calloc(1, max_of(ops->map_bytes, sizeof(**map)));
    if (!*map)
        return err_set(err, -ENOMEM, "--map: %s: out of memory", name);
    (*map)->ops = ops;
    (*map)->dev = dev;
    (*map)->image = image;
    (*map)->device_fd = -1;
    ret = ops->open(*map, err);
    if (ret < 0) {
        free(*map);
        *map = NULL;
    }
    return ret;
}

void map_destroy(struct map *map)
{
    if (map->ops->close)
        map->ops->close(map);
    free(map);
}

int map_adjust(struct map *map, struct image *image, struct err *err)
{
    return map->ops->adjust ? map->ops->adjust(map, image, err) : 0;
}

void map_stop(struct map *map)
{
    if (map->ops->stop)
        map->ops->stop(map);
}

bool map_describe(struct map *map, struct map_status *status)
{
    if (map->ops->describe)
        map->ops->describe(map, status);
    return map->ops->describe;
}

int map_sync(const struct map *map)
{
    return map->device_fd >= 0 && fdatasync(map->device_fd) < 0 ? -errno : 0;
}

#include <errno.h>
#include <stdlib.h>

#include "map/extent_map.h"
#include "map/fiemap.h"

int extent_map_create(struct extent_map *map, uint64_t size_bytes)
{
    *map = (struct extent_map){.regions = NULL};
    return extent_map_grow(map, max_of(size_bytes, 1U));
}

int extent_map_grow(struct extent_map *map, uint64_t size_bytes)
{
    uint64_t nr_regions = size_bytes / REGION_BYTES + (size_bytes % REGION_BYTES != 0);
    _Atomic(struct region *) *regions;

    if (nr_regions <= map->nr_regions)
        return 0;
    // Zeroed by the kernel page by page as they are used: of 64 TiB they are 32 MiB.
    regions = calloc(nr_regions, sizeof(*regions));
    if (!regions)
        return -ENOMEM;
    for (uint64_t i = 0; i < map->nr_regions; i++) {
        struct region *region = atomic_load(&map->regions[i]);

        if (region)
            atomic_init(&regions[i], region);
    }
    free(map->regions);
    map->regions = regions;
    map->nr_regions = nr_regions;
    return 0;
}

void extent_map_destroy(struct extent_map *map)
{
    for (uint64_t i = 0; i < map->nr_regions; i++) {
        if (atomic_load(&map->regions[i]))
            region_free(extent_map_replace(map, i, NULL));
    }
    free(map->regions);
    map->regions = NULL;
    map->nr_regions = 0;
}

struct region *extent_map_replace(struct extent_map *map, uint64_t index, struct region *value)
{
    struct region *old = atomic_exchange(&map->regions[index], value);

    return old == &extent_map_closed ? NULL : old;
}

struct region *extent_map_begin_fill(struct extent_map *map, uint64_t index, struct region **filled)
{
    *filled = calloc(1, sizeof(**filled));
    if (!*filled)
        return extent_map_replace(map, index, &extent_map_closed);
    (*filled)->index = index;
    return extent_map_replace(map, index, *filled);
}

void region_free(struct region *region)
{
    if (region)
        free(atomic_load(&region->extents));
    free(region);
}

int extents_take(void *arg, const struct file_extent *ext)
{
    struct extents_build *build = arg;
    struct extents *extents = build->extents;
    uint64_t end = ext->start_bytes + ext->len_bytes;
    struct placed next = {ext->start_bytes, IN_FILE};
    struct placed *last = extents->nr_extents ? &extents->at[extents->nr_extents - 1] : NULL;

    if (ext->state == FILE_WRITTEN)
        next.where = ext->physical_bytes | ON_DEVICE;
    else if (ext->state == FILE_HOLE || ext->state == FILE_UNWRITTEN)
        next.where = NOWHERE;
    // The last block may be a part of one, which the file ends in.
    if (end > build->known_bytes && ext->start_bytes < build->known_bytes) {
        struct file_extent known = *ext, rest = *ext;
        int ret;

        known.len_bytes = build->known_bytes - ext->start_bytes;
        rest.start_bytes = build->known_bytes;
        rest.len_bytes = end - build->known_bytes;
        ret = extents_take(arg, &known);
        return ret ? ret : extents_take(arg, &rest);
    }
    if (ext->start_bytes >= build->known_bytes)
        next.where = IN_FILE;
    extents->bytes[next.where & 3] += ext->len_bytes;
    if (last && (next.where & 3) == (last->where & 3) &&
        ((next.where & 3) != ON_DEVICE ||
         next.where == last->where + (next.start_bytes - last->start_bytes))) {
        extents->at[extents->nr_extents].start_bytes = end;
        return 0;
    }
    if (extents->nr_extents + 1 == build->max_extents) {
        size_t max_extents = build->max_extents * 2;

        extents = realloc(extents, sizeof(*extents) + max_extents * sizeof(extents->at[0]));
        if (!extents)
            return -ENOMEM;
        build->extents = extents;
        build->max_extents = max_extents;
    }
    extents->nr_device += (next.where & 3) == ON_DEVICE;
    extents->at[extents->nr_extents++] = next;
    extents->at[extents->nr_extents] = (struct placed){end, IN_FILE};
    return 0;
}

int extents_read(struct extents **extents, int fd, uint64_t index, uint64_t known_bytes, uint32_t block_bytes)
{
    struct extents_build build = {.max_extents = 8, .known_bytes = known_bytes};
    struct fiemap_walk walk = {
        .at = index * REGION_BYTES,
        .end = (index + 1) * REGION_BYTES,
        .block_bytes = block_bytes,
        .take = extents_take,
        .arg = &build,
    };
    int ret;

    build.extents = calloc(1, sizeof(*build.extents) + build.max_extents * sizeof(build.extents->at[0]));
    if (!build.extents)
        return -ENOMEM;
    ret = fiemap_run(fd, &walk, false);
    if (ret < 0) {
        free(build.extents);
        return ret;
    }
    // As much as it takes, and the end.
    *extents = realloc(build.extents, sizeof(*build.extents) +
                                          (build.extents->nr_extents + 1) * sizeof(build.extents->at[0]));
    if (!*extents)
        *extents = build.extents;
    return 0;
}

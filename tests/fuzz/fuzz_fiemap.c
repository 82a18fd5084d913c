// FIEMAP's records, any at all: what comes out covers the range without gaps, in order, and what is made of
// it finds every byte where the records said, or in the file.

#include "fuzz.h"

#include <linux/fiemap.h>
#include <stdlib.h>
#include <string.h>

#include "map/extent_map.h"
#include "map/fiemap.h"

#define BLOCK 4096U

struct seen {
    uint64_t at;
    struct extents_build build;
};

static int see(void *arg, const struct file_extent *ext)
{
    struct seen *seen = arg;

    must(ext->start_bytes == seen->at && ext->len_bytes);
    must(ext->state < FILE_NR_STATES);
    must(ext->state != FILE_WRITTEN || !((ext->physical_bytes | ext->start_bytes) % BLOCK));
    seen->at += ext->len_bytes;
    return extents_take(&seen->build, ext);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct seen seen = {.build = {.max_extents = 2}};
    struct fiemap_walk walk = {.end = REGION_BYTES, .block_bytes = BLOCK, .take = see, .arg = &seen};
    struct extent_map map;
    struct region *region;
    uint64_t nr_extents;
    int ret = 0;

    seen.build.extents = calloc(1, sizeof(*seen.build.extents) + 2 * sizeof(seen.build.extents->at[0]));
    seen.build.known_bytes = REGION_BYTES;
    if (len >= 2) {
        seen.build.known_bytes = (data[0] | data[1] << 8) % (REGION_BYTES / BLOCK) * (uint64_t)BLOCK;
        data += 2;
        len -= 2;
    }
    // Small numbers of blocks most of the time, so that records often make sense.
    for (; len >= 12 && !ret && walk.at < walk.end; data += 12, len -= 12) {
        struct fiemap_extent ext = {0};
        uint32_t words[3];

        memcpy(words, data, sizeof(words));
        ext.fe_logical = (uint64_t)(words[0] & 0xffff) * (words[0] >> 31 ? 512 : BLOCK);
        ext.fe_length = (uint64_t)(words[0] >> 16 & 0x7fff) * BLOCK;
        ext.fe_physical = (uint64_t)words[1] << (words[2] & 1 ? 40 : 12);
        ext.fe_flags = words[2] >> 1;
        ret = fiemap_next(&walk, &ext);
    }
    if (!ret)
        ret = fiemap_end(&walk);
    if (ret < 0) {
        free(seen.build.extents);
        return 0;
    }
    must(seen.at == REGION_BYTES);
    must(!extent_map_create(&map, REGION_BYTES));
    must(!extent_map_begin_fill(&map, 0, &region) && region);
    nr_extents = seen.build.extents->nr_extents;
    must(nr_extents && seen.build.extents->at[nr_extents].start_bytes == REGION_BYTES);
    atomic_store(&region->extents, seen.build.extents);
    for (uint64_t at = 0; at < REGION_BYTES;) {
        struct found found;

        must(!extent_map_find(&map, at, REGION_BYTES - at, &found) && found.len_bytes);
        must(found.place != ON_DEVICE || (at < seen.build.known_bytes && !(found.offset_bytes % BLOCK)));
        at += found.len_bytes;
    }
    extent_map_destroy(&map);
    return 0; // cppcheck-suppress memleak ; the map has freed them
}

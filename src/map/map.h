// A map says where byte N of the device is. One call is the heart of it all: map_extent().
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/log.h"

enum extent_state {
    EXTENT_MAPPED,    // at fd, offset_bytes
    EXTENT_HOLE,      // reads as zeroes, takes no space
    EXTENT_UNWRITTEN, // reads as zeroes, space is allocated
    EXTENT_DELAYED,   // in our own cache, no place yet
};

struct extent {
    uint64_t start_bytes; // in the device
    uint64_t len_bytes;   // never 0
    enum extent_state state;
    int fd;                // MAPPED
    uint64_t offset_bytes; // MAPPED: in fd
};

struct image;
struct map;

struct map_ops {
    const char *name;
    size_t map_bytes; // of the map's own struct, which begins with a struct map; 0: there is none
    // Required. Any thread; cold. 0 or a negative errno with err set.
    int (*open)(struct map *map, struct err *err);
    // Required. Any thread. Answers for start_bytes and at most len_bytes; less is allowed. 0, or a
    // negative errno; -EAGAIN only without may_block: the answer is not known without blocking.
    int (*extent)(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create, bool may_block,
                  struct extent *ext);
    // Optional. Any thread; cold; nothing is in flight.
    void (*close)(struct map *map);
};

struct map {
    const struct map_ops *ops;
    struct image *image;
};

extern const struct map_ops map_linear_ops;

// The map of that name on an image, which it uses until map_destroy(). 0 or a negative errno with err set.
int map_create(struct map **map, const char *name, struct image *image, struct err *err);
void map_destroy(struct map *map);

// The extent at start_bytes, cut to len_bytes (> 0). create: allocates (may_block must be set).
// !may_block: only what is known without blocking; where the bytes go on the data path.
// may_block && !create: the truth about holes, for block status and pictures.
int map_extent(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create, bool may_block,
               struct extent *ext);

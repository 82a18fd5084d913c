// A map says where byte N of the device is. One call is the heart of it all: map_extent().
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ring/ring.h"
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

struct device;
struct image;
struct map;

// What a map does in its own time, on a thread of its own. Embedded in a request.
struct map_call {
    enum map_call_code {
        MAP_FETCH,     // finds out what map_extent() did not know without blocking
        MAP_PUNCH,     // the range is about to be punched: nothing is redirected to where it was
        MAP_PUNCH_END, // the same call again: it is over
    } code;
    uint64_t start_bytes, len_bytes; // in the device
    struct ring *ring;
    void (*done)(struct ring_op *op, int res); // &call->op, on that ring
    // The map's.
    struct ring_op op;
    struct map *map;
    struct map_call *next, *next_punch;
};

// For people.
struct map_status {
    bool is_redirecting;
    char why_not[128];        // "" when it is
    char device[256];         // where to
    uint64_t nr_extents;      // that are redirected, and their
    uint64_t device_bytes;    // bytes; of what was looked up so far
    uint64_t zero_bytes;      // holes and unwritten extents: read without I/O
    uint64_t file_bytes;      // shared or otherwise not to be relied on: by way of the file
    uint64_t unknown_bytes;   // nobody has asked for them yet
    uint64_t nr_lease_breaks; // somebody else has opened the image
};

struct map_ops {
    const char *name;
    size_t map_bytes; // of the map's own struct, which begins with a struct map; 0: there is none
    // Required. Any thread; cold. 0 or a negative errno with err set.
    int (*open)(struct map *map, struct err *err);
    // Required. Any thread. Answers for start_bytes and at most len_bytes; less is allowed. 0, or a
    // negative errno; -EAGAIN only without may_block: the answer is not known without blocking.
    int (*extent)(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create, bool may_block,
                  struct extent *ext);
    // Optional. Cold, frozen. image is what map->image is going to be: takes over what the map needs of
    // it (alignment), or refuses with err set.
    int (*adjust)(struct map *map, struct image *image, struct err *err);
    // Optional, hot, queue's thread. A WRITE goes to ext, which extent() has just told without may_block,
    // and is MAPPED afterwards. Required where there may be holes then.
    void (*begin_write)(struct map *map, struct extent *ext);
    // Optional, hot, queue's thread. Ends with call->done(). Required where extent() answers -EAGAIN; a map
    // that has it gets MAP_PUNCH and MAP_PUNCH_END around every punch.
    void (*call)(struct map *map, struct map_call *call);
    // Optional. Any thread; cold.
    void (*describe)(struct map *map, struct map_status *status);
    // Optional. Cold; the device's queues run. From here on extents are in the image alone.
    void (*stop)(struct map *map);
    // Optional. Any thread; cold; nothing is in flight, no queue looks at the map.
    void (*close)(struct map *map);
};

struct map {
    const struct map_ops *ops;
    struct device *dev;
    struct image *image;
    int device_fd; // where extents may be besides the image; -1: nowhere
};

extern const struct map_ops map_linear_ops, map_fastfs_ops;

// The map of that name on an image of a device, which it uses until map_destroy(). 0 or a negative errno with
// err set.
int map_create(struct map **map, const char *name, struct device *dev, struct image *image, struct err *err);
void map_destroy(struct map *map);

// The extent at start_bytes, cut to len_bytes (> 0). create: allocates (may_block must be set), or says HOLE
// where nothing but a write can.
// !may_block: only what is known without blocking; where the bytes go on the data path.
// may_block && !create: the truth about holes, for block status and pictures.
int map_extent(struct map *map, uint64_t start_bytes, uint64_t len_bytes, bool create, bool may_block,
               struct extent *ext);

// Wrappers around the optional ones: nothing where there is none.
int map_adjust(struct map *map, struct image *image, struct err *err);
void map_stop(struct map *map);
bool map_describe(struct map *map, struct map_status *status);

// Makes durable what was written to extents behind the image. 0 or a negative errno. Cold.
int map_sync(const struct map *map);

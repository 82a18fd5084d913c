// Where a file's bytes are, as far as it is known: filled region by region, looked up by all queues.
//
//  X1. Look-ups take no lock. A region's extents are immutable; they, and regions, are replaced as a whole,
//      by the keeper's thread alone. What was replaced is freed after a barrier (device_barrier()): no
//      queue looks at it any more, and no I/O to a place that it named is in flight.
//  X2. A write by way of the file may change where bytes are: it fills holes, and on XFS it may move what has
//      been shared once. It is marked in its region before it is submitted. A region that is being filled was
//      put in its place, empty, before the barrier that came before the kernel was asked: so a write that
//      the kernel may not have known of is marked in it. What is marked goes by way of the file, until the
//      region is filled anew.
//  X3. Nothing is written by way of the file where a region that is filled has a place: an I/O to that place
//      could be in flight when the file system gives it to another file.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/util.h"

#define REGION_BYTES (16 * MiB)
#define MARK_BYTES (4 * KiB)
#define REGION_NR_MARKS (REGION_BYTES / MARK_BYTES)
#define REGION_REFILL_MARKS (REGION_NR_MARKS / 4) // so many new ones: it is worth asking again

enum whereabouts {
    IN_FILE,   // by way of the file
    ON_DEVICE, // at a place of the device
    NOWHERE,   // nowhere, reads as zeroes
};

// The bytes from start_bytes up to where the next one begins.
struct placed {
    uint64_t start_bytes; // in the file
    uint64_t where;       // enum whereabouts in the lowest two bits, the rest for ON_DEVICE: where it begins
};

struct extents {
    size_t nr_extents;
    uint64_t bytes[3];  // of each place
    size_t nr_device;   // extents at ON_DEVICE
    struct placed at[]; // one more than nr_extents: the region's end
};

struct region {
    _Atomic(struct extents *) extents; // NULL: not known yet, all by way of the file
    _Atomic uint64_t marks[REGION_NR_MARKS / 64];
    atomic_uint nr_marks;
    uint64_t index;
    struct region *next; // of those to fill, or to free
};

struct extent_map {
    _Atomic(struct region *)
        *regions; // NULL: to be asked for; extent_map_closed: by way of the file, unmarked
    uint64_t nr_regions;
};

extern struct region extent_map_closed;

struct found {
    enum whereabouts place;
    uint64_t len_bytes;
    uint64_t offset_bytes; // DEVICE
};

// What is at start_bytes of the file, for len_bytes at most. 0, or -EAGAIN: its region has to be filled.
// Queue's thread; hot.
int extent_map_find(const struct extent_map *map, uint64_t start_bytes, uint64_t len_bytes,
                    struct found *found);

// X2. true: a region has enough marks to be filled anew. Queue's thread; hot.
bool extent_map_mark(struct extent_map *map, uint64_t start_bytes, uint64_t len_bytes);

// ---- extent_map_fill.c: cold, the keeper's thread

// For a file of size_bytes. 0 or -ENOMEM.
int extent_map_create(struct extent_map *map, uint64_t size_bytes);
// The file has size_bytes now. No queue looks at the map meanwhile. 0 or -ENOMEM: what is new stays by way of
// the file.
int extent_map_grow(struct extent_map *map, uint64_t size_bytes);
void extent_map_destroy(struct extent_map *map);

// An empty region, *filled, in the place of what is there, which is returned (X1). Without memory *filled is
// NULL, and the file is used there until the map is emptied.
struct region *extent_map_begin_fill(struct extent_map *map, uint64_t index, struct region **filled);

// What is there, if it is a region of its own; value takes its place.
struct region *extent_map_replace(struct extent_map *map, uint64_t index, struct region *value);

void region_free(struct region *region);

// The extents of the file in the region, by FIEMAP on fd. What lies at known_bytes or behind is
// IN_FILE. *extents is malloced. 0 or a negative errno.
int extents_read(struct extents **extents, int fd, uint64_t index, uint64_t known_bytes,
                 uint32_t block_bytes);

// For extents_read() and its tests: from what a walk gives.
struct file_extent;
struct extents_build {
    struct extents *extents;
    size_t max_extents;
    uint64_t known_bytes;
};
int extents_take(void *arg, const struct file_extent *ext); // arg: a struct extents_build

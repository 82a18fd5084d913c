// The guest's memory, as the front-end shares it.
//
//  M1. Regions come and go on the main thread, while no vring that uses them runs.
//  M2. What is mapped was as long as it claims when it was mapped. Who shares it may cut it shorter at
//      any time: the process gets SIGBUS at the next touch, zeroes take the place of the whole mapping,
//      and is_lost is set for whoever used it.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "transport/vhost_user/proto.h"

#define MEMORY_MAX_REGIONS 64

// Memory that is shared with somebody who may take it away (M2).
struct memory_map {
    char *base; // NULL: none
    size_t len_bytes;
};

struct memory_region {
    uint64_t guest, size, user;
    char *host;
    struct memory_map map;
};

struct memory {
    unsigned nr_regions;
    struct memory_region regions[MEMORY_MAX_REGIONS]; // sorted by guest address, none overlap
    atomic_bool is_lost;
};

// Maps [offset, offset + len) of fd, which is a regular file at least so long, and gives back where the
// offset is; *is_lost is set when it has gone. 0 or a negative errno. Cold.
int memory_map(struct memory_map *map, int fd, uint64_t offset, uint64_t len_bytes, atomic_bool *is_lost,
               char **at);
void memory_unmap(struct memory_map *map);

// fd stays the caller's. 0 or a negative errno. Cold.
int memory_add(struct memory *memory, const struct vu_region *region, int fd);
int memory_remove(struct memory *memory, const struct vu_region *region);
void memory_clear(struct memory *memory);

// What lies at an address of the front-end's, or NULL unless all len_bytes are in one region. Cold.
void *memory_at_user(const struct memory *memory, uint64_t user, uint64_t len_bytes);

// The region of the address, or nr_regions.
unsigned memory_find(const struct memory *memory, uint64_t guest);

// What lies at a guest address; *len_bytes (> 0) is cut to what is there in one piece. NULL: nothing.
// *hint: where the last one was found. Hot.
static inline char *memory_at(const struct memory *memory, uint64_t guest, uint64_t *len_bytes,
                              unsigned *hint)
{
    const struct memory_region *region = &memory->regions[*hint];
    uint64_t offset = guest - region->guest;

    if (__builtin_expect(offset >= region->size, 0)) {
        *hint = memory_find(memory, guest);
        if (*hint == memory->nr_regions) {
            *hint = 0;
            return NULL;
        }
        region = &memory->regions[*hint];
        offset = guest - region->guest;
    }
    if (*len_bytes > region->size - offset)
        *len_bytes = region->size - offset;
    return region->host + offset;
}

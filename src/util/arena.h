// A fixed range of memory, given out in runs of whole pages, lowest first: what is in flight stays
// dense, in the pages that are warm already. Used by one thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ARENA_PAGE_BYTES 4096

struct arena {
    char *base;
    size_t nr_pages;
    uint64_t *used;    // a bit a page
    size_t first_free; // no page below is free
};

// Reserves address space; memory is taken when it is touched. 0 or -ENOMEM. Cold.
int arena_create(struct arena *arena, size_t len_bytes);
void arena_destroy(struct arena *arena);

static inline size_t arena_pages(size_t len_bytes)
{
    return (len_bytes + ARENA_PAGE_BYTES - 1) / ARENA_PAGE_BYTES;
}

// NULL: no run of that many pages is free. nr_pages > 0. Hot.
void *arena_get(struct arena *arena, size_t nr_pages);
void arena_put(struct arena *arena, void *mem, size_t nr_pages);

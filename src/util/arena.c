#include "util/arena.h"

#include <stdbool.h>

static bool page_is_used(const struct arena *arena, size_t page)
{
    return arena->used[page / 64] >> (page % 64) & 1;
}

// The first free page at or after page, or nr_pages.
static size_t next_free(const struct arena *arena, size_t page)
{
    while (page < arena->nr_pages) {
        uint64_t free_bits = ~arena->used[page / 64] >> (page % 64);

        if (free_bits)
            return page + (size_t)__builtin_ctzll(free_bits);
        page = (page / 64 + 1) * 64;
    }
    return arena->nr_pages;
}

void *arena_get(struct arena *arena, size_t nr_pages)
{
    size_t start = next_free(arena, arena->first_free), end;

    arena->first_free = start;
    for (; start + nr_pages <= arena->nr_pages; start = next_free(arena, end)) {
        for (end = start; end < start + nr_pages && !page_is_used(arena, end);)
            end++;
        if (end < start + nr_pages)
            continue;
        for (size_t page = start; page < end; page++)
            arena->used[page / 64] |= 1ULL << (page % 64);
        if (start == arena->first_free)
            arena->first_free = end;
        return arena->base + start * ARENA_PAGE_BYTES;
    }
    return NULL;
}

void arena_put(struct arena *arena, void *mem, size_t nr_pages)
{
    size_t start = (size_t)((char *)mem - arena->base) / ARENA_PAGE_BYTES;

    for (size_t page = start; page < start + nr_pages; page++)
        arena->used[page / 64] &= ~(1ULL << (page % 64));
    if (start < arena->first_free)
        arena->first_free = start;
}

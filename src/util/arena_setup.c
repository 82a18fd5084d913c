#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "util/arena.h"

int arena_create(struct arena *arena, size_t len_bytes)
{
    *arena = (struct arena){.nr_pages = len_bytes / ARENA_PAGE_BYTES};
    arena->used = calloc((arena->nr_pages + 63) / 64, sizeof(*arena->used));
    if (!arena->used)
        return -ENOMEM;
    arena->base =
        mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena->base == MAP_FAILED) {
        free(arena->used);
        return -ENOMEM;
    }
    return 0;
}

void arena_destroy(struct arena *arena)
{
    munmap(arena->base, arena->nr_pages * ARENA_PAGE_BYTES);
    free(arena->used);
}

// Look-ups and marks. Hot; extent_map_fill.c is the cold part.

#include "map/extent_map.h"

#include <errno.h>

struct region extent_map_closed;

static struct region *region_at(const struct extent_map *map, uint64_t index)
{
    return index < map->nr_regions ? atomic_load_explicit(&map->regions[index], memory_order_acquire)
                                   : &extent_map_closed;
}

// The extent that holds offset. Begins where it would be if all had the same length: where a file is torn
// into many small ones, each look at another place is a cache miss.
static size_t extents_find(const struct extents *extents, uint64_t offset)
{
    size_t nr = extents->nr_extents, low = (offset % REGION_BYTES) * nr / REGION_BYTES, high, step = 1;

    if (extents->at[low].start_bytes <= offset) {
        for (high = low + 1; high < nr && extents->at[high].start_bytes <= offset; step *= 2) {
            low = high;
            high += step;
        }
        high = min_of(high, nr);
    } else {
        do {
            high = low;
            low = low > step ? low - step : 0;
            step *= 2;
        } while (extents->at[low].start_bytes > offset);
    }
    while (high - low > 1) {
        size_t middle = (low + high) / 2;

        if (extents->at[middle].start_bytes <= offset)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static bool region_is_marked(const struct region *region, uint64_t offset)
{
    uint64_t bit = offset % REGION_BYTES / MARK_BYTES;

    return atomic_load_explicit(&region->marks[bit / 64], memory_order_acquire) >> bit % 64 & 1;
}

// The end of the run that is marked like the block at offset.
static uint64_t region_marks_end(const struct region *region, uint64_t offset, uint64_t end)
{
    bool is_marked = region_is_marked(region, offset);
    uint64_t at = round_down(offset, MARK_BYTES);

    do
        at += MARK_BYTES;
    while (at < end && region_is_marked(region, at) == is_marked);
    return min_of(at, end);
}

// Neighbouring regions that go on at the neighbouring place of the device.
static void find_more(const struct extent_map *map, uint64_t start, uint64_t len, struct found *found)
{
    while (found->len_bytes < len) {
        const struct region *region = region_at(map, (start + found->len_bytes) / REGION_BYTES);
        const struct extents *extents =
            region ? atomic_load_explicit(&region->extents, memory_order_acquire) : NULL;

        if (!extents || atomic_load_explicit(&region->nr_marks, memory_order_acquire) ||
            extents->at[0].where != (found->offset_bytes + found->len_bytes) + ON_DEVICE)
            return;
        found->len_bytes +=
            min_of(len - found->len_bytes, extents->at[1].start_bytes - extents->at[0].start_bytes);
        if (extents->nr_extents > 1)
            return;
    }
}

int extent_map_find(const struct extent_map *map, uint64_t start_bytes, uint64_t len_bytes,
                    struct found *found)
{
    const struct region *region = region_at(map, start_bytes / REGION_BYTES);
    uint64_t region_end = round_down(start_bytes, REGION_BYTES) + REGION_BYTES, end = start_bytes + len_bytes;
    const struct extents *extents;
    const struct placed *at;

    if (!region)
        return -EAGAIN;
    extents = atomic_load_explicit(&region->extents, memory_order_acquire);
    if (!extents) {
        *found = (struct found){IN_FILE, min_of(end, region_end) - start_bytes, 0};
        return 0;
    }
    at = &extents->at[extents_find(extents, start_bytes)];
    *found = (struct found){
        .place = (enum whereabouts)(at->where & 3),
        .len_bytes = min_of(end, at[1].start_bytes) - start_bytes,
        .offset_bytes = (at->where & ~3ULL) + (start_bytes - at->start_bytes),
    };
    if (atomic_load_explicit(&region->nr_marks, memory_order_acquire)) {
        end = start_bytes + found->len_bytes;
        if (region_is_marked(region, start_bytes))
            found->place = IN_FILE; // X2
        found->len_bytes = region_marks_end(region, start_bytes, end) - start_bytes;
    } else if (found->place == ON_DEVICE && start_bytes + found->len_bytes == region_end) {
        find_more(map, start_bytes, len_bytes, found);
    }
    return 0;
}

bool extent_map_mark(struct extent_map *map, uint64_t start_bytes, uint64_t len_bytes)
{
    uint64_t at = round_down(start_bytes, MARK_BYTES), end = start_bytes + len_bytes;
    bool is_due = false;

    for (; at < end; at += MARK_BYTES) {
        struct region *region = region_at(map, at / REGION_BYTES);
        uint64_t number = at % REGION_BYTES / MARK_BYTES, bit = 1ULL << number % 64;

        if (!region || region == &extent_map_closed ||
            atomic_load_explicit(&region->marks[number / 64], memory_order_relaxed) & bit)
            continue;
        // nr_marks first: who sees the mark counts on it.
        is_due |= atomic_fetch_add(&region->nr_marks, 1) + 1 == REGION_REFILL_MARKS;
        atomic_fetch_or(&region->marks[number / 64], bit);
    }
    return is_due;
}

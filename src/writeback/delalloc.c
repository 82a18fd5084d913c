#include "writeback/delalloc.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "util/util.h"

#define MAX_PLACES (4 * MiB)         // of a byte each
#define MAX_RUN_BYTES (1024 * MiB)   // one call to the mapper
#define LONE_BYTES CACHE_CHUNK_BYTES // a run without neighbours is rounded to this
#define NEAR_UNITS 4                 // that are close behind

int delalloc_create(struct delalloc *delalloc, struct page_cache *cache, struct map *map, int space_fd,
                    uint64_t size_bytes, uint64_t unit_bytes)
{
    *delalloc = (struct delalloc){
        .cache = cache,
        .map = map,
        .space_fd = space_fd,
        .size_bytes = size_bytes,
        .unit_bytes = unit_bytes,
        .place_shift = 16, // a chunk
    };
    while (size_bytes >> delalloc->place_shift >= MAX_PLACES)
        delalloc->place_shift++;
    delalloc->nr_places = (size_bytes >> delalloc->place_shift) + 1;
    delalloc->places = mmap(NULL, delalloc->nr_places, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (delalloc->places == MAP_FAILED)
        return -ENOMEM;
    cache->space = space_get(space_fd);
    if (!cache->space) {
        munmap(delalloc->places, delalloc->nr_places);
        return -ENOMEM;
    }
    pthread_mutex_init(&delalloc->lock, NULL);
    delalloc_refresh(delalloc);
    return 0;
}

void delalloc_destroy(struct delalloc *delalloc)
{
    space_put(delalloc->cache->space, atomic_load(&delalloc->cache->nr_delayed));
    delalloc->cache->space = NULL;
    pthread_mutex_destroy(&delalloc->lock);
    munmap(delalloc->places, delalloc->nr_places);
}

// ---- Places

static uint64_t place_bytes(const struct delalloc *delalloc)
{
    return 1ULL << delalloc->place_shift;
}

static uint64_t place_next(const struct delalloc *delalloc, uint64_t offset)
{
    return round_down(offset, place_bytes(delalloc)) + place_bytes(delalloc);
}

// The last one may be short.
static uint64_t place_end(const struct delalloc *delalloc, uint64_t offset)
{
    return min_of(place_next(delalloc, offset), delalloc->size_bytes);
}

bool delalloc_needs_space(void *place)
{
    return atomic_load_explicit((_Atomic uint8_t *)place, memory_order_relaxed) < PLACE_FRESH;
}

int delalloc_look_up(struct delalloc *delalloc, uint64_t offset)
{
    uint64_t start = round_down(offset, place_bytes(delalloc)), at = start, end = delalloc->size_bytes;
    struct extent ext;
    int ret = map_extent(delalloc->map, start, end - start, false, true, &ext);

    if (ret < 0)
        return ret;
    end = start + ext.len_bytes;
    do {
        bool is_whole = end >= place_end(delalloc, at);
        uint8_t unknown = PLACE_UNKNOWN;
        uint8_t known = !is_whole ? PLACE_HOLES : ext.state == EXTENT_HOLE ? PLACE_EMPTY : PLACE_FULL;

        // A3: only the first answer counts.
        atomic_compare_exchange_strong(delalloc_place(delalloc, at), &unknown, known);
        at = place_next(delalloc, at);
    } while (at < end && place_end(delalloc, at) <= end);
    return 0;
}

void delalloc_punch(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    pthread_mutex_lock(&delalloc->lock);
    delalloc->nr_punches++;
    for (uint64_t at = start; at < end; at = place_next(delalloc, at)) {
        _Atomic uint8_t *place = delalloc_place(delalloc, at);

        if (atomic_load(place) != PLACE_UNKNOWN)
            atomic_store(place, PLACE_HOLES);
    }
    pthread_mutex_unlock(&delalloc->lock);
}

static uint64_t nr_punches(struct delalloc *delalloc)
{
    uint64_t n;

    pthread_mutex_lock(&delalloc->lock);
    n = delalloc->nr_punches;
    pthread_mutex_unlock(&delalloc->lock);
    return n;
}

// [start, end) was allocated. false: A3.
static bool places_allocated(struct delalloc *delalloc, uint64_t start, uint64_t end,
                             uint64_t nr_punches_then)
{
    bool is_current;

    pthread_mutex_lock(&delalloc->lock);
    is_current = delalloc->nr_punches == nr_punches_then;
    for (uint64_t at = start; is_current && at < end; at = place_next(delalloc, at)) {
        _Atomic uint8_t *place = delalloc_place(delalloc, at);
        uint8_t known = atomic_load(place);
        bool is_whole = !(at & (place_bytes(delalloc) - 1)) && place_end(delalloc, at) <= end;

        if (!is_whole)
            known = known == PLACE_EMPTY ? PLACE_HOLES : known;
        else if (known != PLACE_WRITTEN)
            known = known == PLACE_EMPTY || known == PLACE_FRESH ? PLACE_FRESH : PLACE_FULL;
        if (known != PLACE_UNKNOWN) // A1: to be looked up
            atomic_store(place, known);
    }
    pthread_mutex_unlock(&delalloc->lock);
    return is_current;
}

// All of [start, end) in that part of enum place.
static bool places_are(struct delalloc *delalloc, uint64_t start, uint64_t end, enum place min,
                       enum place max)
{
    for (uint64_t at = start; at < end; at = place_next(delalloc, at)) {
        uint8_t known = atomic_load(delalloc_place(delalloc, at));

        if (known < min || known > max)
            return false;
    }
    return true;
}

bool delalloc_is_full(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    return places_are(delalloc, start, end, PLACE_FULL, PLACE_FULL);
}

bool delalloc_is_fresh(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    return places_are(delalloc, start, end, PLACE_FRESH, PLACE_FRESH);
}

uint64_t delalloc_wrote(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    uint64_t fresh_end = end;

    for (uint64_t at = start; at < end; at = place_next(delalloc, at)) {
        uint8_t fresh = PLACE_FRESH;

        if (atomic_compare_exchange_strong(delalloc_place(delalloc, at), &fresh, PLACE_WRITTEN))
            fresh_end = place_next(delalloc, at);
    }
    return max_of(end, fresh_end);
}

// ---- Space

void delalloc_refresh(struct delalloc *delalloc)
{
    int64_t max_delayed = atomic_load(&delalloc->is_refused) ? 0 : INT64_MAX;

    space_refresh(delalloc->cache->space, delalloc->space_fd);
    if (!atomic_load(&delalloc->is_tight) || atomic_load(&delalloc->cannot_allocate))
        atomic_store(&delalloc->cache->max_delayed, max_delayed);
}

void delalloc_set_tight(struct delalloc *delalloc)
{
    atomic_store(&delalloc->is_tight, true);
    if (!atomic_load(&delalloc->cannot_allocate))
        atomic_store(&delalloc->cache->max_delayed, 0);
}

int64_t delalloc_promise(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    struct space *space = delalloc->cache->space;
    int64_t nr_pages =
        (int64_t)((round_up(end, CACHE_PAGE_BYTES) - round_down(start, CACHE_PAGE_BYTES)) / CACHE_PAGE_BYTES);

    if (atomic_fetch_add(&space->nr_promised, nr_pages) + nr_pages <= atomic_load(&space->max_promised))
        return nr_pages;
    atomic_fetch_sub(&space->nr_promised, nr_pages);
    return 0;
}

void delalloc_promise_kept(struct delalloc *delalloc, int64_t nr_pages)
{
    struct space *space = delalloc->cache->space;

    atomic_fetch_sub(&space->max_promised, nr_pages); // until the file system is asked again
    atomic_fetch_sub(&space->nr_promised, nr_pages);
}

// ---- Allocation

// What the mapper gave of [start, end) at once, or a negative errno. It may turn out that it cannot_allocate.
static int64_t call_map(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    struct extent ext;
    int ret = map_extent(delalloc->map, start, end - start, true, true, &ext);
    bool is_refused = ret == -ENOSPC || ret == -EDQUOT;

    atomic_fetch_add(&delalloc->nr_map_calls, 1);
    if (!ret && ext.state == EXTENT_HOLE)
        atomic_store(&delalloc->cannot_allocate, true);
    if (ret >= 0 || is_refused)
        atomic_store(&delalloc->is_refused, is_refused); // A5
    // A full file system may refuse what needs no space, too.
    if (is_refused && !map_extent(delalloc->map, start, end - start, false, true, &ext) &&
        ext.state == EXTENT_MAPPED)
        return (int64_t)ext.len_bytes;
    return ret < 0 ? ret : (int64_t)ext.len_bytes;
}

// The last page may be longer than the device.
static uint64_t pages_end(const struct delalloc *delalloc, uint64_t end)
{
    return end == delalloc->size_bytes ? round_up(end, CACHE_PAGE_BYTES) : end;
}

// All of [start, end). *at: how far it came.
static int allocate_range(struct delalloc *delalloc, uint64_t start, uint64_t end, uint64_t *at)
{
    for (*at = start; *at < end;) {
        uint64_t nr_punches_then = nr_punches(delalloc);
        int64_t got = call_map(delalloc, *at, end);

        if (got < 0)
            return (int)got;
        if (atomic_load(&delalloc->cannot_allocate)) { // A6
            delalloc_punch(delalloc, *at, *at + (uint64_t)got);
            page_cache_place(delalloc->cache, round_down(*at, CACHE_PAGE_BYTES),
                             pages_end(delalloc, *at + (uint64_t)got), false);
            *at += (uint64_t)got;
            continue;
        }
        atomic_fetch_add(&delalloc->nr_allocated_bytes, (uint64_t)got);
        delalloc_refresh(delalloc); // A2
        if (places_allocated(delalloc, *at, *at + (uint64_t)got, nr_punches_then))
            page_cache_place(delalloc->cache, round_down(*at, CACHE_PAGE_BYTES),
                             pages_end(delalloc, *at + (uint64_t)got), true);
        *at += (uint64_t)got;
    }
    return 0;
}

static bool needs_none(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    struct extent ext;

    return !map_extent(delalloc->map, start, end - start, false, true, &ext) && ext.state != EXTENT_HOLE &&
           ext.len_bytes == end - start;
}

// A6. As delalloc_create_now(), which has promised it.
static int has_space(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    struct space *space = delalloc->cache->space;

    if (needs_none(delalloc, start, end))
        return 0;
    delalloc_refresh(delalloc);
    return atomic_load(&space->nr_promised) <= atomic_load(&space->max_promised) ? 1 : -ENOSPC;
}

int delalloc_create_now(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    struct page_cache *cache = delalloc->cache;
    int64_t nr_pages = (int64_t)(round_up(end - start, CACHE_PAGE_BYTES) / CACHE_PAGE_BYTES);
    uint64_t at;
    int ret;

    // A2: promised to this write, until the file system has been asked again.
    atomic_fetch_add(&cache->space->nr_promised, nr_pages);
    ret = space_check(cache->space, delalloc->space_fd, atomic_load(&cache->nr_delayed), nr_pages);
    if (ret < 0 && needs_none(delalloc, start, end))
        ret = 0;
    if (!ret)
        ret = allocate_range(delalloc, start, end, &at);
    if (!ret && atomic_load(&delalloc->cannot_allocate))
        ret = has_space(delalloc, start, end);
    atomic_fetch_sub(&cache->space->nr_promised, nr_pages);
    return ret;
}

struct run {
    uint64_t start, end; // of DELAYED pages
    uint64_t first_end;  // of the first of them without a gap
    int64_t nr_pages;    // that are DELAYED
    bool has_neighbours;
};

static bool is_full_between(struct delalloc *delalloc, uint64_t start, uint64_t end)
{
    for (uint64_t at = start; at < end; at = place_next(delalloc, at)) {
        if (round_down(at, place_bytes(delalloc)) >= start && place_end(delalloc, at) <= end &&
            atomic_load(delalloc_place(delalloc, at)) >= PLACE_FRESH)
            return true;
    }
    return false;
}

// The DELAYED pages from offset on, with gaps that rounding to units closes, up to what has its place.
static struct run find_run(struct delalloc *delalloc, uint64_t offset)
{
    uint64_t unit = delalloc->unit_bytes;
    struct run run = {.start = offset, .end = offset + CACHE_PAGE_BYTES, .nr_pages = 1};
    struct dirty_at next;

    run.first_end = run.end;
    while (run.end - run.start < MAX_RUN_BYTES &&
           page_cache_find(delalloc->cache, run.end, round_up(run.end, unit) + unit, true, &next)) {
        if (next.offset != run.end &&
            (unit == CACHE_PAGE_BYTES || round_down(next.offset, unit) > round_up(run.end, unit) ||
             is_full_between(delalloc, run.end, next.offset)))
            break;
        if (next.offset != run.end)
            run.has_neighbours = true;
        run.end = next.offset + CACHE_PAGE_BYTES;
        run.nr_pages++;
        if (!run.has_neighbours)
            run.first_end = run.end;
    }
    return run;
}

// Whether the run is in a unit that has something already, or close behind one that has all: the file is
// being filled there, and what this run took alone would be a piece of its own for ever.
static bool has_begun(struct delalloc *delalloc, const struct run *run)
{
    uint64_t unit = delalloc->unit_bytes, start = round_down(run->start, unit);
    uint64_t end = min_of(round_up(run->end, unit), delalloc->size_bytes);

    for (unsigned i = 1; i <= NEAR_UNITS && start >= i * unit; i++) {
        if (places_are(delalloc, start - i * unit, start - (i - 1) * unit, PLACE_FRESH, PLACE_FULL))
            return true;
    }
    for (uint64_t at = start; at < end; at = place_next(delalloc, at)) {
        uint8_t known = atomic_load(delalloc_place(delalloc, at));

        if (known != PLACE_EMPTY && known != PLACE_UNKNOWN)
            return true;
    }
    return false;
}

// Rounds a run out, but not into places that need no more.
static void round_run(struct delalloc *delalloc, const struct run *run, uint64_t *start, uint64_t *end)
{
    uint64_t unit = delalloc->unit_bytes;

    // Nothing else was written close by: a file of specks stays small.
    if (!run->has_neighbours && run->end - run->start < unit && !has_begun(delalloc, run))
        unit = min_of(unit, LONE_BYTES);
    *start = round_down(run->start, unit);
    *end = min_of(round_up(run->end, unit), delalloc->size_bytes);
    while (place_end(delalloc, *start) <= run->start &&
           atomic_load(delalloc_place(delalloc, *start)) >= PLACE_FRESH)
        *start = place_next(delalloc, *start);
    while (round_down(*end - 1, place_bytes(delalloc)) >= run->end &&
           atomic_load(delalloc_place(delalloc, *end - 1)) >= PLACE_FRESH)
        *end = round_down(*end - 1, place_bytes(delalloc));
}

// What the file system can give beyond what is promised, in whole units.
static uint64_t room_bytes(struct delalloc *delalloc)
{
    struct page_cache *cache = delalloc->cache;
    int64_t left = atomic_load(&cache->space->max_promised) - atomic_load(&cache->space->nr_promised);

    left = min_of(left, atomic_load(&cache->max_delayed) - atomic_load(&cache->nr_delayed));

    left = left < 0 ? 0 : (int64_t)min_of((uint64_t)left, MAX_RUN_BYTES / CACHE_PAGE_BYTES * 2);
    return round_down((uint64_t)left * CACHE_PAGE_BYTES, delalloc->unit_bytes);
}

int delalloc_allocate(struct delalloc *delalloc, uint64_t offset, uint64_t *end)
{
    struct run run = find_run(delalloc, offset);
    uint64_t page_end = min_of(offset + CACHE_PAGE_BYTES, delalloc->size_bytes);
    uint64_t start, at = offset;
    _Atomic int64_t *nr_promised = &delalloc->cache->space->nr_promised;
    int ret;

    atomic_fetch_add(&delalloc->nr_runs, 1);
    round_run(delalloc, &run, &start, end);
    *end = min_of(*end, start + room_bytes(delalloc));
    if (*end >= page_end && !atomic_load(&delalloc->cannot_allocate)) {
        // A2: nobody gets what rounding takes.
        int64_t extra = (int64_t)((*end - start) / CACHE_PAGE_BYTES) - run.nr_pages;

        extra = max_of(extra, 0);
        atomic_fetch_add(nr_promised, extra);
        ret = allocate_range(delalloc, start, *end, &at);
        atomic_fetch_sub(nr_promised, extra);
        if (!ret || at >= page_end)
            return 0; // the rest has its turn
    }
    // Not so much: exactly what was asked.
    *end = min_of(run.first_end, delalloc->size_bytes);
    ret = allocate_range(delalloc, offset, *end, &at);
    return at >= page_end ? 0 : ret;
}

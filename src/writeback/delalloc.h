// Delayed allocation: what is known of the map without asking it, what may be promised to writes into
// holes, and how delayed pages get their places with few calls.
//
//  A1. A write is taken only where the place is known (not UNKNOWN): what has no space below for certain
//      is DELAYED, and a DELAYED page is a promise that max_delayed bounds.
//  A2. What is promised, by all devices on that file system (space.h), is less than what it had free when
//      it was last asked, with a margin for its own metadata. It is asked again before promises that were
//      kept are given back. Nothing is allocated of what was promised to another device. Zeroes that take
//      space are promised it as well: what they take is not that of pages.
//  A3. What is known changes to "takes no space" before a hole is punched, and from "takes space" never
//      the other way round behind a punch that came meanwhile (nr_punches).
//  A4. FRESH: allocated, and nothing was ever written there. Only write-back writes below in such places,
//      by one thread at a time, so what is FRESH reads as zeroes until that thread says otherwise; it is
//      WRITTEN from then on, because zeroes around what was written may be under way for long.
//  A5. When the map refuses space that the file system had told of (a quota, a share of a pool), nothing is
//      promised until it has given some: each write is told whether there is space for it.
//  A6. Where the map cannot allocate, the write below does: its page stays promised until then (P4), and
//      its place stays one of HOLES.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "map/map.h"
#include "writeback/page_cache.h"

enum place {
    PLACE_UNKNOWN,
    PLACE_HOLES, // some of it may need space
    PLACE_EMPTY, // a hole as a whole
    PLACE_FRESH, // A4
    PLACE_WRITTEN,
    PLACE_FULL, // takes no more space, and who writes there may pass the cache by (wb.h W5)
};

struct delalloc {
    struct page_cache *cache;
    struct map *map;
    int space_fd;         // of the file system that gives the space, or -1
    uint64_t size_bytes;  // of the device
    uint64_t unit_bytes;  // allocations are rounded to it where neighbours are likely to come
    unsigned place_shift; // bytes of a place, as a power of two
    uint64_t nr_places;
    _Atomic uint8_t *places;     // enum place
    pthread_mutex_t lock;        // of changes of places that A3 is about
    uint64_t nr_punches;         // lock
    atomic_bool is_tight;        // A2: nothing is promised until delalloc_refresh()
    atomic_bool is_refused;      // A5
    atomic_bool cannot_allocate; // A6, latched
    _Atomic uint64_t nr_map_calls, nr_runs, nr_allocated_bytes;
};

// unit_bytes: a power of two, a page or more. 0 or -ENOMEM.
int delalloc_create(struct delalloc *delalloc, struct page_cache *cache, struct map *map, int space_fd,
                    uint64_t size_bytes, uint64_t unit_bytes);
void delalloc_destroy(struct delalloc *delalloc);

static inline _Atomic uint8_t *delalloc_place(struct delalloc *delalloc, uint64_t offset)
{
    return &delalloc->places[offset >> delalloc->place_shift];
}

// For page_cache_write().
bool delalloc_needs_space(void *place);

// Asks the map about the place at offset, and as far as it answers. On a worker. 0 or a negative errno.
int delalloc_look_up(struct delalloc *delalloc, uint64_t offset);

// Asks the file system what it can give (A2). On a worker, or before anything is cached.
void delalloc_refresh(struct delalloc *delalloc);

// Nothing is promised any more; a refresh ends it.
void delalloc_set_tight(struct delalloc *delalloc);

// Space for [start, end) now, exactly. On a worker. 0, a negative errno, or 1: there is some, to be
// promised (A6).
int delalloc_create_now(struct delalloc *delalloc, uint64_t start, uint64_t end);

// Finds places for the run of DELAYED pages that begins with the page at offset, and for others close by.
// On a worker. 0: that page is not DELAYED any more, or was changed meanwhile: look again. A negative
// errno: [offset, *end) has no place.
int delalloc_allocate(struct delalloc *delalloc, uint64_t offset, uint64_t *end);

// A promise of space for all of [start, end), for what does not go through the cache, in pages. 0: there is
// not so much. Any thread.
int64_t delalloc_promise(struct delalloc *delalloc, uint64_t start, uint64_t end);

// What was promised has been taken. Any thread.
void delalloc_promise_kept(struct delalloc *delalloc, int64_t nr_pages);

// [start, end) is about to be punched or zeroed: A3.
void delalloc_punch(struct delalloc *delalloc, uint64_t start, uint64_t end);

// Write-back writes [start, end): not FRESH any more. Returns the end of what was FRESH up to there and
// goes on behind end, or end.
uint64_t delalloc_wrote(struct delalloc *delalloc, uint64_t start, uint64_t end);

// Whether all of [start, end) is FULL.
bool delalloc_is_full(struct delalloc *delalloc, uint64_t start, uint64_t end);

// Whether all of [start, end) is FRESH.
bool delalloc_is_fresh(struct delalloc *delalloc, uint64_t start, uint64_t end);

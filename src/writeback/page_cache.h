// The page cache of write-back: what was written and is not below yet. Pages of 4 KiB stand in chunks of
// 16, chunks in a tree by their number. It knows nothing of devices, maps and I/O.
//
//  P1. A page has a frame of memory while it is dirty or under write-back, and no longer: what is clean
//      is below, where readers find it.
//  P2. Sectors have their own valid and dirty bits: a write of whole sectors reads nothing.
//  P3. What is under write-back does not change: a write to such a page goes to a copy (COPIED), and the
//      page's old frame lives until its last write-back is over.
//  P4. nr_delayed is the reservation, in pages: a page is RESERVED exactly as long as it is counted there,
//      and in the nr_promised of its space. What is DELAYED is RESERVED; where only the write below takes
//      the space, it stays so until that is done.
//  P5. Memory is bounded by what the cache was created with, bookkeeping included: there is a chunk for
//      every frame, which is the worst case, and it is taken when it is touched.
//
// Lock order: a shard's lock, then pool_lock. Nobody holds two shards.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "writeback/space.h"

#define CACHE_PAGE_BYTES 4096U
#define CACHE_CHUNK_PAGES 16U
#define CACHE_CHUNK_BYTES (CACHE_CHUNK_PAGES * CACHE_PAGE_BYTES)
#define CACHE_NR_SHARDS 16U
#define CACHE_REGION_CHUNKS 64U // neighbours share a shard: 4 MiB

enum page_flags {
    PAGE_DELAYED = 1 << 0, // has no place below yet
    PAGE_COPIED = 1 << 1,  // P3: frame is newer than what is under write-back
    PAGE_FAILED = 1 << 2,  // its last write-back failed
    PAGE_RESERVED = 1 << 3,
};

struct cache_page {
    uint32_t frame; // 0: none
    uint8_t valid, dirty;
    uint8_t flags;
    uint8_t nr_writeback; // page_refs that are out
};

struct cache_chunk {
    uint64_t number;      // its bytes begin at number * CACHE_CHUNK_BYTES
    uint32_t left, right; // in the tree; left: the next free one
    uint32_t nr_pages;    // with a frame
    struct cache_page pages[CACHE_CHUNK_PAGES];
};

struct cache_shard {
    _Alignas(64) pthread_mutex_t lock;
    uint32_t root;     // of a treap: by number, and by a hash of it
    uint32_t last;     // the chunk that was found last
    uint64_t nr_drops; // pages that have gone
};

struct page_cache {
    uint32_t sector_bytes; // 512 to 4096: what the image below takes whole
    uint32_t nr_frames;    // in all
    uint64_t seed;         // of the tree's hash: nobody outside can make it degenerate
    struct cache_shard shards[CACHE_NR_SHARDS];
    struct cache_chunk *chunks; // [0] is not used, as 0 means none
    char *frames;
    size_t chunks_bytes, frames_bytes;

    pthread_mutex_t pool_lock;
    uint32_t free_frame, nr_fresh_frames; // a list, and what was never used
    uint32_t free_chunk, nr_fresh_chunks;

    // In pages. Read by any thread.
    atomic_uint nr_used; // frames, with those of P3
    atomic_uint nr_dirty;
    _Atomic int64_t nr_delayed;  // P4
    _Atomic int64_t max_delayed; // what may be promised, and no more than space has
    struct space *space;         // before anything is DELAYED; NULL: without an end
    atomic_uint nr_failed;
};

// size_bytes: of memory. 0 or -ENOMEM.
int page_cache_create(struct page_cache *cache, uint64_t size_bytes, uint32_t sector_bytes);
void page_cache_destroy(struct page_cache *cache);

// What the image holds of a sector that is written in part: read below when the cache had dropped
// nr_drops pages there (page_cache_drops()).
struct cache_fill {
    uint64_t offset;
    const void *data;
    uint64_t nr_drops;
};
uint64_t page_cache_drops(struct page_cache *cache, uint64_t offset);

// Writes [offset, offset + len) from iov (NULL: zeroes); the range lies in one chunk. needs_space is
// asked with place whether a page that comes in is DELAYED, under the lock that page_cache_drop()
// takes. Returns the bytes that were taken, from the front, or
//   -EAGAIN  the first sector is written in part and not here: come again with a fill
//   -ESTALE  the fill is older than what was dropped: read it again
//   -ENOMEM  no frame is free
//   -ENOSPC  max_delayed
int page_cache_write(struct page_cache *cache, uint64_t offset, uint32_t len, const struct iovec *iov,
                     bool (*needs_space)(void *place), void *place, const struct cache_fill *fill);

// How far the state of offset's sector goes, at most to offset + len: cached, then it is copied to iov;
// or not.
uint64_t page_cache_read(struct page_cache *cache, uint64_t offset, uint64_t len, const struct iovec *iov,
                         bool *is_cached);

// The same without the copy; is_delayed: of a cached one.
uint64_t page_cache_look(struct page_cache *cache, uint64_t offset, uint64_t len, bool *is_cached,
                         bool *is_delayed);

// Forgets the whole sectors of the range, which is not under write-back. Returns the frames that came free.
unsigned page_cache_drop(struct page_cache *cache, uint64_t offset, uint64_t len);

// ---- For write-back, by one thread at a time

struct dirty_at {
    uint64_t offset; // of the sector, or of the page when it was asked for DELAYED
    bool is_delayed;
    bool is_busy; // P3: to be written once its older self has been
};

// The first dirty sector in [from, end), or with only_delayed the first DELAYED page that is not wholly
// before from. false: there is none.
bool page_cache_find(struct page_cache *cache, uint64_t from, uint64_t end, bool only_delayed,
                     struct dirty_at *at);

// [start, end) has its place below: clears DELAYED of the pages that lie in it, and where it has its space as
// well (is_allocated) RESERVED.
void page_cache_place(struct page_cache *cache, uint64_t start, uint64_t end, bool is_allocated);

struct page_ref {
    uint32_t chunk, frame;
    uint8_t page, dirty;
};

struct page_vec {
    struct iovec *iov;
    struct page_ref *refs;
    unsigned nr_iov, max_iov, nr_refs, max_refs;
};

// Puts the dirty sectors from exactly offset on under write-back, up to end, a sector that is not dirty,
// is busy or DELAYED, or a full vec. Returns their bytes.
uint64_t page_cache_take(struct page_cache *cache, uint64_t offset, uint64_t end, struct page_vec *vec);

// Their write-back is over. error: they are dirty again. Any thread. Returns the frames that came free.
unsigned page_cache_written(struct page_cache *cache, const struct page_ref *refs, unsigned nr_refs,
                            int error);

// Marks the dirty pages of the range as FAILED (no place was to be had).
void page_cache_fail(struct page_cache *cache, uint64_t start, uint64_t end);

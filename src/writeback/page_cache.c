#include "writeback/page_cache.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "util/iov.h"
#include "util/util.h"

#define NO_CHUNK UINT64_MAX

static struct cache_shard *shard_of(struct page_cache *cache, uint64_t number)
{
    return &cache->shards[number / CACHE_REGION_CHUNKS % CACHE_NR_SHARDS];
}

static char *frame_mem(const struct page_cache *cache, uint32_t frame)
{
    return cache->frames + (size_t)frame * CACHE_PAGE_BYTES;
}

static uint64_t chunk_offset(const struct cache_chunk *chunk)
{
    return chunk->number * CACHE_CHUNK_BYTES;
}

// ---- The pool (pool_lock)

// 0: none is free.
static uint32_t frame_get(struct page_cache *cache)
{
    uint32_t frame;

    pthread_mutex_lock(&cache->pool_lock);
    frame = cache->free_frame;
    if (frame)
        memcpy(&cache->free_frame, frame_mem(cache, frame), sizeof(frame));
    else if (cache->nr_fresh_frames)
        frame = cache->nr_frames - --cache->nr_fresh_frames;
    pthread_mutex_unlock(&cache->pool_lock);
    if (frame)
        atomic_fetch_add(&cache->nr_used, 1);
    return frame;
}

static void frame_put(struct page_cache *cache, uint32_t frame)
{
    pthread_mutex_lock(&cache->pool_lock);
    memcpy(frame_mem(cache, frame), &cache->free_frame, sizeof(frame));
    cache->free_frame = frame;
    pthread_mutex_unlock(&cache->pool_lock);
    atomic_fetch_sub(&cache->nr_used, 1);
}

// There is one for every frame, and another one for a page that comes in.
static uint32_t chunk_get(struct page_cache *cache)
{
    uint32_t index;

    pthread_mutex_lock(&cache->pool_lock);
    index = cache->free_chunk;
    if (index)
        cache->free_chunk = cache->chunks[index].left;
    else
        index = cache->nr_frames + CACHE_NR_SHARDS - --cache->nr_fresh_chunks;
    pthread_mutex_unlock(&cache->pool_lock);
    return index;
}

static void chunk_put(struct page_cache *cache, uint32_t index)
{
    pthread_mutex_lock(&cache->pool_lock);
    cache->chunks[index].left = cache->free_chunk;
    cache->free_chunk = index;
    pthread_mutex_unlock(&cache->pool_lock);
}

// ---- The tree of a shard (its lock)

static uint64_t tree_rank(const struct page_cache *cache, uint32_t index)
{
    uint64_t z = cache->chunks[index].number ^ cache->seed; // splitmix64

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static uint32_t tree_find(struct page_cache *cache, struct cache_shard *shard, uint64_t number)
{
    uint32_t index = shard->last;

    if (index && cache->chunks[index].number == number)
        return index;
    for (index = shard->root; index && cache->chunks[index].number != number;)
        index = number < cache->chunks[index].number ? cache->chunks[index].left : cache->chunks[index].right;
    if (index)
        shard->last = index;
    return index;
}

// The chunk with the smallest number that is not below number.
static uint32_t tree_find_next(const struct page_cache *cache, const struct cache_shard *shard,
                               uint64_t number)
{
    uint32_t best = 0;

    for (uint32_t index = shard->root; index;) {
        const struct cache_chunk *chunk = &cache->chunks[index];

        if (chunk->number < number) {
            index = chunk->right;
        } else {
            best = index;
            index = chunk->left;
        }
    }
    return best;
}

static uint32_t tree_insert(struct page_cache *cache, struct cache_shard *shard, uint64_t number)
{
    uint32_t new = chunk_get(cache), *at = &shard->root, *left, *right, index;
    struct cache_chunk *chunk = &cache->chunks[new];
    uint64_t rank;

    memset(chunk, 0, sizeof(*chunk));
    chunk->number = number;
    rank = tree_rank(cache, new);
    while (*at && tree_rank(cache, *at) >= rank)
        at = number < cache->chunks[*at].number ? &cache->chunks[*at].left : &cache->chunks[*at].right;
    index = *at;
    *at = new;
    left = &chunk->left;
    right = &chunk->right;
    while (index) {
        struct cache_chunk *other = &cache->chunks[index];

        if (other->number < number) {
            *left = index;
            left = &other->right;
            index = other->right;
        } else {
            *right = index;
            right = &other->left;
            index = other->left;
        }
    }
    *left = *right = 0;
    shard->last = new;
    return new;
}

static void tree_remove(struct page_cache *cache, struct cache_shard *shard, uint32_t index)
{
    uint64_t number = cache->chunks[index].number;
    uint32_t *at = &shard->root, left = cache->chunks[index].left, right = cache->chunks[index].right;

    while (*at != index)
        at = number < cache->chunks[*at].number ? &cache->chunks[*at].left : &cache->chunks[*at].right;
    while (left && right) {
        if (tree_rank(cache, left) >= tree_rank(cache, right)) {
            *at = left;
            at = &cache->chunks[left].right;
            left = *at;
        } else {
            *at = right;
            at = &cache->chunks[right].left;
            right = *at;
        }
    }
    *at = left ? left : right;
    if (shard->last == index)
        shard->last = 0;
    chunk_put(cache, index);
}

// ---- Beginning and end

int page_cache_create(struct page_cache *cache, uint64_t size_bytes, uint32_t sector_bytes)
{
    // P5
    uint64_t nr_frames = size_bytes / (CACHE_PAGE_BYTES + sizeof(struct cache_chunk));

    *cache = (struct page_cache){.sector_bytes = sector_bytes};
    cache->nr_frames = (uint32_t)min_of(nr_frames, UINT32_MAX - 2 * CACHE_NR_SHARDS);
    if (!cache->nr_frames)
        return -ENOMEM;
    cache->nr_fresh_frames = cache->nr_frames;
    cache->nr_fresh_chunks = cache->nr_frames + CACHE_NR_SHARDS;
    cache->frames_bytes = ((size_t)cache->nr_frames + 1) * CACHE_PAGE_BYTES;
    cache->chunks_bytes = ((size_t)cache->nr_frames + CACHE_NR_SHARDS + 1) * sizeof(*cache->chunks);
    cache->frames = mmap(NULL, cache->frames_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache->frames == MAP_FAILED)
        return -ENOMEM;
    cache->chunks = mmap(NULL, cache->chunks_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache->chunks == MAP_FAILED) {
        munmap(cache->frames, cache->frames_bytes);
        return -ENOMEM;
    }
    // Frames are used from the front on: a huge page is one fault instead of 512, and soon full.
    madvise(cache->frames, cache->frames_bytes, MADV_HUGEPAGE);
    madvise(cache->chunks, cache->chunks_bytes, MADV_NOHUGEPAGE);
    if (getrandom(&cache->seed, sizeof(cache->seed), GRND_NONBLOCK) < 0)
        cache->seed = util_now_ns();
    for (unsigned i = 0; i < CACHE_NR_SHARDS; i++)
        pthread_mutex_init(&cache->shards[i].lock, NULL);
    pthread_mutex_init(&cache->pool_lock, NULL);
    atomic_store(&cache->max_delayed, INT64_MAX);
    return 0;
}

void page_cache_destroy(struct page_cache *cache)
{
    for (unsigned i = 0; i < CACHE_NR_SHARDS; i++)
        pthread_mutex_destroy(&cache->shards[i].lock);
    pthread_mutex_destroy(&cache->pool_lock);
    munmap(cache->frames, cache->frames_bytes);
    munmap(cache->chunks, cache->chunks_bytes);
}

// ---- Pages (their shard's lock)

// Bits of the whole sectors in [start, end) of a page.
static uint8_t sector_bits(const struct page_cache *cache, uint64_t start, uint64_t end)
{
    unsigned first = (unsigned)((start + cache->sector_bytes - 1) / cache->sector_bytes);
    unsigned last = (unsigned)(end / cache->sector_bytes);

    return first < last ? (uint8_t)(((1U << last) - 1) & ~((1U << first) - 1)) : 0;
}

// Bits of all sectors that [start, end) touches.
static uint8_t touched_bits(const struct page_cache *cache, uint64_t start, uint64_t end)
{
    return sector_bits(cache, round_down(start, cache->sector_bytes), round_up(end, cache->sector_bytes));
}

// P4. -ENOSPC: not so many.
static int reserve(struct page_cache *cache)
{
    struct space *space = cache->space;

    if (atomic_fetch_add(&cache->nr_delayed, 1) >=
        atomic_load_explicit(&cache->max_delayed, memory_order_relaxed))
        goto out;
    if (!space)
        return 0;
    if (atomic_fetch_add(&space->nr_promised, 1) <
        atomic_load_explicit(&space->max_promised, memory_order_relaxed))
        return 0;
    atomic_fetch_sub(&space->nr_promised, 1);
out:
    atomic_fetch_sub(&cache->nr_delayed, 1);
    return -ENOSPC;
}

static void unreserve(struct page_cache *cache)
{
    atomic_fetch_sub(&cache->nr_delayed, 1);
    if (cache->space)
        atomic_fetch_sub(&cache->space->nr_promised, 1);
}

static void page_set_flag(struct page_cache *cache, struct cache_page *page, uint8_t flag, bool is_set)
{
    if (!!(page->flags & flag) == is_set)
        return;
    page->flags ^= flag;
    if (flag == PAGE_RESERVED)
        unreserve(cache); // set by page_enter() alone
    else if (flag == PAGE_FAILED)
        atomic_fetch_add(&cache->nr_failed, is_set ? 1U : -1U);
}

// A page comes in. 0, -ENOMEM or -ENOSPC.
static int page_enter(struct page_cache *cache, struct cache_chunk *chunk, struct cache_page *page,
                      bool is_delayed)
{
    if (is_delayed && reserve(cache) < 0)
        return -ENOSPC;
    page->frame = frame_get(cache);
    if (!page->frame) {
        if (is_delayed)
            unreserve(cache);
        return -ENOMEM;
    }
    page->flags = is_delayed ? PAGE_DELAYED | PAGE_RESERVED : 0;
    chunk->nr_pages++;
    atomic_fetch_add(&cache->nr_dirty, 1);
    return 0;
}

// A page goes (P1). The chunk stays until chunk_leave().
static void page_leave(struct page_cache *cache, struct cache_chunk *chunk, struct cache_page *page)
{
    // Its write has taken what was promised, which the file system told of when it was asked last.
    if (cache->space && (page->flags & (PAGE_DELAYED | PAGE_RESERVED)) == PAGE_RESERVED)
        atomic_fetch_sub(&cache->space->max_promised, 1);
    page_set_flag(cache, page, PAGE_RESERVED, false);
    page_set_flag(cache, page, PAGE_FAILED, false);
    frame_put(cache, page->frame);
    *page = (struct cache_page){0};
    chunk->nr_pages--;
    atomic_fetch_sub(&cache->nr_dirty, 1);
}

static void chunk_leave(struct page_cache *cache, struct cache_shard *shard, uint32_t index)
{
    shard->nr_drops++;
    if (!cache->chunks[index].nr_pages)
        tree_remove(cache, shard, index);
}

// Makes room for a write to the page. 0, -ENOMEM or -ENOSPC.
static int page_prepare(struct page_cache *cache, struct cache_chunk *chunk, struct cache_page *page,
                        bool (*needs_space)(void *place), void *place)
{
    uint32_t copy;

    if (!page->frame)
        return page_enter(cache, chunk, page, needs_space(place));
    if (!page->nr_writeback || (page->flags & PAGE_COPIED))
        return 0;
    copy = frame_get(cache); // P3
    if (!copy)
        return -ENOMEM;
    memcpy(frame_mem(cache, copy), frame_mem(cache, page->frame), CACHE_PAGE_BYTES);
    page->frame = copy;
    page->flags |= PAGE_COPIED;
    return 0;
}

// [start, end) of a page. Returns the bytes that were taken, or as page_cache_write().
static int page_write(struct page_cache *cache, struct cache_chunk *chunk, struct cache_page *page,
                      uint32_t start, uint32_t end, const struct iovec *iov, size_t skip,
                      bool (*needs_space)(void *place), void *place, const void *fill)
{
    uint32_t sector_bytes = cache->sector_bytes;
    uint8_t partial = touched_bits(cache, start, end) & (uint8_t)~sector_bits(cache, start, end);
    int ret;

    partial &= (uint8_t)~page->valid;
    if (partial && !fill) {
        // Up to the one at the end, or nothing.
        if (partial & touched_bits(cache, start, start + 1))
            return -EAGAIN;
        end = (uint32_t)round_down(end, sector_bytes);
    }
    ret = page_prepare(cache, chunk, page, needs_space, place);
    if (ret < 0)
        return ret;
    if (partial && fill) {
        memcpy(frame_mem(cache, page->frame) + round_down(start, sector_bytes), fill, sector_bytes);
        page->valid |= partial;
    }
    if (iov)
        iov_to_buf(iov, skip, frame_mem(cache, page->frame) + start, end - start);
    else
        memset(frame_mem(cache, page->frame) + start, 0, end - start);
    page->valid |= touched_bits(cache, start, end);
    page->dirty |= touched_bits(cache, start, end);
    return (int)(end - start);
}

uint64_t page_cache_drops(struct page_cache *cache, uint64_t offset)
{
    struct cache_shard *shard = shard_of(cache, offset / CACHE_CHUNK_BYTES);
    uint64_t nr_drops;

    pthread_mutex_lock(&shard->lock);
    nr_drops = shard->nr_drops;
    pthread_mutex_unlock(&shard->lock);
    return nr_drops;
}

int page_cache_write(struct page_cache *cache, uint64_t offset, uint32_t len, const struct iovec *iov,
                     bool (*needs_space)(void *place), void *place, const struct cache_fill *fill)
{
    uint64_t number = offset / CACHE_CHUNK_BYTES;
    struct cache_shard *shard = shard_of(cache, number);
    uint32_t at = (uint32_t)(offset % CACHE_CHUNK_BYTES), end = at + len, index;
    int ret = 0, done = 0;

    assert(len && end <= CACHE_CHUNK_BYTES);
    pthread_mutex_lock(&shard->lock);
    if (fill && fill->nr_drops != shard->nr_drops) {
        pthread_mutex_unlock(&shard->lock);
        return -ESTALE;
    }
    index = tree_find(cache, shard, number);
    if (!index)
        index = tree_insert(cache, shard, number);
    while (at < end && ret >= 0) {
        struct cache_chunk *chunk = &cache->chunks[index];
        uint32_t page = at / CACHE_PAGE_BYTES, start = at % CACHE_PAGE_BYTES;
        uint32_t n = min_of(CACHE_PAGE_BYTES - start, end - at);

        ret = page_write(cache, chunk, &chunk->pages[page], start, start + n, iov, (size_t)done, needs_space,
                         place, fill ? fill->data : NULL);
        if (ret < 0)
            break;
        at += (uint32_t)ret;
        done += ret;
        if ((uint32_t)ret < n)
            break;
    }
    if (!cache->chunks[index].nr_pages)
        tree_remove(cache, shard, index);
    pthread_mutex_unlock(&shard->lock);
    return done ? done : ret;
}

// ---- Looking

static bool sector_is_cached(const struct cache_page *page, unsigned sector)
{
    return page->frame && (page->valid & 1U << sector);
}

// How far the state at offset goes in its chunk.
static uint32_t chunk_run(const struct page_cache *cache, const struct cache_chunk *chunk, uint32_t at,
                          uint32_t end, bool *is_cached, bool *is_delayed)
{
    uint32_t first = at;

    while (at < end) {
        const struct cache_page *page = &chunk->pages[at / CACHE_PAGE_BYTES];
        bool is_here = sector_is_cached(page, at % CACHE_PAGE_BYTES / cache->sector_bytes);
        bool is_here_delayed = is_here && (page->flags & PAGE_DELAYED);

        if (at == first) {
            *is_cached = is_here;
            *is_delayed = is_here_delayed;
        } else if (is_here != *is_cached || is_here_delayed != *is_delayed) {
            break;
        }
        at = (uint32_t)round_down(at, page->frame ? cache->sector_bytes : CACHE_PAGE_BYTES) +
             (page->frame ? cache->sector_bytes : CACHE_PAGE_BYTES);
    }
    return min_of(at, end) - first;
}

static void chunk_copy(const struct page_cache *cache, const struct cache_chunk *chunk, uint32_t at,
                       uint32_t len, const struct iovec *iov, size_t skip)
{
    while (len) {
        uint32_t start = at % CACHE_PAGE_BYTES, n = min_of(CACHE_PAGE_BYTES - start, len);

        iov_from_buf(iov, skip, frame_mem(cache, chunk->pages[at / CACHE_PAGE_BYTES].frame) + start, n);
        at += n;
        skip += n;
        len -= n;
    }
}

// The number of the first chunk that is not below number, NO_CHUNK without one.
static uint64_t cache_next_chunk(struct page_cache *cache, uint64_t number)
{
    uint64_t region_end = round_down(number, CACHE_REGION_CHUNKS) + CACHE_REGION_CHUNKS, best = NO_CHUNK;

    // Neighbours are in the same shard, so mostly the first one knows.
    for (unsigned i = 0; i < CACHE_NR_SHARDS; i++) {
        struct cache_shard *shard = shard_of(cache, number + i * CACHE_REGION_CHUNKS);
        uint32_t index;

        pthread_mutex_lock(&shard->lock);
        index = tree_find_next(cache, shard, number);
        if (index)
            best = min_of(best, cache->chunks[index].number);
        pthread_mutex_unlock(&shard->lock);
        if (best < region_end + i * CACHE_REGION_CHUNKS)
            break;
    }
    return best;
}

static uint64_t cache_run(struct page_cache *cache, uint64_t offset, uint64_t len, const struct iovec *iov,
                          bool *is_cached, bool *is_delayed)
{
    uint64_t done = 0;

    *is_cached = *is_delayed = false;
    while (done < len) {
        uint64_t number = (offset + done) / CACHE_CHUNK_BYTES;
        struct cache_shard *shard = shard_of(cache, number);
        uint32_t at = (uint32_t)((offset + done) % CACHE_CHUNK_BYTES), index;
        uint32_t n = (uint32_t)min_of(CACHE_CHUNK_BYTES - at, len - done), run = n;
        bool is_here = false, is_here_delayed = false, is_same;

        pthread_mutex_lock(&shard->lock);
        index = tree_find(cache, shard, number);
        if (index)
            run = chunk_run(cache, &cache->chunks[index], at, at + n, &is_here, &is_here_delayed);
        is_same = !done || (is_here == *is_cached && is_here_delayed == *is_delayed);
        if (is_same && is_here && iov)
            chunk_copy(cache, &cache->chunks[index], at, run, iov, done);
        pthread_mutex_unlock(&shard->lock);
        if (!is_same)
            break;
        *is_cached = is_here;
        *is_delayed = is_here_delayed;
        done += run;
        if (run < n)
            break;
        if (!index && len - done > CACHE_CHUNK_BYTES) { // far to go: not chunk by chunk
            number = cache_next_chunk(cache, number + 1);
            done = number == NO_CHUNK ? len : min_of(len, number * CACHE_CHUNK_BYTES - offset);
        }
    }
    return done;
}

uint64_t page_cache_read(struct page_cache *cache, uint64_t offset, uint64_t len, const struct iovec *iov,
                         bool *is_cached)
{
    bool is_delayed;

    if (!atomic_load_explicit(&cache->nr_dirty, memory_order_acquire)) {
        *is_cached = false;
        return len;
    }
    return cache_run(cache, offset, len, iov, is_cached, &is_delayed);
}

uint64_t page_cache_look(struct page_cache *cache, uint64_t offset, uint64_t len, bool *is_cached,
                         bool *is_delayed)
{
    return cache_run(cache, offset, len, NULL, is_cached, is_delayed);
}

unsigned page_cache_drop(struct page_cache *cache, uint64_t offset, uint64_t len)
{
    uint64_t end = offset + len, number = offset / CACHE_CHUNK_BYTES;
    unsigned nr_freed = 0;

    while ((number = cache_next_chunk(cache, number)) < NO_CHUNK && number * CACHE_CHUNK_BYTES < end) {
        struct cache_shard *shard = shard_of(cache, number);
        uint32_t index;

        pthread_mutex_lock(&shard->lock);
        index = tree_find(cache, shard, number);
        for (unsigned i = 0; index && i < CACHE_CHUNK_PAGES; i++) {
            struct cache_page *page = &cache->chunks[index].pages[i];
            uint64_t page_at = number * CACHE_CHUNK_BYTES + i * CACHE_PAGE_BYTES;
            uint64_t first = max_of(page_at, offset), last = min_of(page_at + CACHE_PAGE_BYTES, end);
            uint8_t bits = first < last ? sector_bits(cache, first - page_at, last - page_at) : 0;

            if (!page->frame || !bits)
                continue;
            page->valid &= (uint8_t)~bits;
            page->dirty &= (uint8_t)~bits;
            if (!page->dirty && !page->nr_writeback) {
                page_leave(cache, &cache->chunks[index], page);
                nr_freed++;
            }
        }
        if (index)
            chunk_leave(cache, shard, index);
        pthread_mutex_unlock(&shard->lock);
        number++;
    }
    return nr_freed;
}

// ---- Write-back

static bool chunk_find(const struct page_cache *cache, const struct cache_chunk *chunk, uint64_t from,
                       bool only_delayed, struct dirty_at *found)
{
    uint64_t at = chunk_offset(chunk);

    for (unsigned i = 0; i < CACHE_CHUNK_PAGES; i++, at += CACHE_PAGE_BYTES) {
        const struct cache_page *page = &chunk->pages[i];
        uint8_t dirty = page->dirty;

        if (at + CACHE_PAGE_BYTES <= from || !page->frame)
            continue;
        if (only_delayed) {
            dirty = page->flags & PAGE_DELAYED;
            found->offset = at;
        } else {
            if (from > at)
                dirty &= sector_bits(cache, from - at, CACHE_PAGE_BYTES);
            if (dirty)
                found->offset = at + (unsigned)__builtin_ctz(dirty) * cache->sector_bytes;
        }
        if (!dirty)
            continue;
        found->is_delayed = page->flags & PAGE_DELAYED;
        found->is_busy = page->flags & PAGE_COPIED;
        return true;
    }
    return false;
}

bool page_cache_find(struct page_cache *cache, uint64_t from, uint64_t end, bool only_delayed,
                     struct dirty_at *found)
{
    uint64_t number = from / CACHE_CHUNK_BYTES;

    while ((number = cache_next_chunk(cache, number)) < NO_CHUNK && number * CACHE_CHUNK_BYTES < end) {
        struct cache_shard *shard = shard_of(cache, number);
        uint32_t index;
        bool is_found;

        pthread_mutex_lock(&shard->lock);
        index = tree_find(cache, shard, number);
        is_found = index && chunk_find(cache, &cache->chunks[index], from, only_delayed, found);
        pthread_mutex_unlock(&shard->lock);
        if (is_found)
            return found->offset < end;
        number++;
    }
    return false;
}

// Calls change() for every page with a frame that lies wholly in the range.
static void cache_for_pages(struct page_cache *cache, uint64_t start, uint64_t end,
                            void (*change)(struct page_cache *cache, struct cache_page *page))
{
    uint64_t number = start / CACHE_CHUNK_BYTES;

    while ((number = cache_next_chunk(cache, number)) < NO_CHUNK && number * CACHE_CHUNK_BYTES < end) {
        struct cache_shard *shard = shard_of(cache, number);
        uint32_t index;

        pthread_mutex_lock(&shard->lock);
        index = tree_find(cache, shard, number);
        for (unsigned i = 0; index && i < CACHE_CHUNK_PAGES; i++) {
            struct cache_page *page = &cache->chunks[index].pages[i];
            uint64_t at = number * CACHE_CHUNK_BYTES + i * CACHE_PAGE_BYTES;

            if (page->frame && at >= start && at + CACHE_PAGE_BYTES <= end)
                change(cache, page);
        }
        pthread_mutex_unlock(&shard->lock);
        number++;
    }
}

static void page_place(struct page_cache *cache, struct cache_page *page)
{
    page_set_flag(cache, page, PAGE_DELAYED, false);
}

static void page_place_allocated(struct page_cache *cache, struct cache_page *page)
{
    page_place(cache, page);
    page_set_flag(cache, page, PAGE_RESERVED, false);
}

void page_cache_place(struct page_cache *cache, uint64_t start, uint64_t end, bool is_allocated)
{
    cache_for_pages(cache, start, end, is_allocated ? page_place_allocated : page_place);
}

static void page_fail(struct page_cache *cache, struct cache_page *page)
{
    if (page->dirty)
        page_set_flag(cache, page, PAGE_FAILED, true);
}

void page_cache_fail(struct page_cache *cache, uint64_t start, uint64_t end)
{
    cache_for_pages(cache, start, end, page_fail);
}

// Neighbours in memory are one vector. false: no room.
static bool vec_add(struct page_vec *vec, char *mem, size_t len)
{
    struct iovec *last = vec->nr_iov ? &vec->iov[vec->nr_iov - 1] : NULL;

    if (last && (char *)last->iov_base + last->iov_len == mem) {
        last->iov_len += len;
        return true;
    }
    if (vec->nr_iov == vec->max_iov)
        return false;
    assert(vec->iov);
    vec->iov[vec->nr_iov++] = (struct iovec){mem, len};
    return true;
}

// The dirty sectors of a page from start on. Returns their bytes.
static uint32_t page_take(struct page_cache *cache, uint32_t index, unsigned number, uint32_t start,
                          uint32_t end, struct page_vec *vec)
{
    struct cache_page *page = &cache->chunks[index].pages[number];
    uint32_t at = start;
    uint8_t bits;

    if (!page->frame || (page->flags & (PAGE_DELAYED | PAGE_COPIED)) || vec->nr_refs == vec->max_refs)
        return 0;
    while (at < end && (page->dirty & 1U << at / cache->sector_bytes))
        at += cache->sector_bytes;
    if (at == start || !vec_add(vec, frame_mem(cache, page->frame) + start, at - start))
        return 0;
    bits = sector_bits(cache, start, at);
    if (!page->nr_writeback)
        page_set_flag(cache, page, PAGE_FAILED, false); // tried again
    page->dirty &= (uint8_t)~bits;
    page->nr_writeback++;
    vec->refs[vec->nr_refs++] =
        (struct page_ref){.chunk = index, .frame = page->frame, .page = (uint8_t)number, .dirty = bits};
    return at - start;
}

uint64_t page_cache_take(struct page_cache *cache, uint64_t offset, uint64_t end, struct page_vec *vec)
{
    uint64_t at = offset;

    while (at < end) {
        uint64_t number = at / CACHE_CHUNK_BYTES;
        uint64_t chunk_end = min_of(end, (number + 1) * CACHE_CHUNK_BYTES);
        struct cache_shard *shard = shard_of(cache, number);
        uint32_t index;
        bool is_over = true;

        pthread_mutex_lock(&shard->lock);
        index = tree_find(cache, shard, number);
        while (index && at < chunk_end) {
            unsigned page = (unsigned)(at % CACHE_CHUNK_BYTES / CACHE_PAGE_BYTES);
            uint32_t start = at % CACHE_PAGE_BYTES;
            uint32_t n = (uint32_t)min_of(CACHE_PAGE_BYTES - start, chunk_end - at);
            uint32_t taken = page_take(cache, index, page, start, start + n, vec);

            at += taken;
            is_over = taken < n;
            if (is_over)
                break;
        }
        pthread_mutex_unlock(&shard->lock);
        if (is_over)
            break;
    }
    return at - offset;
}

// One reference to a page is given back. Returns the frames that came free.
static unsigned page_written(struct page_cache *cache, const struct page_ref *ref, int error)
{
    struct cache_chunk *chunk = &cache->chunks[ref->chunk];
    struct cache_page *page = &chunk->pages[ref->page];
    unsigned nr_freed = 0;

    assert(page->nr_writeback);
    if (error) {
        page->dirty |= ref->dirty;
        page_set_flag(cache, page, PAGE_FAILED, true);
    }
    if (--page->nr_writeback)
        return 0;
    if (page->flags & PAGE_COPIED) { // P3
        page->flags &= (uint8_t)~PAGE_COPIED;
        frame_put(cache, ref->frame);
        nr_freed++;
    }
    if (!page->dirty) {
        page_leave(cache, chunk, page); // P1
        nr_freed++;
    }
    return nr_freed;
}

unsigned page_cache_written(struct page_cache *cache, const struct page_ref *refs, unsigned nr_refs,
                            int error)
{
    unsigned nr_freed = 0;

    for (unsigned i = 0; i < nr_refs;) {
        uint32_t index = refs[i].chunk;
        struct cache_shard *shard = shard_of(cache, cache->chunks[index].number);

        pthread_mutex_lock(&shard->lock);
        for (; i < nr_refs && refs[i].chunk == index; i++)
            nr_freed += page_written(cache, &refs[i], error);
        chunk_leave(cache, shard, index);
        pthread_mutex_unlock(&shard->lock);
    }
    return nr_freed;
}

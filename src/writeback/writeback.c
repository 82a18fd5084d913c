// How write-back begins and ends, and what is told of it. Cold.

#include "writeback/writeback.h"

#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "image/image.h"
#include "io/direct.h"
#include "io/io.h"
#include "util/util.h"
#include "writeback/wb.h"

#define BACKGROUND_SHARE 2 // of the memory, and no more than
#define BACKGROUND_MAX_BYTES (128 * MiB)
#define SOFT_SHARE 4 // that part of it is where writers are slowed down

static int check(const struct image *image, const struct io *io, uint32_t sector_bytes, struct err *err)
{
    if (io->ops->is_stored && !image->is_direct)
        return err_usage(err,
                         "--writeback: %s: buffered I/O has the kernel's write-back already; use --io "
                         "direct, or leave it out",
                         image->path);
    if (image->offset_bytes % sector_bytes)
        return err_usage(err,
                         "--writeback: --offset %llu is no multiple of %u, which is what %s takes; use one",
                         (unsigned long long)image->offset_bytes, sector_bytes, image->path);
    if (sector_bytes > CACHE_PAGE_BYTES)
        return err_usage(err,
                         "--writeback: %s takes blocks of %u bytes only, and pages have %u; leave it out",
                         image->path, sector_bytes, CACHE_PAGE_BYTES);
    return 0;
}

int writeback_parse(const char *text, uint64_t *size_bytes)
{
    if (!strcmp(text, "off"))
        *size_bytes = 0;
    else if (!strcmp(text, "on"))
        *size_bytes = WRITEBACK_DEFAULT_BYTES;
    else if (util_parse_size(text, size_bytes) < 0 || *size_bytes < WRITEBACK_MIN_BYTES ||
             *size_bytes > WRITEBACK_MAX_BYTES)
        return -EINVAL;
    return 0;
}

int writeback_create(struct writeback **out, struct device *dev, const struct writeback_options *options,
                     const struct image *image, struct map *map, struct io *io, struct err *err)
{
    uint32_t sector_bytes =
        (uint32_t)max_of(SECTOR_BYTES, max_of(image->dio_offset_align, image->sector_bytes));
    struct writeback *wb;
    int ret = check(image, io, sector_bytes, err);

    if (ret < 0)
        return ret;
    wb = calloc(1, sizeof(*wb));
    if (!wb)
        return err_set(err, -ENOMEM, "--writeback: out of memory");
    wb->dev = dev;
    wb->size_bytes = options->size_bytes;
    wb->device_bytes = image->size_bytes;
    wb->throttled_tail = &wb->throttled;
    pthread_mutex_init(&wb->lock, NULL);
    wb->slots = calloc(WB_NR_SLOTS, sizeof(*wb->slots));
    if (!wb->slots || posix_memalign((void **)&wb->zeroes, CACHE_PAGE_BYTES, WB_GAP_BYTES))
        goto out_slots;
    memset(wb->zeroes, 0, WB_GAP_BYTES);
    if (page_cache_create(&wb->cache, options->size_bytes, sector_bytes) < 0)
        goto out_zeroes;
    // A block device has no free space to ask about.
    if (delalloc_create(&wb->delalloc, &wb->cache, map, image->is_block_device ? -1 : image->fd,
                        wb->device_bytes, options->unit_bytes) < 0)
        goto out_cache;
    wb->background_pages = wb->cache.nr_frames / BACKGROUND_SHARE;
    wb->background_pages = max_of(1U, min_of(wb->background_pages, BACKGROUND_MAX_BYTES / CACHE_PAGE_BYTES));
    atomic_store(&wb->begin_pages, wb->background_pages);
    wb->soft_pages = wb->cache.nr_frames - wb->cache.nr_frames / SOFT_SHARE;
    flusher_init(wb);
    // Its last write may be none of whole blocks, also while the device is frozen (D2 in io/direct.c).
    if ((image->offset_bytes + image->size_bytes) % image->dio_offset_align)
        direct_lock_always(io);
    *out = wb;
    return 0;

out_cache:
    page_cache_destroy(&wb->cache);
out_zeroes:
    free(wb->zeroes);
out_slots:
    free(wb->slots);
    pthread_mutex_destroy(&wb->lock);
    free(wb);
    return err_set(err, -ENOMEM, "--writeback: out of memory; use a smaller one");
}

void writeback_destroy(struct writeback *wb)
{
    delalloc_destroy(&wb->delalloc);
    page_cache_destroy(&wb->cache);
    free(wb->zeroes);
    free(wb->slots);
    pthread_mutex_destroy(&wb->lock);
    free(wb);
}

bool writeback_extent(struct writeback *wb, uint64_t start, uint64_t *len, struct extent *ext)
{
    bool is_cached, is_delayed;
    uint64_t n = page_cache_look(&wb->cache, start, *len, &is_cached, &is_delayed);

    *len = min_of(*len, n);
    if (is_cached)
        *ext = (struct extent){
            .start_bytes = start,
            .len_bytes = *len,
            .state = is_delayed ? EXTENT_DELAYED : EXTENT_MAPPED,
        };
    return is_cached;
}

struct drain_wait {
    struct writeback_drain drain;
    sem_t sem;
    int error;
    uint64_t lost_bytes;
};

static void drain_wait_done(struct writeback_drain *drain, int error, uint64_t lost_bytes)
{
    struct drain_wait *wait = container_of(drain, struct drain_wait, drain);

    wait->error = error;
    wait->lost_bytes = lost_bytes;
    sem_post(&wait->sem);
}

int writeback_drain_wait(struct writeback *wb, uint64_t *lost_bytes)
{
    struct drain_wait wait = {.drain.done = drain_wait_done};

    sem_init(&wait.sem, 0, 0);
    writeback_drain(wb, &wait.drain);
    while (sem_wait(&wait.sem) < 0)
        ; // EINTR
    sem_destroy(&wait.sem);
    *lost_bytes = wait.lost_bytes;
    return wait.error;
}

bool writeback_stats(const struct device *dev, struct writeback_stats *stats)
{
    struct writeback *wb = dev->writeback;

    if (!wb)
        return false;
    *stats = (struct writeback_stats){
        .size_bytes = wb->size_bytes,
        .used_bytes = (uint64_t)atomic_load(&wb->cache.nr_used) * CACHE_PAGE_BYTES,
        .dirty_bytes = (uint64_t)atomic_load(&wb->cache.nr_dirty) * CACHE_PAGE_BYTES,
        .delayed_bytes = (uint64_t)atomic_load(&wb->cache.nr_delayed) * CACHE_PAGE_BYTES,
        .failed_bytes = (uint64_t)atomic_load(&wb->cache.nr_failed) * CACHE_PAGE_BYTES,
        .error = atomic_load(&wb->error),
        .written_bytes = atomic_load(&wb->written_bytes),
        .bytes_per_s = atomic_load(&wb->bytes_per_s),
        .nr_writes = atomic_load(&wb->nr_writes),
        .nr_runs = atomic_load(&wb->delalloc.nr_runs),
        .nr_map_calls = atomic_load(&wb->delalloc.nr_map_calls),
        .allocated_bytes = atomic_load(&wb->delalloc.nr_allocated_bytes),
        .nr_throttled = atomic_load(&wb->nr_throttled_total),
        .nr_passed = atomic_load(&wb->nr_passed),
    };
    stats->reserved_bytes = stats->delayed_bytes; // P4
    return true;
}

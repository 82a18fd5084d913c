#include "writeback/space.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "util/util.h"
#include "writeback/page_cache.h"

#define MARGIN_BYTES (1 * MiB) // for the file system's metadata, and
#define MARGIN_SHARE 64        // that part of what is free

static pthread_mutex_t spaces_lock = PTHREAD_MUTEX_INITIALIZER;
static struct space *spaces; // of file systems

static struct space *find(dev_t dev)
{
    struct space *space = spaces;

    while (space && space->dev != dev)
        space = space->next;
    return space;
}

struct space *space_get(int fd)
{
    struct space *space = NULL;
    struct stat st;
    bool is_shared = fd >= 0 && !fstat(fd, &st);

    pthread_mutex_lock(&spaces_lock);
    if (is_shared)
        space = find(st.st_dev);
    if (!space) {
        space = calloc(1, sizeof(*space));
        if (!space)
            goto out;
        pthread_mutex_init(&space->lock, NULL);
        atomic_store(&space->max_promised, INT64_MAX);
        if (is_shared) {
            space->dev = st.st_dev;
            space->next = spaces;
            spaces = space;
        }
    }
    space->nr_users++;
out:
    pthread_mutex_unlock(&spaces_lock);
    return space;
}

void space_put(struct space *space, int64_t nr_promised)
{
    struct space **at = &spaces;

    atomic_fetch_sub(&space->nr_promised, nr_promised);
    pthread_mutex_lock(&spaces_lock);
    if (!--space->nr_users) {
        while (*at && *at != space)
            at = &(*at)->next;
        if (*at)
            *at = space->next;
        pthread_mutex_destroy(&space->lock);
        free(space);
    }
    pthread_mutex_unlock(&spaces_lock);
}

// What is free, with and without a margin. false: it is not known.
static bool ask(int fd, uint64_t *free_bytes, uint64_t *less_margin)
{
    struct statvfs fs;
    uint64_t margin;

    if (fd < 0 || fstatvfs(fd, &fs))
        return false;
    *free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    margin = MARGIN_BYTES + *free_bytes / MARGIN_SHARE;
    *less_margin = *free_bytes > margin ? *free_bytes - margin : 0;
    return true;
}

void space_refresh(struct space *space, int fd)
{
    uint64_t free_bytes, less_margin;

    pthread_mutex_lock(&space->lock);
    if (ask(fd, &free_bytes, &less_margin))
        atomic_store(&space->max_promised, (int64_t)(less_margin / CACHE_PAGE_BYTES));
    pthread_mutex_unlock(&space->lock);
}

int space_check(struct space *space, int fd, int64_t own_promised, int64_t nr_pages)
{
    int64_t others = atomic_load(&space->nr_promised) - own_promised - nr_pages;
    uint64_t free_bytes, less_margin;

    if (others <= 0 || !ask(fd, &free_bytes, &less_margin))
        return 0; // the file system is the judge
    return (uint64_t)(others + nr_pages) * CACHE_PAGE_BYTES > less_margin ? -ENOSPC : 0;
}

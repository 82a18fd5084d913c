#include "transport/vhost_user/memory.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <linux/magic.h>

#include "util/util.h"

// ---- M2: what the signal handler looks at, without a lock. A slot's len_bytes is 0 while it is free.

#define NR_GUARDS 1024

static struct guard {
    _Atomic(char *) base;
    atomic_size_t len_bytes;
    _Atomic(atomic_bool *) is_lost;
} guards[NR_GUARDS];

static pthread_once_t guard_once = PTHREAD_ONCE_INIT;

static void guard_signalled(int number, siginfo_t *info, void *context)
{
    char *at = info->si_addr;
    int error = errno;

    (void)context;
    for (unsigned i = 0; i < NR_GUARDS; i++) {
        size_t len = atomic_load(&guards[i].len_bytes);
        char *base = atomic_load(&guards[i].base);

        if (!len || at < base || at >= base + len)
            continue;
        if (mmap(base, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                 -1, 0) == MAP_FAILED)
            break;
        atomic_store(atomic_load(&guards[i].is_lost), true);
        errno = error;
        return; // and what touched it goes on, with zeroes
    }
    signal(number, SIG_DFL); // none of ours: it comes again, and ends us
}

static void guard_install(void)
{
    struct sigaction action = {.sa_sigaction = guard_signalled, .sa_flags = SA_SIGINFO};

    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

static int guard_add(char *base, size_t len_bytes, atomic_bool *is_lost)
{
    pthread_once(&guard_once, guard_install);
    for (unsigned i = 0; i < NR_GUARDS; i++) {
        if (atomic_load(&guards[i].len_bytes))
            continue;
        atomic_store(&guards[i].base, base);
        atomic_store(&guards[i].is_lost, is_lost);
        atomic_store(&guards[i].len_bytes, len_bytes);
        return 0;
    }
    return -ENOSPC;
}

static void guard_remove(const char *base)
{
    for (unsigned i = 0; i < NR_GUARDS; i++) {
        if (atomic_load(&guards[i].len_bytes) && atomic_load(&guards[i].base) == base)
            atomic_store(&guards[i].len_bytes, 0);
    }
}

// ---- Mappings

// What offsets and lengths of mappings of fd are made of.
static uint64_t map_granularity(int fd, const struct stat *st)
{
    struct statfs fs;

    if (!fstatfs(fd, &fs) && fs.f_type == HUGETLBFS_MAGIC)
        return (uint64_t)st->st_blksize;
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

int memory_map(struct memory_map *map, int fd, uint64_t offset, uint64_t len_bytes, atomic_bool *is_lost,
               char **at)
{
    struct stat st;
    uint64_t granularity, start, end;
    int ret;

    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode) || !len_bytes || offset > (uint64_t)st.st_size ||
        len_bytes > (uint64_t)st.st_size - offset)
        return -EINVAL;
    granularity = map_granularity(fd, &st);
    start = round_down(offset, granularity);
    end = round_up(offset + len_bytes, granularity);
    map->len_bytes = end - start;
    map->base =
        mmap(NULL, map->len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)start);
    if (map->base == MAP_FAILED) {
        map->base = NULL;
        return -errno;
    }
    ret = guard_add(map->base, map->len_bytes, is_lost);
    if (ret < 0) {
        munmap(map->base, map->len_bytes);
        map->base = NULL;
        return ret;
    }
    *at = map->base + (offset - start);
    return 0;
}

void memory_unmap(struct memory_map *map)
{
    if (!map->base)
        return;
    guard_remove(map->base);
    munmap(map->base, map->len_bytes);
    map->base = NULL;
}

// ---- Regions

static bool ranges_overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

int memory_add(struct memory *memory, const struct vu_region *region, int fd)
{
    struct memory_region new = {.guest = region->guest, .size = region->size, .user = region->user};
    unsigned at = 0;
    int ret;

    if (memory->nr_regions == MEMORY_MAX_REGIONS)
        return -ENOSPC;
    if (!region->size || region->guest + region->size < region->guest ||
        region->user + region->size < region->user)
        return -EINVAL;
    for (unsigned i = 0; i < memory->nr_regions; i++) {
        const struct memory_region *other = &memory->regions[i];

        if (ranges_overlap(new.guest, new.size, other->guest, other->size) ||
            ranges_overlap(new.user, new.size, other->user, other->size))
            return -EEXIST;
        if (other->guest < new.guest)
            at = i + 1;
    }
    ret = memory_map(&new.map, fd, region->mmap_offset, region->size, &memory->is_lost, &new.host);
    if (ret < 0)
        return ret;
    memmove(&memory->regions[at + 1], &memory->regions[at], (memory->nr_regions - at) * sizeof(new));
    memory->regions[at] = new;
    memory->nr_regions++;
    return 0;
}

int memory_remove(struct memory *memory, const struct vu_region *region)
{
    for (unsigned i = 0; i < memory->nr_regions; i++) {
        struct memory_region *old = &memory->regions[i];

        if (old->guest != region->guest || old->user != region->user || old->size != region->size)
            continue;
        memory_unmap(&old->map);
        memory->nr_regions--;
        memmove(old, old + 1, (memory->nr_regions - i) * sizeof(*old));
        memory->regions[memory->nr_regions] = (struct memory_region){0};
        return 0;
    }
    return -ENOENT;
}

void memory_clear(struct memory *memory)
{
    for (unsigned i = 0; i < memory->nr_regions; i++)
        memory_unmap(&memory->regions[i].map);
    memset(memory->regions, 0, sizeof(memory->regions)); // a hint finds nothing
    memory->nr_regions = 0;
    atomic_store(&memory->is_lost, false);
}

void *memory_at_user(const struct memory *memory, uint64_t user, uint64_t len_bytes)
{
    for (unsigned i = 0; i < memory->nr_regions; i++) {
        const struct memory_region *region = &memory->regions[i];
        uint64_t offset = user - region->user;

        if (user >= region->user && offset < region->size && len_bytes <= region->size - offset)
            return region->host + offset;
    }
    return NULL;
}

unsigned memory_find(const struct memory *memory, uint64_t guest)
{
    unsigned low = 0, high = memory->nr_regions;

    while (low < high) {
        unsigned mid = (low + high) / 2;
        const struct memory_region *region = &memory->regions[mid];

        if (guest < region->guest)
            high = mid;
        else if (guest - region->guest >= region->size)
            low = mid + 1;
        else
            return mid;
    }
    return memory->nr_regions;
}

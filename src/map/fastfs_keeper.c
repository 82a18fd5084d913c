// The keeper: a thread of its own for each map, that holds the lease and is the only one to change the
// extent map. Cold. Invariants: fastfs.h, extent_map.h.
//
// It may block in a barrier, which waits for I/O in flight: nothing that such I/O waits for is done here,
// and nobody but open, stop and close waits for the keeper.

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/device.h"
#include "image/image.h"
#include "map/fastfs.h"
#include "util/util.h"

#define TICK_MAX_NS (NSEC_PER_SEC)
#define RETRY_MIN_NS (20 * NSEC_PER_SEC / 1000)
#define RETRY_MAX_NS NSEC_PER_SEC
#define ASK_AGAIN_NS (5 * NSEC_PER_SEC)

static const char not_alone[] = "somebody else has it open; the file is used until they are gone";
static const char did_not_wait[] =
    "somebody wanted to open it, but not to wait; the file is used until they may have asked again";
static const char in_use[] = "somebody holds pages of it, as in a pipe; the file is used until they are gone";

// Half of what an opener waits at most, before the kernel breaks the lease without us.
static uint64_t half_break_ns(void)
{
    FILE *file = fopen("/proc/sys/fs/lease-break-time", "re");
    char text[32] = "";
    unsigned long seconds = 0;

    if (file) {
        if (fgets(text, sizeof(text), file))
            seconds = strtoul(text, NULL, 10);
        fclose(file);
    }
    return (seconds ? seconds : 45) * NSEC_PER_SEC / 2; // 0: for ever
}

static bool has_lease(const struct fastfs *fastfs)
{
    return fcntl(fastfs->map.image->fd, F_GETLEASE) == F_WRLCK; // what is being broken is something less
}

static void drop_lease(struct fastfs *fastfs)
{
    fcntl(fastfs->map.image->fd, F_SETLEASE, F_UNLCK);
}

// Dirty pages are written, which there are only where the file system did a direct write in its own way,
// and clean ones dropped: F5.
static void drop_pages(const struct fastfs *fastfs)
{
    int fd = fastfs->map.image->fd;

    sync_file_range(fd, 0, 0,
                    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}

// What was spliced into a pipe, or is still being read ahead, outlives who has opened the file, and
// drop_pages(). Kernels before 6.5 cannot tell.
static bool has_pages(const struct fastfs *fastfs)
{
    return util_nr_cached_pages(fastfs->map.image->fd, 0, 0) > 0;
}

// extents come into the map or leave it. times: 1 or -1.
static void count(struct fastfs *fastfs, const struct extents *extents, uint64_t times)
{
    struct map_status *sums = &fastfs->sums;

    sums->nr_extents += times * extents->nr_device;
    sums->device_bytes += times * extents->bytes[ON_DEVICE];
    sums->zero_bytes += times * extents->bytes[NOWHERE];
    sums->file_bytes += times * extents->bytes[IN_FILE];
}

// What has been filled, in sums. The lock is for fastfs_describe().
static void tell(struct fastfs *fastfs)
{
    struct map_status status = fastfs->sums;

    status.nr_lease_breaks = fastfs->status.nr_lease_breaks;
    status.is_redirecting = atomic_load(&fastfs->redirect_until_ns);
    status.unknown_bytes = status.device_bytes + status.zero_bytes + status.file_bytes;
    status.unknown_bytes = fastfs->file_bytes - min_of(status.unknown_bytes, fastfs->file_bytes);
    snprintf(status.device, sizeof(status.device), "%s", fastfs->place.device);
    if (!status.is_redirecting)
        snprintf(status.why_not, sizeof(status.why_not), "%s", fastfs->why_not);
    pthread_mutex_lock(&fastfs->lock);
    fastfs->status = status;
    pthread_mutex_unlock(&fastfs->lock);
}

static void free_list(struct region *region)
{
    while (region) {
        struct region *next = region->next;

        region_free(region);
        region = next;
    }
}

static void push(struct region **list, struct region *region)
{
    if (!region)
        return;
    region->next = *list;
    *list = region;
}

// Out of the map.
static void push_old(struct fastfs *fastfs, struct region **old, struct region *region)
{
    const struct extents *extents = region ? atomic_load(&region->extents) : NULL;

    if (extents)
        count(fastfs, extents, -1ULL);
    push(old, region);
}

// ---- The extent map

// In the file.
static uint64_t call_start(const struct fastfs *fastfs, const struct map_call *call)
{
    return fastfs->map.image->offset_bytes + call->start_bytes;
}

static uint64_t last_region(const struct fastfs *fastfs, const struct map_call *call)
{
    uint64_t last = (call_start(fastfs, call) + call->len_bytes - 1) / REGION_BYTES;

    return min_of(last, fastfs->extents.nr_regions - 1);
}

static bool is_closed(const struct fastfs *fastfs, uint64_t index)
{
    for (const struct map_call *call = fastfs->punches; call; call = call->next_punch) {
        if (index >= call_start(fastfs, call) / REGION_BYTES && index <= last_region(fastfs, call))
            return true;
    }
    return false;
}

static void begin_fill(struct fastfs *fastfs, uint64_t index, struct region **fill, struct region **old)
{
    struct region *filled;

    push_old(fastfs, old, extent_map_begin_fill(&fastfs->extents, index, &filled));
    push(fill, filled);
}

// F3.
static void close_regions(struct fastfs *fastfs, const struct map_call *punch, struct region **old)
{
    for (uint64_t i = call_start(fastfs, punch) / REGION_BYTES; i <= last_region(fastfs, punch); i++)
        push_old(fastfs, old, extent_map_replace(&fastfs->extents, i, &extent_map_closed));
}

static void open_regions(struct fastfs *fastfs, struct map_call *punch, struct region **old)
{
    struct map_call **at = &fastfs->punches;

    while (*at != punch)
        at = &(*at)->next_punch;
    *at = punch->next_punch;
    for (uint64_t i = call_start(fastfs, punch) / REGION_BYTES; i <= last_region(fastfs, punch); i++) {
        if (!is_closed(fastfs, i))
            push_old(fastfs, old, extent_map_replace(&fastfs->extents, i, NULL));
    }
}

// ---- The lease

// Everything goes by way of the file again, and the lease is given back.
static void leave(struct fastfs *fastfs, const char *why)
{
    struct region *old = NULL;

    fastfs->is_in = false;
    fastfs->why_not = why;
    atomic_store(&fastfs->redirect_until_ns, 0); // F2
    for (uint64_t i = 0; i < fastfs->extents.nr_regions; i++) {
        if (atomic_load(&fastfs->extents.regions[i])) // an opener waits
            push_old(fastfs, &old, extent_map_replace(&fastfs->extents, i, NULL));
    }
    device_barrier(fastfs->map.dev); // X1
    free_list(old);
    drop_pages(fastfs);
    drop_lease(fastfs);
    tell(fastfs);
}

static int take_lease(const struct fastfs *fastfs, struct err *err)
{
    const struct image *image = fastfs->map.image;
    struct f_owner_ex owner = {.type = F_OWNER_TID, .pid = gettid()};

    // SIGIO, which is not lost for want of memory, and to this thread alone. The kernel forgets the owner
    // with a lease, and makes the process the owner where there is none when one is taken.
    if (fcntl(image->fd, F_SETSIG, 0) < 0 || fcntl(image->fd, F_SETOWN_EX, &owner) < 0)
        return err_set(err, -errno, "%s: fastfs: a signal for the lease: %s; use --map linear", image->path,
                       strerror(errno));
    if (fcntl(image->fd, F_SETLEASE, F_WRLCK) < 0) {
        if (errno == EAGAIN || errno == EBUSY)
            return -EAGAIN;
        return err_set(
            err, -errno,
            "%s: fastfs: taking a lease: %s; run as its owner or with CAP_LEASE, or use --map linear",
            image->path, strerror(errno));
    }
    return 0;
}

static int sync_image(const struct fastfs *fastfs, struct err *err)
{
    const struct image *image = fastfs->map.image;
    int ret;

    // Also for who only reads: others may have written. is_read_only is the main thread's (image_take()).
    if (!fdatasync(image->fd))
        return 0;
    ret = -errno;
    flush_failed(fastfs->map.dev, ret);
    return err_set(err, ret, "%s: flushing: %s", image->path, strerror(-ret));
}

static int enter(struct fastfs *fastfs, struct err *err)
{
    struct region *none = NULL;
    uint64_t now_ns;
    int ret = take_lease(fastfs, err);

    fastfs->why_not = not_alone;
    if (ret < 0)
        return ret;
    // Most of it while nobody has to wait for us.
    drop_lease(fastfs);
    ret = sync_image(fastfs, err);
    if (!ret)
        ret = take_lease(fastfs, err);
    if (ret < 0)
        return ret;
    ret = sync_image(fastfs, err); // F5
    if (ret < 0)
        goto out;
    drop_pages(fastfs);
    if (has_pages(fastfs)) {
        fastfs->why_not = in_use;
        ret = -EAGAIN;
        goto out;
    }
    ret = fastfs_check_file(fastfs->map.image->fd, fastfs->map.image->path, err);
    if (!ret && !fastfs->is_sampled)
        ret = fastfs_sample(fastfs, err);
    if (ret < 0)
        goto out;
    fastfs->is_sampled = true;
    device_barrier(fastfs->map.dev); // F2
    now_ns = util_coarse_ns();
    ret = has_lease(fastfs) ? 0 : -EAGAIN;
    if (ret < 0)
        goto out;
    fastfs->is_in = true;
    for (const struct map_call *punch = fastfs->punches; punch; punch = punch->next_punch)
        close_regions(fastfs, punch, &none);                            // F3
    assert(!none);                                                      // F2
    atomic_store(&fastfs->redirect_until_ns, now_ns + half_break_ns()); // F1
    tell(fastfs);
    return 0;

out:
    drop_lease(fastfs);
    return ret;
}

// ---- Work

// Those that were written to by way of the file.
static void begin_refills(struct fastfs *fastfs, unsigned nr_marks, struct region **fill, struct region **old)
{
    for (uint64_t i = 0; i < fastfs->extents.nr_regions; i++) {
        struct region *region = atomic_load(&fastfs->extents.regions[i]);

        if (region && atomic_load(&region->nr_marks) >= nr_marks)
            begin_fill(fastfs, i, fill, old);
    }
}

static void begin_fetch(struct fastfs *fastfs, const struct map_call *call, struct region **fill,
                        struct region **old)
{
    for (uint64_t i = call_start(fastfs, call) / REGION_BYTES; i <= last_region(fastfs, call); i++) {
        if (!atomic_load(&fastfs->extents.regions[i]))
            begin_fill(fastfs, i, fill, old);
    }
}

static void end_fills(struct fastfs *fastfs, struct region *fill)
{
    const struct image *image = fastfs->map.image;
    uint32_t block = fastfs->place.block_bytes;
    struct stat st;

    // Nobody but us changes it now, and we only make it longer.
    if (!fill || fstat(image->fd, &st) < 0)
        return;
    for (; fill; fill = fill->next) {
        uint64_t end = (fill->index + 1) * REGION_BYTES;
        struct extents *extents;
        int ret;

        if (!has_lease(fastfs)) // no time for that; what is not filled is used by way of the file
            return;
        ret = extents_read(&extents, image->fd, fill->index, round_down((uint64_t)st.st_size, block), block);
        if (ret < 0)
            log_verbose("%s: fastfs: FIEMAP: %s", image->path, strerror(-ret));
        if (ret < 0)
            continue;
        // Behind the file's end, all of which is IN_FILE, there is nothing to tell of.
        if (end > (uint64_t)st.st_size)
            extents->bytes[IN_FILE] -= end - max_of((uint64_t)st.st_size, end - REGION_BYTES);
        count(fastfs, extents, 1);
        atomic_store_explicit(&fill->extents, extents, memory_order_release);
    }
    tell(fastfs);
}

static struct map_call *take_calls(struct fastfs *fastfs, enum map_call_code code)
{
    struct map_call **at = &fastfs->calls, *taken = NULL;

    while (*at) {
        struct map_call *call = *at;

        if (call->code != code) {
            at = &call->next;
            continue;
        }
        *at = call->next;
        call->next = taken;
        taken = call;
    }
    return taken;
}

// The calls are over; but for a punch they are their makers' again.
static void answer(struct map_call *call)
{
    while (call) {
        struct map_call *next = call->next;

        call->op.done = call->done;
        ring_post(call->ring, &call->op, 0);
        call = next;
    }
}

// All that was asked for, behind one barrier. nr_marks: from how many on a region is filled anew; 0: none is.
static void work(struct fastfs *fastfs, unsigned nr_marks)
{
    struct map_call *ends = take_calls(fastfs, MAP_PUNCH_END), *punches = take_calls(fastfs, MAP_PUNCH);
    struct map_call *fetches = take_calls(fastfs, MAP_FETCH), *call;
    struct region *fill = NULL, *old = NULL;

    for (call = ends; call; call = call->next)
        open_regions(fastfs, call, &old);
    for (call = punches; call; call = call->next) {
        call->next_punch = fastfs->punches;
        fastfs->punches = call;
        if (fastfs->is_in)
            close_regions(fastfs, call, &old);
    }
    if (fastfs->is_in) {
        if (nr_marks)
            begin_refills(fastfs, nr_marks, &fill, &old);
        for (call = fetches; call; call = call->next)
            begin_fetch(fastfs, call, &fill, &old);
    }
    if (fill || old || (fastfs->is_in && punches))
        device_barrier(fastfs->map.dev); // X1, X2, F3
    free_list(old);
    end_fills(fastfs, fill);
    answer(ends);
    answer(fetches);
    answer(punches);
}

static void do_work(struct ring_hook *hook)
{
    struct fastfs *fastfs = container_of(hook, struct fastfs, work_hook);

    work(fastfs, atomic_exchange(&fastfs->is_refill_asked, false) ? REGION_REFILL_MARKS : 0);
}

static void take_call(struct ring_op *op, int res)
{
    struct map_call *call = container_of(op, struct map_call, op);
    struct fastfs *fastfs = container_of(call->map, struct fastfs, map);

    (void)res;
    call->next = fastfs->calls;
    fastfs->calls = call;
    ring_defer(fastfs->ring, &fastfs->work_hook);
}

void fastfs_call(struct map *map, struct map_call *call)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);

    call->map = map;
    call->op.done = take_call;
    ring_post(fastfs->ring, &call->op, 0);
}

static void refill(struct ring_op *op, int res)
{
    struct fastfs *fastfs = container_of(op, struct fastfs, refill_op);

    (void)res;
    ring_defer(fastfs->ring, &fastfs->work_hook);
}

// ---- Time

static void tick_in(struct fastfs *fastfs, uint64_t ns)
{
    ring_cancel_timeout(fastfs->ring, &fastfs->tick_op);
    fastfs->tick_op.code = RING_TIMEOUT;
    fastfs->tick_op.timeout_ns = ns;
    ring_queue(fastfs->ring, &fastfs->tick_op);
}

// F1. false: it is over, or was for a moment (F2).
static bool keep(struct fastfs *fastfs)
{
    uint64_t until_ns = atomic_load(&fastfs->redirect_until_ns), now_ns = util_coarse_ns();

    return until_ns && has_lease(fastfs) &&
           atomic_compare_exchange_strong(&fastfs->redirect_until_ns, &until_ns, now_ns + half_break_ns());
}

static void try_again(struct fastfs *fastfs)
{
    struct err err = {.line = ""};
    int ret = enter(fastfs, &err);

    if (!ret) {
        log_verbose("%s: fastfs: alone again: redirecting", fastfs->map.image->path);
        return;
    }
    if (ret != -EAGAIN) {
        log_line("%s", err.line); // and no more attempts
        fastfs->why_not = "it failed; the log says why";
        fastfs->is_stopped = true;
    }
    tell(fastfs);
    fastfs->retry_ns = min_of(fastfs->retry_ns * 2, RETRY_MAX_NS);
}

static void lose(struct fastfs *fastfs)
{
    bool is_wanted = !has_lease(fastfs); // else it was our time that was over
    struct err err = {.line = ""};

    log_verbose("%s: fastfs: %s", fastfs->map.image->path, not_alone);
    pthread_mutex_lock(&fastfs->lock);
    fastfs->status.nr_lease_breaks++;
    pthread_mutex_unlock(&fastfs->lock);
    leave(fastfs, not_alone);
    fastfs->retry_ns = RETRY_MIN_NS;
    // Who waits for us has it open, to the kernel. Who does not want to wait (O_NONBLOCK) was turned away,
    // and would be each time.
    if (is_wanted && !take_lease(fastfs, &err)) {
        drop_lease(fastfs);
        fastfs->why_not = did_not_wait;
        fastfs->retry_ns = ASK_AGAIN_NS;
        tell(fastfs);
    }
}

static void tick(struct ring_op *op, int res)
{
    struct fastfs *fastfs = container_of(op, struct fastfs, tick_op);

    (void)res;
    if (fastfs->is_stopped)
        return;
    if (!fastfs->is_in)
        try_again(fastfs);
    else if (keep(fastfs))
        work(fastfs, atomic_exchange(&fastfs->has_marks, false));
    else
        lose(fastfs);
    tick_in(fastfs, fastfs->is_in ? min_of(TICK_MAX_NS, half_break_ns() / 4) : fastfs->retry_ns);
}

static void signalled(struct ring_op *op, int res)
{
    struct fastfs *fastfs = container_of(op, struct fastfs, signal_op);
    struct signalfd_siginfo info;

    (void)res;
    while (read(fastfs->signal_fd, &info, sizeof(info)) > 0)
        ; // which lease is no question: there is one
    if (fastfs->is_in && !has_lease(fastfs)) {
        lose(fastfs);
        tick_in(fastfs, fastfs->retry_ns);
    }
    ring_queue(fastfs->ring, op);
}

static void stop(struct ring_op *op, int res)
{
    struct fastfs *fastfs = container_of(op, struct fastfs, stop_op);

    fastfs->is_ending = res;
    ring_cancel_timeout(fastfs->ring, &fastfs->tick_op);
    fastfs->is_stopped = true;
    if (fastfs->is_in)
        leave(fastfs, "stopped");
    sem_post(&fastfs->sem);
}

struct grow {
    struct ring_op op;
    struct fastfs *fastfs;
    uint64_t file_bytes;
    sem_t over;
};

static void grow(struct ring_op *op, int res)
{
    struct grow *grow = container_of(op, struct grow, op);

    (void)res;
    if (extent_map_grow(&grow->fastfs->extents, grow->file_bytes) < 0)
        log_line("%s: fastfs: out of memory; its new part is used by way of the file",
                 grow->fastfs->map.image->path);
    grow->fastfs->file_bytes = grow->file_bytes;
    tell(grow->fastfs);
    sem_post(&grow->over);
}

void fastfs_grow(struct fastfs *fastfs, uint64_t file_bytes)
{
    struct grow ask = {.op.done = grow, .fastfs = fastfs, .file_bytes = file_bytes};

    sem_init(&ask.over, 0, 0);
    ring_post(fastfs->ring, &ask.op, 0);
    while (sem_wait(&ask.over) < 0)
        ; // EINTR
    sem_destroy(&ask.over);
}

// ---- The thread

static int begin(struct fastfs *fastfs, struct err *err)
{
    const struct image *image = fastfs->map.image;
    sigset_t set;
    int ret = ring_create(&ring_threads_ops, &fastfs->ring, err);

    if (ret < 0)
        return ret;
    fastfs->signal_op = (struct ring_op){.done = signalled, .code = RING_POLL, .events = POLLIN};
    fastfs->tick_op.done = tick;
    fastfs->stop_op.done = stop;
    fastfs->refill_op.done = refill;
    fastfs->work_hook.run = do_work;
    fastfs->retry_ns = RETRY_MIN_NS;
    sigemptyset(&set);
    sigaddset(&set, SIGIO); // blocked in this thread, as all are
    fastfs->signal_fd = fastfs->signal_op.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    // The open file may come from a process that has ended with the lease, and an opener be waiting for it.
    drop_lease(fastfs);
    if (fastfs->signal_fd < 0)
        ret = err_set(err, -errno, "%s: fastfs: signalfd: %s", image->path, strerror(errno));
    else
        ret = enter(fastfs, err);
    if (ret == -EAGAIN) {
        log_line("%s: fastfs: %s", image->path, fastfs->why_not);
        tell(fastfs);
        ret = 0;
    }
    if (!ret)
        return 0;
    if (fastfs->signal_fd >= 0)
        close(fastfs->signal_fd);
    ring_destroy(fastfs->ring);
    return ret;
}

void *fastfs_keeper(void *arg)
{
    struct fastfs *fastfs = arg;
    int ret;

    // It has little to do, and who opens the image waits for that: ahead of the queues, where we may.
    setpriority(PRIO_PROCESS, (id_t)gettid(), -20);
    ret = begin(fastfs, fastfs->open_err);
    fastfs->open_ret = ret;
    if (!ret) {
        ring_queue(fastfs->ring, &fastfs->signal_op);
        tick_in(fastfs, fastfs->retry_ns);
    }
    sem_post(&fastfs->sem);
    if (ret < 0)
        return NULL;
    while (!fastfs->is_ending) {
        ret = ring_run(fastfs->ring);
        if (ret < 0) {
            log_line("%s: fastfs: %s; cannot go on", fastfs->map.image->path, strerror(-ret));
            abort(); // nobody would answer to the lease
        }
    }
    return NULL;
}

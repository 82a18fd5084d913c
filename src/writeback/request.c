// Requests on a device with write-back, on their queue's thread, which never blocks: what may block goes
// to a worker, and what has to wait is in a list (wb.h W4).

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "image/image.h"
#include "io/io.h"
#include "ring/workers.h"
#include "util/iov.h"
#include "util/util.h"
#include "writeback/wb.h"

static void write_step(struct rq *rq);
static void zero_start(struct rq *rq);
static void zero_whole(struct rq *rq);

static struct writeback *wb_of(const struct rq *rq)
{
    return rq->queue->dev->writeback;
}

static void post(struct rq *rq, void (*done)(struct ring_op *op, int res))
{
    rq->ring_op.done = done;
    ring_post(rq->queue->ring, &rq->ring_op, 0);
}

// A list of them, each on its own queue.
static void post_all(struct rq *rqs, void (*done)(struct ring_op *op, int res))
{
    struct rq *next;

    for (; rqs; rqs = next) {
        next = rqs->wb.next; // it may be gone then
        post(rqs, done);
    }
}

static struct rq *rq_of(struct ring_op *op)
{
    return container_of(op, struct rq, ring_op);
}

// ---- READ: what is cached is copied, what is not comes from below

static void read_step(struct rq *rq);

static void read_ran(struct rq *rq, int error)
{
    rq->wb.error = error;
    rq->wb.has_run = true;
    if (!rq->wb.is_running)
        read_step(rq);
}

static void read_step(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    while (!rq->wb.error && rq->done_bytes < rq->len_bytes) {
        bool is_cached;
        uint64_t n = page_cache_read(&wb->cache, rq->offset_bytes + rq->done_bytes,
                                     rq->len_bytes - rq->done_bytes, rq->iov, &is_cached);

        if (is_cached) {
            rq_advance(rq, n);
            continue;
        }
        // Holes come back at once: a loop, not a recursion.
        rq->wb.is_running = true;
        rq->wb.has_run = false;
        rq_run(rq, rq->done_bytes + n, read_ran);
        rq->wb.is_running = false;
        if (!rq->wb.has_run)
            return;
    }
    rq_end(rq, rq->wb.error);
}

// ---- Waiting for memory

static unsigned rq_pages(const struct rq *rq)
{
    return (unsigned)((rq->len_bytes - rq->done_bytes) / CACHE_PAGE_BYTES) + 1;
}

static void throttled_go(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);

    (void)res;
    if (rq->wb.error)
        rq_end(rq, rq->wb.error);
    else if (rq->op == REQ_OP_WRITE)
        write_step(rq);
    else
        zero_start(rq);
}

static void throttle(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    atomic_fetch_add(&wb->nr_throttled_total, 1);
    atomic_fetch_add(&wb->nr_throttled, 1);
    rq->wb.next = NULL;
    pthread_mutex_lock(&wb->lock);
    if (rq->wb.is_admitted) { // it has begun: before all others
        rq->wb.next = wb->throttled;
        wb->throttled = rq;
        if (!rq->wb.next)
            wb->throttled_tail = &rq->wb.next;
    } else {
        *wb->throttled_tail = rq;
        wb->throttled_tail = &rq->wb.next;
    }
    pthread_mutex_unlock(&wb->lock);
    flusher_kick(wb);
    // What came free before we were in the list has not seen us.
    request_wake(wb, 0);
}

static bool is_soft(struct writeback *wb)
{
    return atomic_load_explicit(&wb->cache.nr_used, memory_order_relaxed) >= wb->soft_pages;
}

// Near the limit a page comes in for each that has gone, and further away for up to two.
static bool may_come_in(struct writeback *wb, unsigned nr_pages)
{
    if (!is_soft(wb))
        return true;
    if (atomic_load(&wb->credit) <= 0)
        return false;
    atomic_fetch_sub(&wb->credit, nr_pages);
    return true;
}

static void earn_credit(struct writeback *wb, unsigned nr_freed)
{
    unsigned used = atomic_load(&wb->cache.nr_used), all = wb->cache.nr_frames;
    unsigned room = used < all ? all - used : 0, soft_room = max_of(all - wb->soft_pages, 1U);
    int64_t earned = nr_freed + (int64_t)nr_freed * min_of(room, soft_room) / soft_room;

    if (atomic_fetch_add(&wb->credit, earned) + earned > (int64_t)soft_room)
        atomic_store(&wb->credit, (int64_t)soft_room);
}

void request_wake(struct writeback *wb, unsigned nr_freed)
{
    unsigned used;

    if (nr_freed)
        earn_credit(wb, nr_freed);
    if (!atomic_load(&wb->nr_throttled))
        return;
    pthread_mutex_lock(&wb->lock);
    used = atomic_load(&wb->cache.nr_used);
    while (wb->throttled) {
        struct rq *rq = wb->throttled;

        // One that has begun needs a frame at least.
        if (rq->wb.is_admitted ? used++ >= wb->cache.nr_frames : !may_come_in(wb, rq_pages(rq)))
            break;
        wb->throttled = rq->wb.next;
        if (!wb->throttled)
            wb->throttled_tail = &wb->throttled;
        atomic_fetch_sub(&wb->nr_throttled, 1);
        rq->wb.is_admitted = true;
        post(rq, throttled_go);
    }
    pthread_mutex_unlock(&wb->lock);
}

void request_fail_throttled(struct writeback *wb, int error)
{
    struct rq *rq, *next;

    pthread_mutex_lock(&wb->lock);
    rq = wb->throttled;
    wb->throttled = NULL;
    wb->throttled_tail = &wb->throttled;
    pthread_mutex_unlock(&wb->lock);
    for (; rq; rq = next) {
        next = rq->wb.next;
        atomic_fetch_sub(&wb->nr_throttled, 1);
        rq->wb.error = error;
        post(rq, throttled_go);
    }
}

// ---- Waiting for space

static int tight_work(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t start = round_down(rq->offset_bytes + rq->done_bytes, CACHE_PAGE_BYTES);
    uint64_t end = min_of(round_up(rq->offset_bytes + rq->len_bytes, CACHE_PAGE_BYTES), wb->device_bytes);
    int ret = 0;

    // Zeroes, and nobody was promised anything: the file system is the judge.
    if (rq->op == REQ_OP_WRITE || atomic_load(&wb->cache.space->nr_promised))
        ret = delalloc_create_now(&wb->delalloc, start, end);
    if (!ret)
        rq->wb.placed_end = round_up(end, CACHE_PAGE_BYTES);
    return min_of(ret, 0);
}

static void tight_done(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);
    struct writeback *wb = wb_of(rq);

    if (atomic_fetch_sub(&wb->nr_tight, 1) == 1) {
        atomic_store(&wb->delalloc.is_tight, false);
        flusher_kick(wb); // asks the file system again
    }
    if (res < 0)
        rq_end(rq, res);
    else if (rq->op == REQ_OP_WRITE)
        write_step(rq);
    else
        zero_whole(rq);
}

static void tight_go(struct ring_op *op, int res)
{
    (void)res;
    rq_call_worker(rq_of(op), tight_work, tight_done);
}

void request_allocate_tight(struct rq *rqs)
{
    post_all(rqs, tight_go);
}

// Nothing can be promised: what was promised is allocated first, and then this one, or it is told.
static void wait_for_space(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    atomic_fetch_add(&wb->nr_tight, 1);
    delalloc_set_tight(&wb->delalloc);
    pthread_mutex_lock(&wb->lock);
    rq->wb.next = wb->tight;
    wb->tight = rq;
    pthread_mutex_unlock(&wb->lock);
    flusher_kick(wb);
}

// ---- WRITE

static bool never_needs_space(void *place)
{
    (void)place;
    return false;
}

static int look_up_work(struct rq *rq)
{
    return delalloc_look_up(&wb_of(rq)->delalloc, rq->offset_bytes + rq->done_bytes);
}

static void look_up_done(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);

    if (res < 0)
        rq_end(rq, res);
    else
        write_step(rq);
}

// The sector around a write of a part of it, as it is below. 0 or a negative errno.
static int read_sector(struct writeback *wb, uint64_t at, char *buf)
{
    uint32_t len = wb->cache.sector_bytes;
    struct extent ext;
    ssize_t n;
    int ret;

    memset(buf, 0, len);
    ret = map_extent(wb->delalloc.map, at, min_of(len, wb->device_bytes - at), false, true, &ext);
    if (ret < 0 || ext.state != EXTENT_MAPPED)
        return ret;
    do {
        n = pread(ext.fd, buf, len, (off_t)ext.offset_bytes);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : 0;
}

// A part of one sector at at: its rest comes from below. What page_cache_write() says.
static int write_partial(struct writeback *wb, uint64_t at, uint32_t len, const struct iovec *iov,
                         bool is_placed)
{
    uint64_t sector = round_down(at, wb->cache.sector_bytes);
    char *buf = workers_scratch();
    struct cache_fill fill = {.offset = sector, .data = buf};
    int ret;

    if (!buf)
        return -ENOMEM;
    do {
        fill.nr_drops = page_cache_drops(&wb->cache, sector);
        ret = read_sector(wb, sector, buf);
        if (ret < 0)
            return ret == -ENOMEM || ret == -ENOSPC ? -EIO : ret;
        ret = page_cache_write(&wb->cache, at, len, iov, is_placed ? never_needs_space : delalloc_needs_space,
                               (void *)delalloc_place(&wb->delalloc, at), &fill);
    } while (ret == -ESTALE);
    return ret;
}

static uint32_t sector_rest(const struct writeback *wb, uint64_t at, uint64_t len)
{
    return (uint32_t)min_of(wb->cache.sector_bytes - at % wb->cache.sector_bytes, len);
}

// W5. A sector that is written in part waits for those that pass the cache by, and holds back others.
static void partial_go(struct ring_op *op, int res);

static void wake_partials(struct writeback *wb)
{
    struct rq *rqs;

    pthread_mutex_lock(&wb->lock);
    rqs = wb->partials;
    wb->partials = NULL;
    pthread_mutex_unlock(&wb->lock);
    post_all(rqs, partial_go);
}

static void partial_begin(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    atomic_fetch_add(&wb->nr_partial, 1);
    if (!atomic_load(&wb->nr_passing)) {
        partial_go(&rq->ring_op, 0);
        return;
    }
    pthread_mutex_lock(&wb->lock);
    rq->wb.next = wb->partials;
    wb->partials = rq;
    pthread_mutex_unlock(&wb->lock);
    if (!atomic_load(&wb->nr_passing)) // the last one may not have seen us
        wake_partials(wb);
}

static void partial_end(struct rq *rq)
{
    atomic_fetch_sub(&wb_of(rq)->nr_partial, 1);
}

static void passing_end(struct writeback *wb)
{
    if (atomic_fetch_sub(&wb->nr_passing, 1) == 1 && atomic_load(&wb->nr_partial))
        wake_partials(wb);
}

static int partial_work(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t at = rq->offset_bytes + rq->done_bytes;

    return write_partial(wb, at, sector_rest(wb, at, rq->len_bytes - rq->done_bytes), rq->iov,
                         at < rq->wb.placed_end);
}

// n: as page_cache_write(). true: go on.
static bool write_took(struct rq *rq, int n)
{
    if (n > 0) {
        rq_advance(rq, (uint64_t)n);
        return true;
    }
    rq->wb.is_admitted = true;
    if (n == -ENOMEM)
        throttle(rq);
    else if (n == -ENOSPC)
        wait_for_space(rq);
    else
        rq_end(rq, n);
    return false;
}

static void partial_done(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);

    partial_end(rq);
    if (write_took(rq, res))
        write_step(rq);
}

static void write_over(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    if (rq->flags & RQ_FUA) {
        flusher_sync(rq);
        return;
    }
    // The first page after a while wants a tick; many want a pass.
    if (!atomic_load_explicit(&wb->is_ticking, memory_order_relaxed) ||
        (atomic_load_explicit(&wb->cache.nr_used, memory_order_relaxed) >=
             atomic_load_explicit(&wb->begin_pages, memory_order_relaxed) &&
         !atomic_load_explicit(&wb->is_in_pass, memory_order_relaxed)))
        flusher_kick(wb);
    rq_end(rq, 0);
}

static void write_step(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    while (rq->done_bytes < rq->len_bytes) {
        uint64_t at = rq->offset_bytes + rq->done_bytes;
        uint64_t left = min_of(rq->len_bytes - rq->done_bytes, CACHE_CHUNK_BYTES - at % CACHE_CHUNK_BYTES);
        _Atomic uint8_t *place = delalloc_place(&wb->delalloc, at);
        bool is_placed = at < rq->wb.placed_end;
        int n;

        if (atomic_load_explicit(place, memory_order_relaxed) == PLACE_UNKNOWN) {
            rq_call_worker(rq, look_up_work, look_up_done); // A1
            return;
        }
        n = page_cache_write(&wb->cache, at, (uint32_t)left, rq->iov,
                             is_placed ? never_needs_space : delalloc_needs_space, (void *)place, NULL);
        if (n == -EAGAIN) {
            partial_begin(rq);
            return;
        }
        if (!write_took(rq, n))
            return;
    }
    write_over(rq);
}

static bool is_loaded(struct writeback *wb, uint64_t now_ns)
{
    uint64_t until_ns = atomic_load_explicit(&wb->pass_by_until_ns, memory_order_relaxed);
    bool is_still;

    if (now_ns < until_ns || !until_ns)
        return until_ns;
    is_still = atomic_exchange(&wb->passed_bytes, 0) >=
               (uint64_t)wb->background_pages * CACHE_PAGE_BYTES / WB_PASS_BY_SHARE;
    atomic_store(&wb->pass_by_until_ns, is_still ? now_ns + WB_PASS_BY_NS : 0);
    return is_still;
}

// What the io below would have to copy first could be held back there, and a freeze wait for a partial
// write that waits for it.
static bool can_pass_as_it_is(const struct writeback *wb, const struct rq *rq)
{
    uintptr_t mem = 0, mem_mask = wb->dev->image->dio_mem_align - 1, mask = wb->cache.sector_bytes - 1;
    uint64_t lens = rq->offset_bytes | rq->len_bytes;

    for (unsigned i = 0; i < rq->nr_iov; i++) {
        mem |= (uintptr_t)rq->iov[i].iov_base;
        lens |= rq->iov[i].iov_len;
    }
    return !(lens & mask) && !(mem & mem_mask);
}

// W5
static bool may_pass(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t start = rq->offset_bytes, end = start + rq->len_bytes, last_end = rq->queue->write_end_bytes;
    bool is_cached = false, is_delayed;

    rq->queue->write_end_bytes = end;
    if (!is_loaded(wb, rq->queue->ring->now_ns) || (rq->flags & RQ_FUA) ||
        (start == last_end && rq->len_bytes < CACHE_CHUNK_BYTES) || !can_pass_as_it_is(wb, rq) ||
        !delalloc_is_full(&wb->delalloc, start, end))
        return false;
    return !atomic_load(&wb->cache.nr_used) ||
           (page_cache_look(&wb->cache, start, rq->len_bytes, &is_cached, &is_delayed) >= rq->len_bytes &&
            !is_cached);
}

static void passed(struct rq *rq, int error)
{
    passing_end(wb_of(rq));
    rq_end(rq, error);
}

// false: it has to go into the cache.
static bool pass_by(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    if (!may_pass(rq))
        return false;
    atomic_fetch_add(&wb->nr_passing, 1);
    if (atomic_load(&wb->nr_partial)) {
        passing_end(wb);
        return false;
    }
    atomic_fetch_add_explicit(&wb->passed_bytes, rq->len_bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&wb->nr_passed, 1, memory_order_relaxed);
    rq_run(rq, rq->len_bytes, passed);
    return true;
}

static void write_start(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    rq->wb.is_admitted = false;
    rq->wb.placed_end = 0;
    if (!rq->len_bytes) {
        rq_end(rq, 0);
    } else if (pass_by(rq)) {
        ; // it ends with passed()
    } else if (atomic_load_explicit(&wb->nr_throttled, memory_order_relaxed) ||
               !may_come_in(wb, rq_pages(rq))) {
        throttle(rq);
    } else {
        rq->wb.is_admitted = true;
        write_step(rq);
    }
}

// ---- FLUSH, and the end of FUA

static void fua_flushed(struct rq *rq, int error)
{
    rq->op = rq->wb.op;
    rq->ran = NULL;
    if (!error && rq->op == REQ_OP_WRITE_ZEROES)
        zero_whole(rq);
    else
        rq_end(rq, error);
}

void request_synced(struct rq *rq, int error)
{
    if (error) {
        rq_end(rq, error);
        return;
    }
    if (rq->op != REQ_OP_FLUSH) {
        rq->wb.op = rq->op;
        rq->op = REQ_OP_FLUSH;
        rq->ran = fua_flushed;
    }
    flush_submit(rq);
}

static void flush_start(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);

    if (atomic_load(&wb->cache.nr_used))
        flusher_sync(rq);
    else
        flush_submit(rq);
}

// ---- WRITE_ZEROES and DISCARD

// Sectors that are zeroed in part are written, in the cache: all others go below as they are.
static int zero_edges_work(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t at = rq->offset_bytes, end = at + rq->len_bytes, sector_bytes = wb->cache.sector_bytes;

    while (at < end) {
        bool is_placed = false;
        int ret;

        if (at % sector_bytes == 0) // the one at the end, if it is one
            at = max_of(at, round_down(end, sector_bytes));
        if (at == end)
            break;
        do {
            ret = delalloc_look_up(&wb->delalloc, at);
            if (!ret)
                ret = write_partial(wb, at, sector_rest(wb, at, end - at), NULL, is_placed);
            if (ret != -ENOSPC || is_placed)
                break;
            ret =
                delalloc_create_now(&wb->delalloc, round_down(at, CACHE_PAGE_BYTES),
                                    min_of(at - at % CACHE_PAGE_BYTES + CACHE_PAGE_BYTES, wb->device_bytes));
            is_placed = !ret;
        } while (ret >= 0);
        if (ret < 0)
            return ret;
        at += (uint64_t)ret;
    }
    return 0;
}

static void zero_edges_done(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);

    partial_end(rq);
    rq->wb.is_admitted = true;
    if (res == -ENOMEM)
        throttle(rq);
    else if (res < 0)
        rq_end(rq, res);
    else if (rq->flags & RQ_FUA)
        flusher_sync(rq); // and then the rest
    else
        zero_whole(rq);
}

static void partial_go(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);

    (void)res;
    if (rq->op == REQ_OP_WRITE)
        rq_call_worker(rq, partial_work, partial_done);
    else
        rq_call_worker(rq, zero_edges_work, zero_edges_done);
}

static void zero_start(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t end = rq->offset_bytes + rq->len_bytes, mask = wb->cache.sector_bytes - 1;

    rq->wb.is_admitted = false;
    rq->wb.placed_end = 0;
    if (rq->op == REQ_OP_DISCARD || !((rq->offset_bytes & mask) || ((end & mask) && end != wb->device_bytes)))
        zero_whole(rq);
    else if ((rq->flags & RQ_FAST_ZERO) &&
             ((rq->flags & RQ_NOUNMAP) || atomic_load(&wb->dev->io->cannot_punch)))
        rq_end(rq, -EOPNOTSUPP);
    else {
        rq->flags &= (uint8_t)~RQ_FAST_ZERO; // it is too late to refuse the rest when the edges are zeroed
        partial_begin(rq);
    }
}

static bool is_being_written(const struct writeback *wb, uint64_t start, uint64_t end)
{
    for (unsigned i = 0; i < WB_NR_SLOTS; i++) {
        if (wb->slots[i].start < end && start < wb->slots[i].end)
            return true;
    }
    return false;
}

// The image below has the zeroes, or not (then the cache is what it was): that was the whole request. A
// discard that cannot be done is no error, and what was there before is not to come back by it.
static void zeroed(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    struct rq **at;

    rq->done = rq->wb.done;
    if (!rq->error && !(rq->op == REQ_OP_DISCARD && atomic_load(&wb->dev->io->cannot_discard)))
        request_wake(wb,
                     page_cache_drop(&wb->cache, rq->wb.sync.start,
                                     round_up(rq->wb.sync.end, wb->cache.sector_bytes) - rq->wb.sync.start));
    pthread_mutex_lock(&wb->lock);
    for (at = &wb->zeroing; *at != rq;)
        at = &(*at)->wb.next;
    *at = rq->wb.next;
    pthread_mutex_unlock(&wb->lock);
    delalloc_promise_kept(&wb->delalloc, rq->wb.nr_promised);
    atomic_fetch_add(&wb->nr_unblocks, 1);
    flusher_kick(wb);
    queue_count_out(rq->queue);
    rq->done(rq);
}

static void zero_go(struct ring_op *op, int res)
{
    struct rq *rq = rq_of(op);
    struct writeback *wb = wb_of(rq);

    (void)res;
    delalloc_punch(&wb->delalloc, rq->wb.sync.start, rq->wb.sync.end); // A3
    if (rq->op == REQ_OP_WRITE_ZEROES) {                               // nobody asks for the range any more
        rq->offset_bytes = rq->wb.sync.start;
        rq->len_bytes = rq->wb.sync.end - rq->wb.sync.start;
    }
    queue_count_in(rq->queue); // rq_end() comes before what is ours to do then
    rq->wb.done = rq->done;
    rq->done = zeroed;
    rq_punch(rq);
}

static bool zeroes_take_space(const struct rq *rq)
{
    return rq->op == REQ_OP_WRITE_ZEROES &&
           ((rq->flags & RQ_NOUNMAP) || atomic_load(&rq->queue->dev->io->cannot_punch));
}

static void zero_whole(struct rq *rq)
{
    struct writeback *wb = wb_of(rq);
    uint64_t end = rq->offset_bytes + rq->len_bytes;
    bool is_waiting;

    rq->wb.sync.start = round_up(rq->offset_bytes, wb->cache.sector_bytes);
    // The image's last sector, where that is a part of one, can be written as zeroes, but not discarded.
    rq->wb.sync.end = end == wb->device_bytes && rq->op == REQ_OP_WRITE_ZEROES
                          ? end
                          : round_down(end, wb->cache.sector_bytes);
    if (rq->wb.sync.start >= rq->wb.sync.end) {
        rq_end(rq, 0);
        return;
    }
    rq->wb.nr_promised = 0;
    if (zeroes_take_space(rq) && rq->wb.placed_end < rq->wb.sync.end) { // A2
        rq->wb.nr_promised = delalloc_promise(&wb->delalloc, rq->wb.sync.start, rq->wb.sync.end);
        if (!rq->wb.nr_promised) {
            wait_for_space(rq);
            return;
        }
    }
    pthread_mutex_lock(&wb->lock);
    rq->wb.next = wb->zeroing;
    wb->zeroing = rq;
    is_waiting = is_being_written(wb, rq->wb.sync.start, rq->wb.sync.end); // W1
    rq->wb.is_waiting = is_waiting;
    pthread_mutex_unlock(&wb->lock);
    if (!is_waiting)
        zero_go(&rq->ring_op, 0);
}

void request_wake_zeroing(struct writeback *wb)
{
    for (struct rq *rq = wb->zeroing; rq; rq = rq->wb.next) {
        if (!rq->wb.is_waiting || is_being_written(wb, rq->wb.sync.start, rq->wb.sync.end))
            continue;
        rq->wb.is_waiting = false;
        post(rq, zero_go);
    }
}

// ---- The door

bool writeback_submit(struct rq *rq)
{
    rq->wb.error = 0;
    switch (rq->op) {
    case REQ_OP_READ:
        if (atomic_load(&wb_of(rq)->cache.nr_used))
            read_step(rq);
        else
            rq_run(rq, rq->len_bytes, NULL);
        return true;
    case REQ_OP_WRITE:
        write_start(rq);
        return true;
    case REQ_OP_FLUSH:
        flush_start(rq);
        return true;
    case REQ_OP_DISCARD:
    case REQ_OP_WRITE_ZEROES:
        zero_start(rq);
        return true;
    default:
        return false;
    }
}

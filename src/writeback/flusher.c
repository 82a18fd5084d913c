// What goes below: when (flusher_run(), on the first queue's thread), and what (gather(), on a worker).
//
//  G1. A gathering takes the dirty pages from a sync's cursor on, in file order; each slot is a range
//      without a gap, or with gaps that are FRESH (delalloc.h A4), which are written as zeroes: on an
//      allocated but unwritten extent one write of 100 KiB costs less than ten of 4 KiB.
//  G2. Gathering ends when no slot is free, and begins again when enough are.
//  G3. A sync finds places for all that is DELAYED before it writes anything: file systems wait for a
//      file's direct I/O before they allocate. DELAYED pages that come in later are the next one's.
//  G4. A pass begins when there is much to write; but who flushes often waits for all that is dirty then.
//      So it begins at a quarter of what came between the last two flushes, and the client writes on
//      meanwhile, until twice as much has come without another one.

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "image/image.h"
#include "util/util.h"
#include "writeback/wb.h"

static void flusher_run(struct writeback *wb);

static struct queue *home(const struct writeback *wb)
{
    return &wb->dev->queues[0];
}

// ---- Slots

// W1. NULL: no slot is free, or *blocked_end is where what is in the way ends. *end is cut to what is free.
static struct wb_slot *slot_claim(struct writeback *wb, uint64_t start, uint64_t *end, uint64_t *blocked_end)
{
    struct wb_slot *slot = NULL;

    *blocked_end = 0;
    pthread_mutex_lock(&wb->lock);
    for (unsigned i = 0; i < WB_NR_SLOTS; i++) {
        const struct wb_slot *other = &wb->slots[i];

        if (other->start <= start && start < other->end)
            *blocked_end = other->end;
        else if (other->end && other->start > start)
            *end = min_of(*end, other->start);
    }
    for (const struct rq *rq = wb->zeroing; rq; rq = rq->wb.next) {
        if (rq->wb.sync.start <= start && start < rq->wb.sync.end)
            *blocked_end = rq->wb.sync.end;
        else if (rq->wb.sync.start > start)
            *end = min_of(*end, rq->wb.sync.start);
    }
    slot = *blocked_end ? NULL : wb->free_slots;
    if (slot) {
        wb->free_slots = slot->next_free;
        wb->nr_free_slots--;
        slot->start = start;
        slot->end = *end;
    }
    pthread_mutex_unlock(&wb->lock);
    return slot;
}

static void slot_free(struct wb_slot *slot)
{
    struct writeback *wb = slot->wb;

    pthread_mutex_lock(&wb->lock);
    slot->start = slot->end = 0;
    slot->next_free = wb->free_slots;
    wb->free_slots = slot;
    wb->nr_free_slots++;
    request_wake_zeroing(wb);
    pthread_mutex_unlock(&wb->lock);
    atomic_fetch_add(&wb->nr_unblocks, 1);
}

static void sync_failed(struct writeback *wb, struct wb_sync *sync, int error)
{
    int none = 0;

    atomic_compare_exchange_strong(&sync->error, &none, error);
    atomic_store(&wb->error, error);
}

static void slot_over(struct ring_op *op, int res)
{
    struct wb_slot *slot = container_of(op, struct wb_slot, op);
    struct writeback *wb = slot->wb;
    struct wb_sync *sync = slot->sync;

    (void)res;
    slot_free(slot);
    atomic_fetch_sub(&sync->nr_writes, 1); // W2: behind the range's end
    flusher_run(wb);
}

static void slot_ran(struct rq *rq, int error)
{
    struct wb_slot *slot = container_of(rq, struct wb_slot, rq);
    struct writeback *wb = slot->wb;

    if (error)
        sync_failed(wb, slot->sync, error);
    atomic_fetch_add(&wb->nr_writes, 1);
    atomic_fetch_add(&wb->written_bytes, error ? 0 : slot->end - slot->start);
    request_wake(wb, page_cache_written(&wb->cache, slot->refs, slot->nr_refs, error));
    slot->op.done = slot_over;
    if (rq->queue == home(wb))
        slot_over(&slot->op, 0);
    else
        ring_post(home(wb)->ring, &slot->op, 0);
}

static void slot_start(struct ring_op *op, int res)
{
    struct wb_slot *slot = container_of(op, struct wb_slot, op);

    (void)res;
    rq_run(&slot->rq, slot->rq.len_bytes, slot_ran);
}

// To one of the queues, in turn. A worker.
static void slot_submit(struct wb_slot *slot, const struct page_vec *vec)
{
    struct writeback *wb = slot->wb;
    struct queue *queue = &wb->dev->queues[wb->next_queue++ % wb->dev->nr_queues];

    slot->nr_refs = vec->nr_refs;
    slot->rq = (struct rq){
        .op = REQ_OP_WRITE,
        .buf_index = -1,
        .iov = slot->iov,
        .nr_iov = (uint16_t)vec->nr_iov,
        .offset_bytes = slot->start,
        .len_bytes = slot->end - slot->start,
        .queue = queue,
    };
    slot->op.done = slot_start;
    ring_post(queue->ring, &slot->op, 0);
}

// ---- Gathering, on a worker

static bool gap_is_fresh(struct writeback *wb, uint64_t start, uint64_t end)
{
    return end <= wb->fresh_end || delalloc_is_fresh(&wb->delalloc, max_of(start, wb->fresh_end), end);
}

// Zeroes from at up to the next dirty sector, if that is close by and all between is FRESH. Their bytes.
static uint64_t bridge_gap(struct writeback *wb, uint64_t at, uint64_t end, struct page_vec *vec)
{
    struct dirty_at next;
    uint64_t gap;

    if (vec->nr_iov + 2 > vec->max_iov || vec->nr_refs == vec->max_refs ||
        !page_cache_find(&wb->cache, at, min_of(end, at + WB_GAP_BYTES), false, &next) || next.is_delayed ||
        next.is_busy || next.offset == at)
        return 0;
    gap = next.offset - at;
    if (!gap_is_fresh(wb, at, next.offset))
        return 0;
    vec->iov[vec->nr_iov++] = (struct iovec){wb->zeroes, gap};
    return gap;
}

// The last sector may be longer than the device.
static void slot_trim(struct wb_slot *slot, struct page_vec *vec, uint64_t end)
{
    while (slot->end > end) {
        struct iovec *last = &vec->iov[vec->nr_iov - 1];
        uint64_t n = min_of(slot->end - end, last->iov_len);

        last->iov_len -= n;
        slot->end -= n;
        if (!last->iov_len)
            vec->nr_iov--;
    }
}

// The slot's write, from its start on. Returns its end, or 0: nothing is dirty there any more.
static uint64_t slot_fill(struct writeback *wb, struct wb_slot *slot)
{
    struct page_vec vec = {.iov = slot->iov,
                           .refs = slot->refs,
                           .max_iov = WB_SLOT_PAGES,
                           .max_refs = WB_SLOT_PAGES};
    uint64_t at = slot->start, end = slot->end, gap = 0, fresh_end;

    for (;;) {
        uint64_t taken = page_cache_take(&wb->cache, at, end, &vec);

        at += taken;
        if (!taken && gap) { // what was found behind it has gone
            vec.nr_iov--;
            at -= gap;
        }
        if (!taken)
            break;
        gap = bridge_gap(wb, at, end, &vec);
        at += gap;
    }
    if (at == slot->start)
        return 0;
    fresh_end = delalloc_wrote(&wb->delalloc, slot->start, at);
    wb->fresh_end = max_of(wb->fresh_end, fresh_end);
    pthread_mutex_lock(&wb->lock);
    slot->end = at;
    slot_trim(slot, &vec, wb->device_bytes);
    pthread_mutex_unlock(&wb->lock);
    atomic_fetch_add(&slot->sync->nr_writes, 1);
    slot_submit(slot, &vec); // it may be over, and another one, from here on
    return at;
}

// G3
static void find_places(struct writeback *wb, struct wb_sync *sync)
{
    struct dirty_at at;
    uint64_t end;

    while (page_cache_find(&wb->cache, sync->placed_end, sync->end, true, &at)) {
        int ret = delalloc_allocate(&wb->delalloc, at.offset, &end);

        sync->placed_end = at.offset;
        if (ret < 0) {
            sync_failed(wb, sync, ret);
            sync->placed_end = round_up(end, CACHE_PAGE_BYTES);
            page_cache_fail(&wb->cache, at.offset, sync->placed_end);
        }
    }
    sync->placed_end = sync->end;
}

// One step of a sync: a write, or something passed over. false: no slot is free.
static bool gather_step(struct writeback *wb, struct wb_sync *sync)
{
    struct dirty_at at;
    struct wb_slot *slot;
    uint64_t end, blocked_end;

    if (!page_cache_find(&wb->cache, sync->cursor, sync->end, false, &at)) {
        sync->is_gathered = true;
        return true;
    }
    if (at.is_delayed || at.is_busy) { // G3, P3
        sync->is_blocked |= at.is_busy;
        sync->cursor = round_down(at.offset, CACHE_PAGE_BYTES) + CACHE_PAGE_BYTES;
        return true;
    }
    end = min_of(at.offset + WB_SLOT_PAGES * CACHE_PAGE_BYTES, sync->end);
    slot = slot_claim(wb, at.offset, &end, &blocked_end);
    if (!slot && blocked_end) {
        sync->is_blocked = true;
        sync->cursor = round_up(blocked_end, wb->cache.sector_bytes);
        return true;
    }
    if (!slot)
        return false;
    slot->sync = sync;
    if (wb->fresh_sync != sync) {
        wb->fresh_sync = sync;
        wb->fresh_end = 0;
    }
    end = slot_fill(wb, slot);
    if (end)
        sync->cursor = end;
    else
        slot_free(slot);
    return true;
}

// W2: somebody else's writes in the range have to be waited for.
static bool has_foreign_writes(struct writeback *wb, const struct wb_sync *sync)
{
    bool has = false;

    pthread_mutex_lock(&wb->lock);
    for (unsigned i = 0; i < WB_NR_SLOTS; i++) {
        const struct wb_slot *slot = &wb->slots[i];

        has |= slot->sync != sync && slot->start < sync->end && sync->start < slot->end;
    }
    pthread_mutex_unlock(&wb->lock);
    return has;
}

// false: no slot is free.
static bool gather_sync(struct writeback *wb, struct wb_sync *sync)
{
    if (sync->is_gathered)
        return true;
    if (sync->cursor == sync->start) // it begins, or begins again
        wb->fresh_sync = NULL;
    find_places(wb, sync);
    while (!sync->is_gathered) {
        if (!gather_step(wb, sync))
            return false;
    }
    if (has_foreign_writes(wb, sync))
        sync->is_blocked = true;
    return true;
}

static int gather(struct ring_op *op)
{
    struct writeback *wb = container_of(op, struct writeback, job_op);

    // Clients wait for FUA writes, and those are few.
    for (struct rq *rq = wb->fuas; rq; rq = rq->wb.next) {
        if (!gather_sync(wb, &rq->wb.sync))
            return 0;
    }
    if (atomic_load(&wb->is_in_pass))
        gather_sync(wb, &wb->pass);
    delalloc_refresh(&wb->delalloc);
    return 0;
}

// ---- The first queue's thread

static void sync_begin(struct writeback *wb, struct wb_sync *sync)
{
    sync->placed_end = sync->cursor = sync->start;
    sync->is_gathered = sync->is_blocked = false;
    sync->nr_unblocks_seen = atomic_load(&wb->nr_unblocks);
}

// Whether it is over. One that was blocked begins again when something has moved.
static bool sync_is_over(struct writeback *wb, struct wb_sync *sync)
{
    if (!sync->is_gathered || atomic_load(&sync->nr_writes))
        return false;
    if (!sync->is_blocked)
        return true;
    if (sync->nr_unblocks_seen != atomic_load(&wb->nr_unblocks))
        sync_begin(wb, sync);
    return false;
}

static void rq_synced(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    (void)res;
    request_synced(rq, rq->wb.error);
}

static void post_synced(struct rq *rq, int error)
{
    rq->wb.error = error;
    rq->ring_op.done = rq_synced;
    ring_post(rq->queue->ring, &rq->ring_op, 0);
}

static void drain_over(struct ring_op *op, int res)
{
    struct writeback_drain *drain = container_of(op, struct writeback_drain, op);
    struct writeback *wb = drain->wb;

    if (res < 0)
        flush_failed(wb->dev, res); // F2
    if (ring_cancel_timeout(home(wb)->ring, &wb->timer_op))
        atomic_store(&wb->is_ticking, false);
    res = drain->error ? drain->error : atomic_load(&wb->dev->flush_error);
    queue_count_out(home(wb));
    drain->done(drain, res, (uint64_t)atomic_load(&wb->cache.nr_dirty) * CACHE_PAGE_BYTES);
}

static void drain_flush(struct writeback_drain *drain, int error)
{
    struct writeback *wb = drain->wb;

    drain->error = error;
    drain->op = (struct ring_op){.done = drain_over, .code = RING_FSYNC, .fd = wb->dev->image->fd};
    queue_count_in(home(wb));
    ring_queue(home(wb)->ring, &drain->op);
}

static bool has_tight(struct writeback *wb)
{
    bool has;

    pthread_mutex_lock(&wb->lock);
    has = wb->tight;
    pthread_mutex_unlock(&wb->lock);
    return has;
}

// W3
static bool wants_pass(struct writeback *wb)
{
    uint64_t now_ns = home(wb)->ring->now_ns;
    unsigned nr_used = atomic_load(&wb->cache.nr_used);

    if (wb->flushes || wb->drains || has_tight(wb))
        return true;
    if (!nr_used || now_ns < wb->retry_at_ns)
        return false;
    if (atomic_load(&wb->nr_throttled))
        return true;
    return !home(wb)->is_frozen &&
           (nr_used >= atomic_load(&wb->begin_pages) || now_ns - wb->dirty_since_ns >= WB_MAX_AGE_NS);
}

// Pages that came in since the last FLUSH.
static uint64_t pages_since_flush(const struct writeback *wb)
{
    return (atomic_load(&wb->written_bytes) - wb->flushed_bytes) / CACHE_PAGE_BYTES +
           atomic_load(&wb->cache.nr_dirty);
}

// G4
static void flush_came(struct writeback *wb)
{
    uint64_t pages = max_of(pages_since_flush(wb) / WB_FLUSH_SHARE, WB_FLUSH_MIN_PAGES);

    atomic_store(&wb->begin_pages, (unsigned)min_of(pages, wb->background_pages));
    wb->flushed_bytes = atomic_load(&wb->written_bytes);
}

static void pass_begin(struct writeback *wb)
{
    if (atomic_load(&wb->cache.nr_used) >= atomic_load(&wb->begin_pages)) // W5
        atomic_store(&wb->pass_by_until_ns, home(wb)->ring->now_ns + WB_PASS_BY_NS);
    if (pages_since_flush(wb) > 2ULL * WB_FLUSH_SHARE * atomic_load(&wb->begin_pages)) // G4
        atomic_store(&wb->begin_pages, wb->background_pages);
    queue_count_in(home(wb));
    atomic_store(&wb->is_in_pass, true);
    wb->pass_flushes = wb->flushes;
    wb->flushes = NULL;
    wb->pass_drains = wb->drains;
    wb->drains = NULL;
    pthread_mutex_lock(&wb->lock);
    wb->pass_tight = wb->tight;
    wb->tight = NULL;
    pthread_mutex_unlock(&wb->lock);
    wb->dirty_since_ns = home(wb)->ring->now_ns;
    atomic_store(&wb->pass.error, 0);
    sync_begin(wb, &wb->pass);
}

static void pass_end(struct writeback *wb)
{
    struct writeback_drain *drain = wb->pass_drains, *next_drain;
    struct rq *rq = wb->pass_flushes, *next;
    int error = 0;

    if (atomic_load(&wb->cache.nr_failed)) // an older pass's as well
        error = atomic_load(&wb->error);
    else
        atomic_store(&wb->error, 0);
    wb->retry_at_ns = error ? home(wb)->ring->now_ns + WB_TICK_NS : 0;
    wb->pass_flushes = NULL;
    wb->pass_drains = NULL;
    for (; rq; rq = next) {
        next = rq->wb.next;
        post_synced(rq, error);
    }
    for (; drain; drain = next_drain) {
        next_drain = drain->next;
        drain_flush(drain, error);
    }
    request_allocate_tight(wb->pass_tight);
    wb->pass_tight = NULL;
    if (error && atomic_load(&wb->cache.nr_used) >= wb->soft_pages)
        request_fail_throttled(wb, error);
    atomic_store(&wb->is_in_pass, false);
    queue_count_out(home(wb));
}

// FUA writes that are below. true: there are others to be gathered.
static bool end_fuas(struct writeback *wb)
{
    bool has_more = false;

    for (struct rq **at = &wb->fuas; *at;) {
        struct rq *rq = *at;

        if (sync_is_over(wb, &rq->wb.sync)) {
            *at = rq->wb.next;
            post_synced(rq, atomic_load(&rq->wb.sync.error));
            continue;
        }
        has_more |= !rq->wb.sync.is_gathered;
        at = &rq->wb.next;
    }
    return has_more;
}

static bool has_slots(struct writeback *wb)
{
    bool has;

    pthread_mutex_lock(&wb->lock);
    has = wb->nr_free_slots >= WB_NR_SLOTS / 4; // G2
    pthread_mutex_unlock(&wb->lock);
    return has;
}

static void gathered(struct ring_op *op, int res)
{
    struct writeback *wb = container_of(op, struct writeback, job_op);

    (void)res;
    wb->is_job_running = false;
    flusher_run(wb);
}

static void flusher_run(struct writeback *wb)
{
    bool has_more;

    if (wb->is_job_running) // the syncs are the worker's
        return;
    while (wb->new_fuas) {
        struct rq *rq = wb->new_fuas;

        wb->new_fuas = rq->wb.next;
        rq->wb.next = wb->fuas;
        wb->fuas = rq;
    }
    has_more = end_fuas(wb);
    if (atomic_load(&wb->is_in_pass) && sync_is_over(wb, &wb->pass))
        pass_end(wb);
    if (!atomic_load(&wb->is_in_pass) && wants_pass(wb))
        pass_begin(wb);
    has_more |= atomic_load(&wb->is_in_pass) && !wb->pass.is_gathered;
    if (!has_more || !has_slots(wb))
        return;
    wb->is_job_running = true;
    wb->job_op.done = gathered;
    wb->job_op.code = RING_CALL;
    wb->job_op.call = gather;
    ring_queue(home(wb)->ring, &wb->job_op);
}

static void tick(struct ring_op *op, int res);

static void arm_timer(struct writeback *wb)
{
    if (atomic_load(&wb->is_ticking) || !atomic_load(&wb->cache.nr_used))
        return;
    atomic_store(&wb->is_ticking, true);
    wb->timer_op.done = tick;
    wb->timer_op.code = RING_TIMEOUT;
    wb->timer_op.timeout_ns = WB_TICK_NS;
    ring_queue(home(wb)->ring, &wb->timer_op);
}

static void tick(struct ring_op *op, int res)
{
    struct writeback *wb = container_of(op, struct writeback, timer_op);
    uint64_t now_ns = home(wb)->ring->now_ns, written = atomic_load(&wb->written_bytes);

    (void)res;
    if (now_ns > wb->rate_at_ns)
        atomic_store(&wb->bytes_per_s, (uint64_t)((double)(written - wb->rate_bytes) * (double)NSEC_PER_SEC /
                                                  (double)(now_ns - wb->rate_at_ns)));
    wb->rate_at_ns = now_ns;
    wb->rate_bytes = written;
    atomic_store(&wb->is_ticking, false);
    arm_timer(wb);
    flusher_run(wb);
}

static void kicked(struct ring_op *op, int res)
{
    struct writeback *wb = container_of(op, struct writeback, kick_op);

    (void)res;
    atomic_store(&wb->is_kicked, false);
    if (!atomic_load(&wb->is_ticking) && !atomic_load(&wb->is_in_pass))
        wb->dirty_since_ns = wb->rate_at_ns = home(wb)->ring->now_ns;
    arm_timer(wb);
    flusher_run(wb);
}

void flusher_kick(struct writeback *wb)
{
    if (atomic_exchange(&wb->is_kicked, true))
        return;
    ring_post(home(wb)->ring, &wb->kick_op, 0);
}

static void sync_came(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);
    struct writeback *wb = rq->queue->dev->writeback;
    struct rq **list = rq->op == REQ_OP_FLUSH ? &wb->flushes : wb->is_job_running ? &wb->new_fuas : &wb->fuas;

    (void)res;
    rq->wb.next = *list;
    *list = rq;
    if (rq->op != REQ_OP_FLUSH)
        sync_begin(wb, &rq->wb.sync);
    else
        flush_came(wb);
    flusher_run(wb);
}

void flusher_sync(struct rq *rq)
{
    struct writeback *wb = rq->queue->dev->writeback;

    rq->wb.sync.start = round_down(rq->offset_bytes, CACHE_PAGE_BYTES);
    rq->wb.sync.end = round_up(rq->offset_bytes + rq->len_bytes, CACHE_PAGE_BYTES);
    atomic_store(&rq->wb.sync.nr_writes, 0);
    atomic_store(&rq->wb.sync.error, 0);
    rq->ring_op.done = sync_came;
    if (rq->queue == home(wb))
        sync_came(&rq->ring_op, 0);
    else
        ring_post(home(wb)->ring, &rq->ring_op, 0);
}

static void drain_came(struct ring_op *op, int res)
{
    struct writeback_drain *drain = container_of(op, struct writeback_drain, op);
    struct writeback *wb = drain->wb;

    (void)res;
    drain->next = wb->drains;
    wb->drains = drain;
    wb->retry_at_ns = 0;
    flusher_run(wb);
}

void writeback_drain(struct writeback *wb, struct writeback_drain *drain)
{
    drain->wb = wb;
    drain->op = (struct ring_op){.done = drain_came};
    ring_post(home(wb)->ring, &drain->op, 0);
}

void flusher_init(struct writeback *wb)
{
    wb->kick_op.done = kicked;
    wb->pass.start = 0;
    wb->pass.end = round_up(wb->device_bytes, CACHE_PAGE_BYTES);
    for (unsigned i = 0; i < WB_NR_SLOTS; i++) {
        wb->slots[i].wb = wb;
        wb->slots[i].next_free = wb->free_slots;
        wb->free_slots = &wb->slots[i];
    }
    wb->nr_free_slots = WB_NR_SLOTS;
}

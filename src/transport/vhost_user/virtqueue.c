// The rings. A request's way:
//
//   virtqueue_poll -> split_take, packed_take -> blk_start -> queue_submit ... rq done: blk_done ->
//   virtqueue_use end of the batch: virtqueue_publish -> interrupt
//
// See virtqueue.h for the invariants.

#include "transport/vhost_user/virtqueue.h"

#include <endian.h>
#include <string.h>

#include "core/queue.h"
#include "util/util.h"

#define load_acquire16(at) le16toh(__atomic_load_n(at, __ATOMIC_ACQUIRE))
#define store_release16(at, v) __atomic_store_n(at, htole16(v), __ATOMIC_RELEASE)

#define PACKED_AVAIL (1U << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1U << VRING_PACKED_DESC_F_USED)
#define PACKED_EVENT_WRAP (1U << VRING_PACKED_EVENT_F_WRAP_CTR)

// A buffer that was used in one queue may come back in another: the guest stands between the two threads,
// where the thread sanitizer does not see it.
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *addr);
void __tsan_release(void *addr);
#define tsan_from_guest(vq) __tsan_acquire((void *)(vq)->memory)
#define tsan_to_guest(vq) __tsan_release((void *)(vq)->memory)
#else
#define tsan_from_guest(vq) ((void)(vq))
#define tsan_to_guest(vq) ((void)(vq))
#endif

#define MIN_WAITING 12U // V6

// V7: vrings of the process that are not armed.
static atomic_uint nr_awake;

void virtqueue_set_armed(struct virtqueue *vq, bool is_armed)
{
    if (vq->is_armed && !is_armed)
        atomic_fetch_add_explicit(&nr_awake, 1, memory_order_relaxed);
    else if (!vq->is_armed && is_armed)
        atomic_fetch_sub_explicit(&nr_awake, 1, memory_order_relaxed);
    vq->is_armed = is_armed;
}

// V7
static bool virtqueue_has_room(const struct virtqueue *vq)
{
    return 2 * atomic_load_explicit(&nr_awake, memory_order_relaxed) <= vq->nr_cpus;
}

// ---- Chains of descriptors become vrq->iov

static const char *chain_add(struct virtqueue *vq, struct virtqueue_rq *vrq, const struct virtqueue_buf *buf)
{
    uint64_t addr = buf->addr, left = buf->len;
    bool is_in = buf->flags & VRING_DESC_F_WRITE;

    if (!left)
        return "a descriptor is empty";
    if (!is_in && vrq->nr_in)
        return "a request has something to read behind what is to be written";
    while (left) {
        unsigned nr_iov = vrq->nr_out + vrq->nr_in;
        uint64_t len = left;
        char *at = memory_at(vq->memory, addr, &len, &vq->hint);

        if (!at)
            return "a descriptor leads out of the guest's memory";
        if (nr_iov == VIRTQUEUE_MAX_IOV)
            return "a request has too many descriptors";
        vrq->iov[nr_iov] = (struct iovec){.iov_base = at, .iov_len = len};
        addr += len;
        left -= len;
        if (is_in) {
            vrq->nr_in++;
            vrq->in_bytes += len;
        } else {
            vrq->nr_out++;
            vrq->out_bytes += len;
        }
    }
    return NULL;
}

static struct virtqueue_buf split_buf(const struct vring_desc *desc)
{
    return (struct virtqueue_buf){le64toh(desc->addr), le32toh(desc->len), le16toh(desc->flags)};
}

static struct virtqueue_buf packed_buf(const struct vring_packed_desc *desc)
{
    return (struct virtqueue_buf){le64toh(desc->addr), le32toh(desc->len), le16toh(desc->flags)};
}

// 2.7.5.3, 2.8.7: buf leads to a table of descriptors. A loop ends when vrq->iov is full.
static const char *chain_add_table(struct virtqueue *vq, struct virtqueue_rq *vrq,
                                   const struct virtqueue_buf *buf)
{
    uint64_t len = buf->len;
    const char *table, *why;
    unsigned nr, i = 0;

    if (buf->flags & VRING_DESC_F_NEXT)
        return "something follows an indirect descriptor";
    if (!len || len % sizeof(struct vring_desc))
        return "an indirect table has a wrong length";
    table = memory_at(vq->memory, buf->addr, &len, &vq->hint);
    if (!table || len != buf->len)
        return "an indirect table leads out of the guest's memory";
    nr = (unsigned)(len / sizeof(struct vring_desc));
    for (;;) {
        struct vring_desc split;
        struct vring_packed_desc packed;
        struct virtqueue_buf entry;
        unsigned next = i + 1;

        if (vq->is_packed) {
            copy_once(&packed, table + i * sizeof(packed), sizeof(packed));
            entry = packed_buf(&packed);
        } else {
            copy_once(&split, table + i * sizeof(split), sizeof(split));
            entry = split_buf(&split);
            next = le16toh(split.next);
        }
        if (entry.flags & VRING_DESC_F_INDIRECT)
            return "an indirect table leads to another one";
        why = chain_add(vq, vrq, &entry);
        if (why)
            return why;
        if (vq->is_packed ? next == nr : !(entry.flags & VRING_DESC_F_NEXT))
            return NULL;
        if (next >= nr)
            return "an indirect table leads behind its end";
        i = next;
    }
}

static const char *chain_add_any(struct virtqueue *vq, struct virtqueue_rq *vrq,
                                 const struct virtqueue_buf *buf)
{
    return buf->flags & VRING_DESC_F_INDIRECT ? chain_add_table(vq, vrq, buf) : chain_add(vq, vrq, buf);
}

static void chain_begin(struct virtqueue_rq *vrq)
{
    vrq->nr_out = vrq->nr_in = 0;
    vrq->out_bytes = vrq->in_bytes = 0;
}

// ---- Split rings

static const char *split_take_head(struct virtqueue *vq, struct virtqueue_rq *vrq, uint16_t head)
{
    uint16_t i = head;

    chain_begin(vrq);
    vrq->id = head;
    for (;;) {
        struct vring_desc desc;
        struct virtqueue_buf buf;
        const char *why;

        if (i >= vq->size)
            return "a descriptor's number is out of range";
        copy_once(&desc, &vq->desc[i], sizeof(desc));
        buf = split_buf(&desc);
        why = chain_add_any(vq, vrq, &buf);
        if (why || !(buf.flags & VRING_DESC_F_NEXT))
            return why;
        i = le16toh(desc.next);
    }
}

static uint16_t split_nr_avail(const struct virtqueue *vq)
{
    return (uint16_t)(load_acquire16(&vq->avail_ring->idx) - vq->avail);
}

static const char *split_take(struct virtqueue *vq, struct virtqueue_rq *vrq)
{
    uint16_t head;

    if (split_nr_avail(vq) > vq->size)
        return "the available index is out of range";
    head = le16toh(__atomic_load_n(&vq->avail_ring->ring[vq->avail & (vq->size - 1)], __ATOMIC_RELAXED));
    if (head >= vq->size)
        return "a head's number is out of range";
    vq->avail++;
    if (vq->inflight.split) { // V5
        vq->inflight.split->desc[head].counter = vq->inflight_counter++;
        __atomic_store_n(&vq->inflight.split->desc[head].inflight, 1, __ATOMIC_RELEASE);
    }
    return split_take_head(vq, vrq, head);
}

static void split_use(struct virtqueue *vq, struct virtqueue_rq *vrq, uint32_t len)
{
    struct vring_used_elem *elem = &vq->used_ring->ring[vq->used & (vq->size - 1)];

    elem->id = htole32(vrq->id);
    elem->len = htole32(len);
    vq->used++;
    if (vq->inflight.split) {
        vq->inflight.split->desc[vrq->id].next = vq->inflight.split->last_batch_head;
        vq->inflight.split->last_batch_head = vrq->id;
        vq->batch[vq->nr_batch++] = vrq->id;
    }
}

static void split_publish(struct virtqueue *vq)
{
    struct vu_inflight_split *inflight = vq->inflight.split;

    vq->nr_untold += (uint16_t)(vq->used - vq->published);
    store_release16(&vq->used_ring->idx, vq->used);
    vq->published = vq->used;
    if (inflight) { // V5
        while (vq->nr_batch)
            __atomic_store_n(&inflight->desc[vq->batch[--vq->nr_batch]].inflight, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&inflight->used_idx, vq->used, __ATOMIC_RELEASE);
    }
}

// Whether the guest wants to be interrupted for what was published since it was asked last.
static bool split_wants_call(const struct virtqueue *vq)
{
    uint16_t event;

    if (!vq->has_event_idx)
        return !(load_acquire16(&vq->avail_ring->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    event = load_acquire16(&vq->avail_ring->ring[vq->size]);
    return vring_need_event(event, vq->published, (uint16_t)(vq->published - vq->nr_untold));
}

// ---- Packed rings

static void packed_advance(const struct virtqueue *vq, uint16_t *place, bool *wrap, uint16_t n)
{
    *place += n;
    if (*place >= vq->size) {
        *place -= vq->size;
        *wrap = !*wrap;
    }
}

static bool packed_is_avail(const struct virtqueue *vq)
{
    uint16_t flags = load_acquire16(&vq->packed[vq->avail].flags);

    return !!(flags & PACKED_AVAIL) == vq->avail_wrap && !!(flags & PACKED_USED) != vq->avail_wrap;
}

// V5: a copy of the descriptor, in the entry that is next in the free list. Who shares the list may have
// changed it: what it says is only checked for not leading out of it.
static const char *packed_track(struct virtqueue *vq, struct virtqueue_rq *vrq,
                                const struct vring_packed_desc *desc)
{
    struct vu_inflight_packed *inflight = vq->inflight.packed;
    uint16_t free_head = __atomic_load_n(&inflight->free_head, __ATOMIC_RELAXED), next;
    struct vu_desc_state_packed *entry, *head;

    if (free_head >= vq->size || vrq->slot >= vq->size)
        return "the inflight region makes no sense";
    entry = &inflight->desc[free_head];
    next = entry->next;
    head = &inflight->desc[vrq->slot];
    head->last = free_head;
    head->num = vrq->nr_descs;
    entry->id = le16toh(desc->id);
    entry->flags = le16toh(desc->flags);
    entry->len = le32toh(desc->len);
    entry->addr = le64toh(desc->addr);
    vrq->slot_last = free_head;
    inflight->free_head = next;
    return NULL;
}

static const char *packed_take(struct virtqueue *vq, struct virtqueue_rq *vrq)
{
    struct vu_inflight_packed *inflight = vq->inflight.packed;
    struct vring_packed_desc desc;
    uint16_t at = vq->avail;
    struct virtqueue_buf buf;
    const char *why;

    chain_begin(vrq);
    vrq->nr_descs = 0;
    if (inflight)
        vrq->slot = __atomic_load_n(&inflight->free_head, __ATOMIC_RELAXED);
    do {
        if (vrq->nr_descs == vq->size)
            return "a request is longer than the ring";
        copy_once(&desc, &vq->packed[at], sizeof(desc));
        buf = packed_buf(&desc);
        vrq->nr_descs++;
        why = chain_add_any(vq, vrq, &buf);
        if (!why && inflight)
            why = packed_track(vq, vrq, &desc);
        if (why)
            return why;
        at = at + 1 == vq->size ? 0 : at + 1;
    } while (buf.flags & VRING_DESC_F_NEXT);
    vrq->id = le16toh(desc.id);
    packed_advance(vq, &vq->avail, &vq->avail_wrap, vrq->nr_descs);
    if (inflight) {
        inflight->desc[vrq->slot].counter = vq->inflight_counter++;
        __atomic_store_n(&inflight->desc[vrq->slot].inflight, 1, __ATOMIC_RELEASE);
        inflight->old_free_head = inflight->free_head;
    }
    return NULL;
}

// What a dead server has left: the copies in the inflight region, of which first is the head.
static const char *packed_take_inflight(struct virtqueue *vq, struct virtqueue_rq *vrq, uint16_t first)
{
    const struct vu_inflight_packed *inflight = vq->inflight.packed;
    uint16_t i = first, num = __atomic_load_n(&inflight->desc[first].num, __ATOMIC_RELAXED);
    struct vu_desc_state_packed entry;

    chain_begin(vrq);
    if (!num || num > vq->size) // it was checked, and may have changed since
        return "the inflight region makes no sense";
    vrq->slot = first;
    vrq->nr_descs = num;
    for (uint16_t n = 0; n < num; n++) {
        const char *why;

        if (i >= vq->size)
            return "the inflight region makes no sense";
        copy_once(&entry, &inflight->desc[i], sizeof(entry));
        why = chain_add_any(vq, vrq, &(struct virtqueue_buf){entry.addr, entry.len, entry.flags});
        if (why)
            return why;
        vrq->id = entry.id;
        vrq->slot_last = i;
        i = entry.next;
    }
    return NULL;
}

// V4: the flags of the batch's first descriptor are written last.
static void packed_use(struct virtqueue *vq, struct virtqueue_rq *vrq, uint32_t len)
{
    struct vring_packed_desc *desc = &vq->packed[vq->used];
    struct vu_inflight_packed *inflight = vq->inflight.packed;
    uint16_t flags =
        (uint16_t)((len ? VRING_DESC_F_WRITE : 0) | (vq->used_wrap ? PACKED_AVAIL | PACKED_USED : 0));

    desc->id = htole16(vrq->id);
    desc->len = htole32(len);
    if (vq->nr_unpublished)
        store_release16(&desc->flags, flags);
    else
        vq->batch_flags = flags;
    vq->nr_unpublished += vrq->nr_descs;
    packed_advance(vq, &vq->used, &vq->used_wrap, vrq->nr_descs);
    if (inflight) {
        inflight->desc[vrq->slot_last].next = inflight->free_head;
        inflight->free_head = vrq->slot;
        vq->batch[vq->nr_batch++] = vrq->slot;
    }
}

static void packed_publish(struct virtqueue *vq)
{
    struct vu_inflight_packed *inflight = vq->inflight.packed;

    if (inflight) {
        inflight->used_idx = vq->used;
        __atomic_store_n(&inflight->used_wrap_counter, vq->used_wrap, __ATOMIC_RELEASE);
    }
    store_release16(&vq->packed[vq->published].flags, vq->batch_flags);
    vq->published = vq->used;
    vq->nr_untold += vq->nr_unpublished;
    vq->nr_unpublished = 0;
    if (inflight) { // V5
        while (vq->nr_batch)
            __atomic_store_n(&inflight->desc[vq->batch[--vq->nr_batch]].inflight, 0, __ATOMIC_RELEASE);
        inflight->old_free_head = inflight->free_head;
        inflight->old_used_wrap_counter = vq->used_wrap;
        __atomic_store_n(&inflight->old_used_idx, vq->used, __ATOMIC_RELEASE);
    }
}

static bool packed_wants_call(const struct virtqueue *vq)
{
    uint16_t flags = load_acquire16(&vq->driver_event->flags), off_wrap, event;

    if (flags != VRING_PACKED_EVENT_FLAG_DESC || !vq->has_event_idx)
        return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
    off_wrap = le16toh(__atomic_load_n(&vq->driver_event->off_wrap, __ATOMIC_RELAXED));
    event = off_wrap & (uint16_t)~PACKED_EVENT_WRAP;
    // 2.8.10.1: places of the round before count from below 0.
    if (!!(off_wrap & PACKED_EVENT_WRAP) != vq->used_wrap)
        event -= vq->size;
    return vring_need_event(event, vq->used, (uint16_t)(vq->used - vq->nr_untold));
}

// ---- Both

void virtqueue_break(struct virtqueue *vq, const char *why)
{
    struct ring *ring = vq->queue->ring;

    if (vq->is_broken || vq->is_stopping)
        return;
    vq->is_broken = true;
    vq->why_broken = why;
    ring_remove_poller(ring, &vq->poller);
    ring_defer(ring, &vq->publish_hook); // V6
    if (vq->err_fd >= 0) {
        vq->is_err_queued = true;
        ring_queue(ring, &vq->err_op);
    }
    virtqueue_log_broken(vq);
}

static bool virtqueue_has_avail(const struct virtqueue *vq)
{
    if (vq->resubmit_at < vq->nr_resubmit)
        return true;
    return vq->is_packed ? packed_is_avail(vq) : split_nr_avail(vq) != 0;
}

static const char *virtqueue_take(struct virtqueue *vq, struct virtqueue_rq *vrq)
{
    if (__builtin_expect(vq->resubmit_at < vq->nr_resubmit, 0)) {
        uint16_t at = vq->resubmit[vq->resubmit_at++];

        return vq->is_packed ? packed_take_inflight(vq, vrq, at) : split_take_head(vq, vrq, at);
    }
    return vq->is_packed ? packed_take(vq, vrq) : split_take(vq, vrq);
}

// Kicks are of no use while we look by ourselves. With EVENT_IDX, a split ring's place for the next one
// lies behind already.
static void virtqueue_disarm(struct virtqueue *vq)
{
    virtqueue_set_armed(vq, false);
    if (vq->is_packed)
        store_release16(&vq->device_event->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
    else if (!vq->has_event_idx)
        store_release16(&vq->used_ring->flags, VRING_USED_F_NO_NOTIFY);
}

bool virtqueue_arm(struct ring_poller *poller)
{
    struct virtqueue *vq = container_of(poller, struct virtqueue, poller);

    virtqueue_set_armed(vq, true);
    if (vq->is_packed) {
        if (vq->has_event_idx)
            __atomic_store_n(&vq->device_event->off_wrap,
                             htole16((uint16_t)(vq->avail | (vq->avail_wrap ? PACKED_EVENT_WRAP : 0))),
                             __ATOMIC_RELAXED);
        store_release16(&vq->device_event->flags,
                        vq->has_event_idx ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
    } else if (vq->has_event_idx) {
        store_release16((uint16_t *)(void *)&vq->used_ring->ring[vq->size], vq->avail);
    } else {
        store_release16(&vq->used_ring->flags, 0);
    }
    if (vq->kick_fd < 0)
        virtqueue_await_kick(vq);
    __sync_synchronize(); // seen before we look once more
    // Out of tags: what ends wakes us.
    return vq->tags.is_exhausted || !virtqueue_has_avail(vq);
}

bool virtqueue_poll(struct ring_poller *poller)
{
    struct virtqueue *vq = container_of(poller, struct virtqueue, poller);
    unsigned nr = 0, batch = VIRTQUEUE_BATCH;

    if (__builtin_expect(atomic_load_explicit(&vq->memory->is_lost, memory_order_relaxed), 0)) {
        virtqueue_break(vq, "the guest's memory has become shorter");
        return false;
    }
    if (!tags_can_resume(&vq->tags))
        return false;
    if (!vq->is_packed) // what is left keeps us busy while the guest deals with these
        batch = min_of(batch, split_nr_avail(vq) / 4U + (virtqueue_has_room(vq) ? 2 : 4));
    while (nr < batch && virtqueue_has_avail(vq)) {
        struct rq *rq = tags_get(&vq->tags);
        struct virtqueue_rq *vrq;
        const char *why;

        if (!rq)
            break;
        vrq = container_of(rq, struct virtqueue_rq, rq);
        tsan_from_guest(vq);
        why = virtqueue_take(vq, vrq);
        if (!why)
            why = blk_start(vq, vrq);
        if (why) {
            tags_put(&vq->tags, rq);
            virtqueue_break(vq, why);
            break;
        }
        nr++;
    }
    queue_unplug(vq->queue); // the ring submits before its hooks run
    if (nr && vq->is_armed)
        virtqueue_disarm(vq);
    return nr;
}

void virtqueue_use(struct virtqueue *vq, struct virtqueue_rq *vrq, uint32_t len)
{
    if (vq->is_packed)
        packed_use(vq, vrq, len);
    else
        split_use(vq, vrq, len);
    tags_put(&vq->tags, &vrq->rq);
    ring_defer(vq->queue->ring, &vq->publish_hook);
}

void virtqueue_call(struct virtqueue *vq)
{
    struct ring *ring = vq->queue->ring;

    if (vq->call_fd < 0)
        return;
    vq->is_call_due = vq->is_call_queued;
    if (vq->is_call_due)
        return;
    vq->is_call_queued = true;
    ring_queue(ring, &vq->call_op);
    if (vq->is_stopping) // nobody may be there to take it
        ring_cancel(ring, &vq->call_op);
}

static void virtqueue_tell(struct virtqueue *vq)
{
    bool wants_call;

    __sync_synchronize(); // what was published is seen before we look whether they sleep
    wants_call = vq->is_packed ? packed_wants_call(vq) : split_wants_call(vq);
    vq->nr_untold = 0;
    if (wants_call)
        virtqueue_call(vq);
}

// V6. Waking a sleeper costs as much as several requests. But where few are waiting, we would be out of work
// before it is awake.
static bool virtqueue_can_wait(const struct virtqueue *vq)
{
    unsigned nr_waiting;

    if (tags_nr_used(&vq->tags) || vq->is_stopping || vq->is_broken || !virtqueue_has_avail(vq))
        return false;
    nr_waiting = vq->is_packed ? VIRTQUEUE_BATCH : split_nr_avail(vq);
    return (nr_waiting >= MIN_WAITING || !virtqueue_has_room(vq)) && 3 * nr_waiting > vq->nr_untold;
}

void virtqueue_publish(struct ring_hook *hook)
{
    struct virtqueue *vq = container_of(hook, struct virtqueue, publish_hook);

    ring_found(vq->queue->ring);
    tsan_to_guest(vq);
    if (!vq->is_packed)
        split_publish(vq);
    else if (vq->nr_unpublished)
        packed_publish(vq);
    if (!virtqueue_can_wait(vq))
        virtqueue_tell(vq);
    virtqueue_stop_if_idle(vq);
}

void virtqueue_call_done(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, call_op);

    (void)res;
    vq->is_call_queued = false;
    if (vq->is_call_due && !vq->is_stopping)
        virtqueue_call(vq);
    virtqueue_stop_if_idle(vq);
}

void virtqueue_err_done(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, err_op);

    (void)res;
    vq->is_err_queued = false;
    virtqueue_stop_if_idle(vq);
}

// Without an eventfd, we look again after a while.
void virtqueue_await_kick(struct virtqueue *vq)
{
    if (vq->is_kick_awaited)
        return;
    vq->is_kick_awaited = true;
    if (vq->kick_fd < 0)
        vq->kick_op.timeout_ns = VIRTQUEUE_LOOK_NS;
    ring_queue(vq->queue->ring, &vq->kick_op);
}

// The ring polls in its next turn anyway.
void virtqueue_kicked(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, kick_op);

    vq->is_kick_awaited = false;
    if (vq->is_stopping)
        virtqueue_stop_if_idle(vq);
    else if (res < 0)
        virtqueue_break(vq, "its kick eventfd cannot be read");
    else if (vq->kick_fd >= 0)
        virtqueue_await_kick(vq);
}

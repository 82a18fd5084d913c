// How a vring begins and ends, and what a dead server left in it. Cold; see virtqueue.h.

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/vhost_user/virtqueue.h"
#include "util/util.h"

#define PACKED_WRAP_BIT 0x8000U

void virtqueue_init(struct virtqueue *vq, unsigned index)
{
    *vq = (struct virtqueue){.index = index, .kick_fd = -1, .call_fd = -1, .err_fd = -1};
}

bool virtqueue_is_ready(const struct virtqueue *vq, bool is_enabled)
{
    return vq->is_kick_set && (vq->is_enabled || is_enabled) && vq->has_addr && vq->num && !vq->is_broken;
}

// ---- Inflight regions

uint64_t virtqueue_inflight_bytes(bool is_packed, uint16_t size)
{
    uint64_t bytes = is_packed
                         ? sizeof(struct vu_inflight_packed) + size * sizeof(struct vu_desc_state_packed)
                         : sizeof(struct vu_inflight_split) + size * sizeof(struct vu_desc_state_split);

    return round_up(bytes, 64);
}

// Makes a region that is new, all zeroes, ready for use.
static void virtqueue_inflight_init(void *region, bool is_packed, uint16_t size)
{
    struct vu_inflight_split *split = region;
    struct vu_inflight_packed *packed = region;

    if (split->version) // at the same place in both
        return;
    split->desc_num = size;
    if (is_packed) {
        packed->used_wrap_counter = packed->old_used_wrap_counter = 1;
        for (uint16_t i = 0; i < size; i++)
            packed->desc[i].next = (uint16_t)(i + 1);
    }
    split->version = VU_INFLIGHT_VERSION;
}

struct pending {
    uint64_t counter;
    uint16_t at;
};

static int pending_compare(const void *a, const void *b)
{
    const struct pending *x = a, *y = b;

    return x->counter < y->counter ? -1 : x->counter > y->counter;
}

// Fills vq->resubmit, which has room for all, from the pending ones.
static void virtqueue_set_pending(struct virtqueue *vq, struct pending *pending, unsigned nr)
{
    qsort(pending, nr, sizeof(*pending), pending_compare);
    for (unsigned i = 0; i < nr; i++)
        vq->resubmit[i] = pending[i].at;
    vq->nr_resubmit = nr;
    vq->inflight_counter = nr ? pending[nr - 1].counter + 1 : 0;
}

static void split_recover(struct virtqueue *vq, struct pending *pending)
{
    struct vu_inflight_split *inflight = vq->inflight.split, head;
    uint16_t at;
    unsigned nr = 0;

    copy_once(&head, inflight, sizeof(head));
    at = head.last_batch_head;
    // The last batch was published, and the server died before it had taken all of it out.
    for (uint16_t n = (uint16_t)(vq->used - head.used_idx); n && at < vq->size; n--) {
        inflight->desc[at].inflight = 0;
        at = __atomic_load_n(&inflight->desc[at].next, __ATOMIC_RELAXED);
    }
    inflight->used_idx = vq->used;
    for (uint16_t i = 0; i < vq->size; i++) {
        if (inflight->desc[i].inflight)
            pending[nr++] = (struct pending){inflight->desc[i].counter, i};
    }
    virtqueue_set_pending(vq, pending, nr);
    vq->avail = (uint16_t)(vq->used + nr);
}

static int packed_recover(struct virtqueue *vq, struct pending *pending)
{
    struct vu_inflight_packed *inflight = vq->inflight.packed, head;
    uint16_t used, at, nr_descs = 0;
    bool wrap;
    unsigned nr = 0;

    copy_once(&head, inflight, sizeof(head));
    used = head.old_used_idx;
    wrap = head.old_used_wrap_counter;
    if (used >= vq->size || head.used_idx >= vq->size)
        return -EINVAL;
    if (used != head.used_idx || wrap != !!head.used_wrap_counter) {
        uint16_t flags = le16toh(vq->packed[used].flags);
        bool avail_bit = flags >> VRING_PACKED_DESC_F_AVAIL & 1;
        bool used_bit = flags >> VRING_PACKED_DESC_F_USED & 1;

        // Not as the guest had made it available: it was published, so the update is carried through.
        if (avail_bit != wrap || used_bit == wrap) {
            inflight->old_free_head = head.old_free_head = head.free_head;
            inflight->old_used_idx = used = head.used_idx;
            inflight->old_used_wrap_counter = wrap = head.used_wrap_counter;
        }
    }
    inflight->free_head = at = head.old_free_head;
    inflight->used_idx = used;
    inflight->used_wrap_counter = wrap;
    for (uint16_t n = 0; n < vq->size && at < vq->size; n++) {
        inflight->desc[at].inflight = 0;
        at = __atomic_load_n(&inflight->desc[at].next, __ATOMIC_RELAXED);
    }
    for (uint16_t i = 0; i < vq->size; i++) {
        uint16_t num = __atomic_load_n(&inflight->desc[i].num, __ATOMIC_RELAXED); // V2

        if (!inflight->desc[i].inflight)
            continue;
        if (!num || num > vq->size - nr_descs)
            return -EINVAL;
        pending[nr++] = (struct pending){inflight->desc[i].counter, i};
        nr_descs += num;
    }
    virtqueue_set_pending(vq, pending, nr);
    vq->used = vq->avail = used;
    vq->used_wrap = vq->avail_wrap = wrap;
    vq->avail += nr_descs;
    if (vq->avail >= vq->size) {
        vq->avail -= vq->size;
        vq->avail_wrap = !vq->avail_wrap;
    }
    return 0;
}

static int virtqueue_recover(struct virtqueue *vq, const struct virtqueue_env *env)
{
    struct vu_inflight_split *region = env->inflight; // the version's place is the same in both
    struct pending *pending;
    int ret = 0;

    virtqueue_inflight_init(region, vq->is_packed, env->inflight_size);
    if (region->version != VU_INFLIGHT_VERSION || env->inflight_size < vq->size)
        return -EINVAL;
    vq->resubmit = calloc(vq->size, sizeof(*vq->resubmit));
    vq->batch = calloc(vq->tags.depth + VIRTQUEUE_BATCH, sizeof(*vq->batch));
    pending = calloc(vq->size, sizeof(*pending));
    if (!vq->resubmit || !vq->batch || !pending) {
        ret = -ENOMEM;
    } else if (vq->is_packed) {
        vq->inflight.packed = env->inflight;
        ret = packed_recover(vq, pending);
    } else {
        vq->inflight.split = env->inflight;
        split_recover(vq, pending);
    }
    free(pending);
    return ret;
}

// ---- Beginning

// One part of a ring, aligned and all in one region.
static void *virtqueue_part(const struct virtqueue *vq, uint64_t user, uint64_t len_bytes, uint64_t align)
{
    return user & (align - 1) ? NULL : memory_at_user(vq->memory, user, len_bytes);
}

static int virtqueue_translate(struct virtqueue *vq)
{
    const struct vu_vring_addr *addr = &vq->addr;
    uint64_t size = vq->size;

    if (vq->is_packed) {
        vq->packed = virtqueue_part(vq, addr->desc, size * sizeof(*vq->packed), VRING_DESC_ALIGN_SIZE);
        vq->driver_event = virtqueue_part(vq, addr->avail, sizeof(*vq->driver_event), 4);
        vq->device_event = virtqueue_part(vq, addr->used, sizeof(*vq->device_event), 4);
        return vq->packed && vq->driver_event && vq->device_event ? 0 : -EFAULT;
    }
    vq->desc = virtqueue_part(vq, addr->desc, size * sizeof(*vq->desc), VRING_DESC_ALIGN_SIZE);
    vq->avail_ring = virtqueue_part(vq, addr->avail, (3 + size) * 2, VRING_AVAIL_ALIGN_SIZE);
    vq->used_ring =
        virtqueue_part(vq, addr->used, 6 + size * sizeof(struct vring_used_elem), VRING_USED_ALIGN_SIZE);
    return vq->desc && vq->avail_ring && vq->used_ring ? 0 : -EFAULT;
}

static int virtqueue_set_base(struct virtqueue *vq)
{
    if (!vq->is_packed) {
        vq->avail = (uint16_t)vq->base;
        vq->used = le16toh(__atomic_load_n(&vq->used_ring->idx, __ATOMIC_RELAXED)); // the guest may be at it
        return 0;
    }
    // The places of what is available next and used next are the same: nothing is in flight.
    vq->avail = vq->used = vq->base & ~PACKED_WRAP_BIT & 0xffff;
    vq->avail_wrap = vq->used_wrap = vq->base & PACKED_WRAP_BIT;
    return vq->avail < vq->size ? 0 : -EINVAL;
}

static uint32_t virtqueue_get_base(const struct virtqueue *vq)
{
    uint32_t avail = vq->avail, used = vq->used;

    if (!vq->is_packed)
        return avail;
    avail |= vq->avail_wrap ? PACKED_WRAP_BIT : 0;
    used |= vq->used_wrap ? PACKED_WRAP_BIT : 0;
    return avail | used << 16;
}

static void virtqueue_free(struct virtqueue *vq)
{
    tags_destroy(&vq->tags);
    free(vq->resubmit);
    free(vq->batch);
    vq->resubmit = vq->batch = NULL;
}

// What stays with a vring that is stopped is copied into one that has nothing else.
static void virtqueue_clean(struct virtqueue *vq)
{
    struct virtqueue old = *vq;

    virtqueue_init(vq, old.index);
    vq->is_kick_set = old.is_kick_set;
    vq->is_enabled = old.is_enabled;
    vq->has_addr = old.has_addr;
    vq->num = old.num;
    vq->base = old.base;
    vq->addr = old.addr;
    vq->kick_fd = old.kick_fd;
    vq->call_fd = old.call_fd;
    vq->err_fd = old.err_fd;
}

static void virtqueue_prepare_ops(struct virtqueue *vq)
{
    vq->poller.poll = virtqueue_poll;
    vq->poller.arm = virtqueue_arm;
    vq->publish_hook.run = virtqueue_publish;
    vq->kick_op = (struct ring_op){.done = virtqueue_kicked,
                                   .code = vq->kick_fd < 0 ? RING_TIMEOUT : RING_EVENT_WAIT,
                                   .fd = vq->kick_fd};
    vq->call_op = (struct ring_op){.done = virtqueue_call_done, .code = RING_EVENT_SIGNAL, .fd = vq->call_fd};
    vq->err_op = (struct ring_op){.done = virtqueue_err_done, .code = RING_EVENT_SIGNAL, .fd = vq->err_fd};
    vq->start_op.done = virtqueue_started;
    vq->stop_op.done = virtqueue_stop_asked;
}

int virtqueue_start(struct virtqueue *vq, const struct virtqueue_env *env)
{
    int ret;

    virtqueue_clean(vq);
    vq->is_armed = true; // what the first look finds changes that
    vq->is_packed = env->features & VU_BIT(VIRTIO_F_RING_PACKED);
    vq->has_event_idx = env->features & VU_BIT(VIRTIO_RING_F_EVENT_IDX);
    vq->memory = env->memory;
    vq->main_ring = env->main_ring;
    vq->is_writethrough = env->is_writethrough;
    vq->poll_ns = env->poll_ns;
    vq->nr_cpus = (uint16_t)min_of(sysconf(_SC_NPROCESSORS_ONLN), UINT16_MAX);
    if (!vq->num || vq->num > VIRTQUEUE_MAX_SIZE || (!vq->is_packed && !is_power_of_2(vq->num)))
        return -EINVAL;
    vq->size = (uint16_t)vq->num;
    ret = virtqueue_translate(vq);
    if (ret < 0)
        return ret;
    ret = tags_create(&vq->tags, min_of(vq->num, env->dev->depth), sizeof(struct virtqueue_rq));
    if (ret < 0)
        return ret;
    ret = virtqueue_set_base(vq);
    if (!ret && env->inflight)
        ret = virtqueue_recover(vq, env);
    if (ret < 0) {
        virtqueue_free(vq);
        return ret;
    }
    vq->published = vq->used;
    vq->queue = &env->dev->queues[vq->index % env->dev->nr_queues];
    virtqueue_prepare_ops(vq);
    vq->is_running = true; // V1
    ring_post(vq->queue->ring, &vq->start_op, 0);
    return 0;
}

void virtqueue_started(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, start_op);
    struct ring *ring = vq->queue->ring;

    (void)res;
    if (vq->kick_fd >= 0) {
        ring_add_fd(ring, vq->kick_fd);
        virtqueue_await_kick(vq);
    }
    if (vq->call_fd >= 0)
        ring_add_fd(ring, vq->call_fd);
    // Who had the ring before us may have ended between what it used and the interrupt for it: an end that is
    // asked for does not wait for somebody to take that. One too many is nothing to a guest. (A split ring
    // whose index has just come round to 0 is like a fresh one.)
    if (virtqueue_get_base(vq))
        virtqueue_call(vq);
    // There may be requests already: the ring looks before it sleeps.
    ring_add_poller(ring, &vq->poller, vq->poll_ns);
}

// ---- The end

void virtqueue_stop(struct virtqueue *vq, void (*stopped)(struct ring_op *op, int res))
{
    vq->stopped_op.done = stopped;
    ring_post(vq->queue->ring, &vq->stop_op, 0);
}

void virtqueue_stop_asked(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, stop_op);
    struct ring *ring = vq->queue->ring;

    (void)res;
    vq->is_stopping = true;
    ring_remove_poller(ring, &vq->poller);
    virtqueue_set_armed(vq, true); // V7
    if (vq->nr_untold)
        ring_defer(ring, &vq->publish_hook); // V6
    if (vq->is_kick_awaited) {
        if (vq->kick_fd >= 0)
            ring_cancel(ring, &vq->kick_op);
        else
            vq->is_kick_awaited = !ring_cancel_timeout(ring, &vq->kick_op);
    }
    if (vq->is_call_queued)
        ring_cancel(ring, &vq->call_op);
    if (vq->is_err_queued)
        ring_cancel(ring, &vq->err_op);
    virtqueue_stop_if_idle(vq);
}

void virtqueue_stop_if_idle(struct virtqueue *vq)
{
    struct ring *ring = vq->queue->ring;

    if (!vq->is_stopping || tags_nr_used(&vq->tags) || vq->publish_hook.is_queued || vq->is_kick_awaited ||
        vq->is_call_queued || vq->is_err_queued)
        return;
    if (vq->kick_fd >= 0)
        ring_remove_fd(ring, vq->kick_fd);
    if (vq->call_fd >= 0)
        ring_remove_fd(ring, vq->call_fd);
    if (vq->err_fd >= 0)
        ring_remove_fd(ring, vq->err_fd);
    ring_post(vq->main_ring, &vq->stopped_op, 0);
}

void virtqueue_reclaim(struct virtqueue *vq)
{
    vq->is_running = false;
    vq->base = virtqueue_get_base(vq);
    virtqueue_free(vq);
}

void virtqueue_log_broken(const struct virtqueue *vq)
{
    log_limited("vhost-user: %s: queue %u: %s; it is stopped", vq->queue->dev->name, vq->index,
                vq->why_broken);
}

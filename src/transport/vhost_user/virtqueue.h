// A virtqueue (virtio 1.2, chapter 2.7: split, 2.8: packed) and the block requests in it (5.2.6). virtqueue.c
// and blk.c are hot and run on the queue's thread; virtqueue_setup.c is the cold part.
//
//  V1. A vring is the main thread's while it is stopped, and the queue's thread's from start_op until
//      stopped_op. To change anything that a running vring uses, it is stopped first: it takes no more
//      requests, and those in flight come to their end.
//  V2. Everything in guest memory may change at any time and say anything. It is read once, into our own
//      memory, and checked there. Ring indexes and counts that are ours are never read back while it
//      runs.
//  V3. A ring that cannot be understood is broken: it stops, its err eventfd is signalled, and nothing
//      else happens to anybody.
//  V4. What is used is published once for all that ended in a batch, and the guest interrupted at most
//      once for that.
//  V5. With an inflight region, a request is in it from before it begins until it is published.
//  V6. The interrupt waits, while all that was begun is done and enough more is there to be begun: the
//      guest gets more for one, and works on it while we work on the rest.
//  V7. A vring with work at hand keeps a thread of ours and one of its guest's awake. While all of them have
//      CPUs, the guest is interrupted early rather than seldom: its next requests are there before we are
//      out of work. Else one would have to give way to the other.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/tags.h"
#include "transport/vhost_user/memory.h"
#include "transport/vhost_user/proto.h"

#define VIRTQUEUE_MAX_SIZE 32768
#define VIRTQUEUE_SEG_MAX 126 // data segments of a request, as guests are told
// Header, data and status, and some more where they cross from one region into the next.
#define VIRTQUEUE_MAX_IOV (VIRTQUEUE_SEG_MAX + 34)
#define VIRTQUEUE_MAX_RANGES 32  // of a DISCARD or WRITE_ZEROES
#define VIRTQUEUE_BATCH 32       // requests that are begun before they are submitted
#define VIRTQUEUE_LOOK_NS 100000 // without a kick eventfd: how often to look

struct device;
struct queue;
struct virtqueue;

struct virtqueue_rq {
    struct rq rq;
    struct virtqueue *vq;
    uint16_t id;              // split: head; packed: buffer id
    uint16_t nr_descs;        // packed: of the ring, that it takes up
    uint16_t slot, slot_last; // packed, with an inflight region: its first and last entry there
    uint16_t nr_out, nr_in;
    uint16_t range, nr_ranges; // DISCARD, WRITE_ZEROES
    uint8_t *status;
    uint64_t out_bytes, in_bytes;
    union {
        struct iovec iov[VIRTQUEUE_MAX_IOV]; // nr_out that the device reads, nr_in that it writes
        struct virtio_blk_discard_write_zeroes ranges[VIRTQUEUE_MAX_RANGES];
    };
};

struct virtqueue_inflight {
    struct vu_inflight_split *split;
    struct vu_inflight_packed *packed;
};

// A descriptor, of either kind.
struct virtqueue_buf {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
};

struct virtqueue {
    // What a request needs. Set by virtqueue_start().
    _Alignas(64) struct queue *queue;
    const struct memory *memory;
    unsigned hint; // for memory_at()
    bool is_packed, has_event_idx;
    bool is_stopping, is_broken;
    bool is_armed; // kicks are asked for; V7: else it is counted
    bool is_kick_awaited, is_call_queued, is_err_queued, is_call_due;
    uint16_t size;
    uint16_t avail, used;       // ours: split: counters; packed: places in the ring
    uint16_t published;         // split: used, as the guest knows it; packed: where the last batch began
    uint16_t nr_unpublished;    // packed: descriptors used since then
    bool avail_wrap, used_wrap; // packed
    uint16_t nr_cpus;           // of the machine
    uint16_t nr_untold;         // published, and the guest not interrupted for it (packed: descriptors)
    struct tags tags;
    const atomic_bool *is_writethrough;

    struct vring_desc *desc;
    struct vring_avail *avail_ring;
    struct vring_used *used_ring;
    struct vring_packed_desc *packed;
    struct vring_packed_desc_event *driver_event, *device_event;
    uint16_t batch_flags; // packed: of the first used descriptor of the batch, which is written last

    struct virtqueue_inflight inflight; // both NULL: not tracked
    uint64_t inflight_counter;
    uint16_t *resubmit; // what a dead server left in flight, the oldest first: heads or entries
    unsigned nr_resubmit, resubmit_at;
    uint16_t *batch; // with an inflight region: what is to be taken out of it once it is published
    unsigned nr_batch;

    struct ring_poller poller;
    struct ring_hook publish_hook;
    struct ring_op kick_op, call_op, err_op;
    struct ring_op start_op, stop_op, stopped_op;

    // The main thread's.
    unsigned index;
    bool is_running, is_stop_sent; // V1
    bool is_kick_set, is_enabled, has_addr;
    uint32_t num, base; // as SET_VRING_NUM and _BASE have them
    struct vu_vring_addr addr;
    int kick_fd, call_fd, err_fd;
    struct ring *main_ring;
    uint64_t poll_ns;
    const char *why_broken;
};

// What a vring needs of its session.
struct virtqueue_env {
    struct device *dev;
    struct ring *main_ring;
    const struct memory *memory;
    const atomic_bool *is_writethrough;
    uint64_t features;
    void *inflight; // this queue's region, or NULL
    uint16_t inflight_size;
    uint64_t poll_ns;
};

// V2: what was copied is not looked up again.
static inline void copy_once(void *to, const void *from, size_t len)
{
    memcpy(to, from, len);
    __asm__ __volatile__("" ::: "memory");
}

// ---- virtqueue_setup.c, main thread

void virtqueue_init(struct virtqueue *vq, unsigned index);

// Whether all is there that it needs to run. is_enabled: without being told so.
bool virtqueue_is_ready(const struct virtqueue *vq, bool is_enabled);

// Checks and translates what the front-end has set, and hands the vring to its queue. 0 or a negative
// errno.
int virtqueue_start(struct virtqueue *vq, const struct virtqueue_env *env);

// stopped() is called on the main thread once nothing is in flight.
void virtqueue_stop(struct virtqueue *vq, void (*stopped)(struct ring_op *op, int res));

// For stopped(): takes it back from the queue.
void virtqueue_reclaim(struct virtqueue *vq);

// Bytes of a queue's part of the inflight buffer.
uint64_t virtqueue_inflight_bytes(bool is_packed, uint16_t size);

// On the queue's thread.
void virtqueue_started(struct ring_op *op, int res);
void virtqueue_stop_asked(struct ring_op *op, int res);
void virtqueue_log_broken(const struct virtqueue *vq);

// ---- virtqueue.c, queue's thread

bool virtqueue_poll(struct ring_poller *poller);
bool virtqueue_arm(struct ring_poller *poller);
void virtqueue_publish(struct ring_hook *hook);
void virtqueue_await_kick(struct virtqueue *vq);
void virtqueue_kicked(struct ring_op *op, int res);
void virtqueue_call(struct virtqueue *vq);
void virtqueue_call_done(struct ring_op *op, int res);
void virtqueue_err_done(struct ring_op *op, int res);
void virtqueue_stop_if_idle(struct virtqueue *vq);
void virtqueue_set_armed(struct virtqueue *vq, bool is_armed);

// V3.
void virtqueue_break(struct virtqueue *vq, const char *why);

// The request is done: it has written len bytes.
void virtqueue_use(struct virtqueue *vq, struct virtqueue_rq *vrq, uint32_t len);

// ---- blk.c

// vrq->iov is filled. NULL, or why the ring makes no sense.
const char *blk_start(struct virtqueue *vq, struct virtqueue_rq *vrq);

// What both kinds of ring share: timers, the inbox, hooks. Hot; ring_setup.c is the cold part.

#include "ring/ring.h"

#include <assert.h>
#include <errno.h>
#include <unistd.h>

#include "ring/workers.h"
#include "util/util.h"

static void ring_queue_timeout(struct ring *ring, struct ring_op *op)
{
    struct ring_op **at = &ring->timers;

    op->timeout_ns += util_now_ns();
    while (*at && (*at)->timeout_ns <= op->timeout_ns)
        at = &(*at)->next;
    op->next = *at;
    *at = op;
}

void ring_queue(struct ring *ring, struct ring_op *op)
{
    assert(op->done);
    op->ring = ring;
    switch (op->code) {
    case RING_TIMEOUT:
        ring_queue_timeout(ring, op);
        break;
    case RING_CALL:
        workers_submit(op);
        break;
    default:
        ring->ops->queue(ring, op);
    }
}

bool ring_cancel_timeout(struct ring *ring, struct ring_op *op)
{
    for (struct ring_op **at = &ring->timers; *at; at = &(*at)->next) {
        if (*at == op) {
            *at = op->next;
            return true;
        }
    }
    return false;
}

static uint64_t ring_next_timeout(const struct ring *ring)
{
    uint64_t now_ns;

    if (ring->hooks)
        return 0;
    if (!ring->timers)
        return UINT64_MAX;
    now_ns = util_now_ns();
    return ring->timers->timeout_ns > now_ns ? ring->timers->timeout_ns - now_ns : 0;
}

static void ring_expire_timers(struct ring *ring)
{
    while (ring->timers && ring->timers->timeout_ns <= ring->now_ns) {
        struct ring_op *op = ring->timers;

        ring->timers = op->next;
        op->done(op, 0);
    }
}

// A hook that defers itself again runs in the next batch.
static void ring_run_hooks(struct ring *ring)
{
    struct ring_hook *hook = ring->hooks;

    ring->hooks = NULL;
    ring->hooks_tail = &ring->hooks;
    while (hook) {
        struct ring_hook *next = hook->next;

        hook->is_queued = false;
        hook->run(hook);
        hook = next;
    }
}

// Whether to go on without sleeping. Looking for more pays when it comes within poll_max_ns: whether
// the last did tells whether the next will.
static bool ring_poll(struct ring *ring)
{
    struct ring_poller *poller, *next;
    bool is_found = false;

    for (poller = ring->pollers; poller; poller = next) {
        next = poller->next; // it may remove itself
        is_found |= poller->poll(poller);
    }
    if (is_found) {
        ring->poll_ns = ring->now_ns - ring->busy_ns <= ring->poll_max_ns ? ring->poll_max_ns : 0;
        ring_found(ring);
        return true;
    }
    if (ring->now_ns - ring->busy_ns < ring->poll_ns)
        return true;
    for (poller = ring->pollers; poller; poller = poller->next)
        is_found |= !poller->arm(poller);
    return is_found;
}

static int ring_wait(struct ring *ring)
{
    if (ring->pollers && ring_poll(ring))
        return ring->ops->poll ? ring->ops->poll(ring) : ring->ops->wait(ring, 0);
    return ring->ops->wait(ring, ring_next_timeout(ring));
}

int ring_run(struct ring *ring)
{
    int ret = ring_wait(ring);

    if (ret < 0)
        return ret;
    ring_expire_timers(ring);
    ring_run_hooks(ring);
    return 0;
}

void ring_defer(struct ring *ring, struct ring_hook *hook)
{
    if (hook->is_queued)
        return;
    hook->is_queued = true;
    hook->next = NULL;
    *ring->hooks_tail = hook;
    ring->hooks_tail = &hook->next;
}

void ring_post(struct ring *ring, struct ring_op *op, int res)
{
    uint64_t one = 1;

    op->res = res;
    op->next = atomic_load_explicit(&ring->inbox, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&ring->inbox, &op->next, op))
        ;
    if (!atomic_exchange(&ring->is_woken, true) && write(ring->wake_fd, &one, sizeof(one)) < 0)
        assert(errno == EAGAIN); // the counter is full: it is awake
}

void ring_drain_inbox(struct ring *ring)
{
    struct ring_op *op, *next, *fifo = NULL;

    // In this order: what is pushed after the exchange below finds is_woken false and writes wake_fd.
    atomic_store(&ring->is_woken, false);
    op = atomic_exchange(&ring->inbox, NULL);
    for (; op; op = next) { // R4
        next = op->next;
        op->next = fifo;
        fifo = op;
    }
    for (op = fifo; op; op = next) {
        next = op->next; // R3
        op->done(op, op->res);
    }
}

void ring_cancel(struct ring *ring, struct ring_op *op)
{
    ring->ops->cancel(ring, op);
}

void ring_add_poller(struct ring *ring, struct ring_poller *poller, uint64_t poll_max_ns)
{
    ring->poll_max_ns = poll_max_ns;
    poller->next = ring->pollers;
    ring->pollers = poller;
}

void ring_remove_poller(struct ring *ring, struct ring_poller *poller)
{
    for (struct ring_poller **at = &ring->pollers; *at; at = &(*at)->next) {
        if (*at == poller) {
            *at = poller->next;
            return;
        }
    }
}

void ring_add_fd(struct ring *ring, int fd)
{
    if (ring->ops->add_fd)
        ring->ops->add_fd(ring, fd, false);
}

void ring_pin_fd(struct ring *ring, int fd)
{
    if (ring->ops->add_fd)
        ring->ops->add_fd(ring, fd, true);
}

void ring_remove_fd(struct ring *ring, int fd)
{
    ring->ops->remove_fd(ring, fd);
}

int ring_add_buf(struct ring *ring, void *buf, size_t len_bytes)
{
    return ring->ops->add_buf ? ring->ops->add_buf(ring, buf, len_bytes) : -1;
}

void ring_remove_buf(struct ring *ring, int buf_index)
{
    if (buf_index >= 0)
        ring->ops->remove_buf(ring, buf_index);
}

int ring_reserve_bufs(struct ring *ring, unsigned nr)
{
    return ring->ops->reserve_bufs ? ring->ops->reserve_bufs(ring, nr) : -1;
}

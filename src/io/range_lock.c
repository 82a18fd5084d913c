// The lock over ranges of the file that writes of direct.c take once there are unaligned ones. Cold: a
// list is enough, there are as many entries as requests in flight.
//
// Lock order: direct.lock is innermost. rq->lock belongs to whoever holds it.

#include "core/queue.h"
#include "io/direct.h"
#include "util/util.h"

static struct direct *direct_of(struct io *io)
{
    // Under fault:SPEC the device's io is not the direct one itself.
    while (io->lower)
        io = io->lower;
    return container_of(io, struct direct, io);
}

static bool lock_conflicts(const struct rq *a, const struct rq *b)
{
    return a->lock.start < b->lock.end && b->lock.start < a->lock.end &&
           (a->lock.is_exclusive || b->lock.is_exclusive);
}

static bool lock_conflicts_with_any(const struct rq *rq, const struct rq *list, const struct rq *end)
{
    for (; list != end; list = list->lock.next) {
        if (lock_conflicts(rq, list))
            return true;
    }
    return false;
}

static void lock_hold(struct direct *direct, struct rq *rq)
{
    rq->lock.is_held = true;
    rq->lock.next = direct->held;
    direct->held = rq;
}

void direct_lock(struct rq *rq, uint64_t start, uint64_t end, bool is_exclusive,
                 void (*locked)(struct ring_op *op, int res))
{
    struct direct *direct = direct_of(rq->queue->dev->io);
    struct rq **tail = &direct->waiting;
    bool is_free;

    rq->lock.start = start;
    rq->lock.end = end;
    rq->lock.is_exclusive = is_exclusive;
    rq->lock.is_held = false;
    rq->lock.next = NULL;
    rq->ring_op.done = locked;
    pthread_mutex_lock(&direct->lock);
    // Also behind those who wait: nobody is overtaken for ever.
    is_free = !lock_conflicts_with_any(rq, direct->held, NULL) &&
              !lock_conflicts_with_any(rq, direct->waiting, NULL);
    if (is_free) {
        lock_hold(direct, rq);
    } else {
        while (*tail)
            tail = &(*tail)->lock.next;
        *tail = rq;
    }
    pthread_mutex_unlock(&direct->lock);
    if (is_free)
        locked(&rq->ring_op, 0);
}

void direct_unlock(struct rq *rq)
{
    struct direct *direct = direct_of(rq->queue->dev->io);
    struct rq **at;

    pthread_mutex_lock(&direct->lock);
    for (at = &direct->held; *at != rq;)
        at = &(*at)->lock.next;
    *at = rq->lock.next;
    rq->lock.is_held = false;
    for (at = &direct->waiting; *at;) {
        struct rq *waiter = *at;

        if (lock_conflicts_with_any(waiter, direct->held, NULL) ||
            lock_conflicts_with_any(waiter, direct->waiting, waiter)) {
            at = &waiter->lock.next;
            continue;
        }
        *at = waiter->lock.next;
        lock_hold(direct, waiter);
        // Its own thread goes on with it.
        ring_post(waiter->queue->ring, &waiter->ring_op, 0);
    }
    pthread_mutex_unlock(&direct->lock);
}

static void direct_frozen(struct freeze *freeze)
{
    struct direct *direct = container_of(freeze, struct direct, freeze);

    direct->is_locking = true;
    device_unfreeze(direct->io.dev);
}

void direct_start_locking(struct rq *rq)
{
    struct direct *direct = direct_of(rq->queue->dev->io);

    // The queue has not seen that freeze's end, or is_locking would be set: it gets rq back then.
    rq_hold(rq);
    if (!atomic_exchange(&direct->is_freeze_asked, true))
        device_freeze(direct->io.dev, &direct->freeze);
}

void direct_lock_always(struct io *io)
{
    while (io->lower)
        io = io->lower;
    if (io->ops == &io_direct_ops)
        container_of(io, struct direct, io)->is_locking = true;
}

bool direct_wants_direct(const char *spec)
{
    (void)spec;
    return true;
}

int direct_init(struct io *io, const char *spec, struct err *err)
{
    struct direct *direct = container_of(io, struct direct, io);

    (void)spec;
    (void)err;
    direct->freeze.frozen = direct_frozen;
    pthread_mutex_init(&direct->lock, NULL);
    return 0;
}

void direct_exit(struct io *io)
{
    pthread_mutex_destroy(&container_of(io, struct direct, io)->lock);
}

#include "io/plug.h"

#include "core/queue.h"
#include "io/io.h"
#include "util/util.h"

static void plug_hook(struct ring_hook *hook)
{
    plug_flush(container_of(hook, struct plug, hook)); // P1
}

void plug_init(struct plug *plug)
{
    plug->hook.run = plug_hook;
    for (unsigned i = 0; i < PLUG_NR_IOVS; i++) {
        plug->iovs[i].next = plug->free;
        plug->free = &plug->iovs[i];
    }
}

// P3
static void plug_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op), *next;
    struct plug *plug = &rq->queue->plug;
    struct plug_iovs *iovs = container_of(op->rw.iov, struct plug_iovs, iov[0]);
    uint64_t left_bytes = (uint64_t)max_of(res, 0);

    iovs->next = plug->free;
    plug->free = iovs;
    for (; rq; rq = next) {
        uint64_t n = min_of(left_bytes, rq_part_bytes(rq));

        next = rq->merged;
        rq->merged = NULL;
        left_bytes -= n;
        if (n) {
            rq_part_done(rq, (int)n);
        } else {
            io_prep_rw(rq, io_rw_done);
            plug->issue(rq);
        }
    }
}

// P2. Buffers that lie side by side become one vector: with luck one that is registered.
static void plug_merge(struct plug *plug, struct rq *first)
{
    struct plug_iovs *iovs = plug->free;
    struct ring_op *op = &first->ring_op;
    struct iovec *last = NULL;

    plug->free = iovs->next;
    op->rw.iov = iovs->iov;
    op->rw.nr_iov = 0;
    op->done = plug_done;
    first->merged_bytes = plug->len_bytes;
    for (const struct rq *rq = first; rq; rq = rq->merged) {
        if (rq->buf_index != first->buf_index)
            op->buf_index = -1;
        for (unsigned i = 0; i < rq->part_nr_iov; i++) {
            const struct iovec *iov = &rq->iov[i];

            if (last && (char *)last->iov_base + last->iov_len == iov->iov_base) {
                last->iov_len += iov->iov_len;
            } else {
                last = &iovs->iov[op->rw.nr_iov++];
                *last = *iov;
            }
        }
    }
}

void plug_issue(struct plug *plug)
{
    struct rq *rq = plug->first, *next;

    plug->first = NULL; // what issue() completes may plug anew
    if (rq->merged && plug->free) {
        plug_merge(plug, rq);
        plug->issue(rq);
        return;
    }
    for (; rq; rq = next) {
        next = rq->merged;
        rq->merged = NULL;
        plug->issue(rq);
    }
}

static bool plug_takes(const struct plug *plug, const struct rq *rq)
{
    const struct ring_op *last = &plug->last->ring_op, *op = &rq->ring_op;

    // One vector names one registered buffer only.
    return !plug->last->give_memory && !rq->give_memory && last->code == op->code && last->fd == op->fd &&
           !last->rw_flags && !op->rw_flags &&
           last->rw.offset_bytes + rq_part_bytes(plug->last) == op->rw.offset_bytes &&
           plug->nr_iov + rq->part_nr_iov <= PLUG_MAX_RQS &&
           plug->len_bytes + rq_part_bytes(rq) <= PLUG_MAX_BYTES;
}

void plug_rw(struct rq *rq, void (*issue)(struct rq *rq))
{
    struct plug *plug = &rq->queue->plug;

    io_prep_rw(rq, io_rw_done);
    rq->merged = NULL;
    while (plug->first && !plug_takes(plug, rq))
        plug_issue(plug); // more than once: a short result comes back into the plug
    if (plug->first) {
        plug->last->merged = rq;
        plug->nr_iov += rq->part_nr_iov;
        plug->len_bytes += rq_part_bytes(rq);
    } else {
        plug->first = rq;
        plug->issue = issue;
        plug->nr_iov = rq->part_nr_iov;
        plug->len_bytes = rq_part_bytes(rq);
        ring_defer(rq->queue->ring, &plug->hook);
    }
    plug->last = rq;
}

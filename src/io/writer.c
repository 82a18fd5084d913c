// Hot: requests come in by one compare and exchange; a worker is woken only when none is at it.

#include "io/writer.h"

#include <errno.h>
#include <sys/uio.h>

#include "core/queue.h"
#include "io/plug.h"
#include "util/util.h"

// So many results, or so many bytes, are told together.
#define POST_MAX 16
#define POST_MAX_BYTES (256 * 1024)

static struct rq writer_busy;

static int writer_write(const struct ring_op *op)
{
    ssize_t n;

    do {
        n = pwritev2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, op->rw_flags);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

// Has the queues' threads told of [from, to): one wake-up for many.
static void writer_post(struct rq *from, const struct rq *to)
{
    while (from != to) {
        struct rq *next = from->next; // from is its queue's again once posted

        ring_post(from->queue->ring, &from->ring_op, from->ring_op.res);
        from = next;
    }
}

// Writes what was queued up to now, first come first. last: as taken from head.
static void writer_write_list(struct rq *last)
{
    struct rq *rq, *next, *fifo = NULL, *unposted;
    unsigned nr_unposted = 0;
    uint64_t unposted_bytes = 0;

    for (rq = last; rq && rq != &writer_busy; rq = next) {
        next = rq->next;
        rq->next = fifo;
        fifo = rq;
    }
    unposted = fifo;
    for (rq = fifo; rq; rq = next) {
        next = rq->next;
        rq->ring_op.res = writer_write(&rq->ring_op);
        unposted_bytes += plug_bytes(rq);
        if (++nr_unposted < POST_MAX && unposted_bytes < POST_MAX_BYTES && next)
            continue;
        writer_post(unposted, next);
        unposted = next;
        nr_unposted = 0;
        unposted_bytes = 0;
    }
}

static int writer_work(struct ring_op *op)
{
    struct writer *writer = container_of(op, struct writer, op);
    struct rq *last;

    while ((last = atomic_exchange(&writer->head, &writer_busy)) != &writer_busy)
        writer_write_list(last);
    return 0;
}

static void writer_start(struct ring_hook *hook)
{
    struct writer *writer = container_of(hook, struct writer, start_hook);

    ring_queue(writer->queue->ring, &writer->op);
}

// At the end of the batch: the worker is woken once it has all of it to do, and this thread sleeps.
static void writer_start_soon(struct writer *writer, struct queue *queue)
{
    writer->queue = queue;
    queue_count_in(queue); // the queue must not end before the job has
    ring_defer(queue->ring, &writer->start_hook);
}

bool writer_try_begin(struct writer *writer)
{
    struct rq *idle = NULL;

    return atomic_compare_exchange_strong(&writer->head, &idle, &writer_busy);
}

// Idle only if nothing came meanwhile; else whoever came relies on this to go on.
void writer_end(struct writer *writer, struct queue *queue)
{
    struct rq *busy = &writer_busy;

    if (!atomic_compare_exchange_strong(&writer->head, &busy, NULL))
        writer_start_soon(writer, queue);
}

static void writer_work_done(struct ring_op *op, int res)
{
    struct writer *writer = container_of(op, struct writer, op);
    struct queue *queue = writer->queue;

    (void)res;
    writer_end(writer, queue);
    queue_count_out(queue);
}

void writer_queue(struct writer *writer, struct rq *rq)
{
    struct queue *queue = rq->queue;
    struct rq *head = atomic_load_explicit(&writer->head, memory_order_relaxed);

    do {
        rq->next = head;
    } while (!atomic_compare_exchange_weak(&writer->head, &head, rq));
    if (!head)
        writer_start_soon(writer, queue); // it was idle
}

void writer_init(struct writer *writer)
{
    atomic_init(&writer->head, NULL);
    writer->start_hook.run = writer_start;
    writer->op.done = writer_work_done;
    writer->op.code = RING_CALL;
    writer->op.call = writer_work;
}

// Hot: requests come in by one compare and exchange; a worker is woken only when none is at it.

#include "io/writer.h"

#include <errno.h>
#include <sys/uio.h>

#include "core/queue.h"
#include "util/util.h"

static struct rq writer_busy;

static int writer_write(const struct ring_op *op)
{
    ssize_t n;

    do {
        n = pwritev2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, op->rw_flags);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

// Writes what was queued up to now, first come first. last: as taken from head.
static void writer_write_list(struct rq *last)
{
    struct rq *rq, *next, *fifo = NULL;

    for (rq = last; rq && rq != &writer_busy; rq = next) {
        next = rq->next;
        rq->next = fifo;
        fifo = rq;
    }
    for (rq = fifo; rq; rq = next) {
        next = rq->next; // rq is its queue's again once posted
        ring_post(rq->queue->ring, &rq->ring_op, writer_write(&rq->ring_op));
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

static void writer_start(struct writer *writer, struct queue *queue)
{
    writer->queue = queue;
    queue_count_in(queue); // the queue must not end before the job has
    ring_queue(queue->ring, &writer->op);
}

// Idle only if nothing came meanwhile; else whoever came relies on this to go on.
static void writer_work_done(struct ring_op *op, int res)
{
    struct writer *writer = container_of(op, struct writer, op);
    struct queue *queue = writer->queue;
    struct rq *busy = &writer_busy;

    (void)res;
    if (!atomic_compare_exchange_strong(&writer->head, &busy, NULL))
        writer_start(writer, queue);
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
        writer_start(writer, queue); // it was idle
}

void writer_init(struct writer *writer)
{
    atomic_init(&writer->head, NULL);
    writer->op.done = writer_work_done;
    writer->op.code = RING_CALL;
    writer->op.call = writer_work;
}

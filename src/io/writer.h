// One writer at a time for one file, fed by all queues without a lock.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>

#include "core/rq.h"

struct writer {
    // NULL: idle. writer_busy: a worker writes, nothing is queued. Else: what is queued, the last
    // first, down to NULL or writer_busy.
    _Atomic(struct rq *) head;
    struct ring_op op;   // the worker's job; in flight unless head is NULL
    struct queue *queue; // that has started it
    struct ring_hook start_hook;
};

void writer_init(struct writer *writer);

// rq's part at hand, prepared in rq->ring_op, is written after all that was queued before it, and
// rq->ring_op.done called on rq's thread. Any queue's thread.
void writer_queue(struct writer *writer, struct rq *rq);

static inline bool writer_is_idle(struct writer *writer)
{
    return !atomic_load_explicit(&writer->head, memory_order_acquire);
}

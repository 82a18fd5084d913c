// One writer at a time for one file, fed by all queues without a lock.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>

#include "core/rq.h"

struct writer {
    // NULL: idle. writer_busy: somebody writes, nothing is queued. Else: what is queued, the last
    // first, down to NULL or writer_busy.
    _Atomic(struct rq *) head;
    struct ring_op
        op; // the worker's job; in flight unless head is NULL, or between writer_try_begin() and writer_end()
    struct queue *queue; // that has started it
    struct ring_hook start_hook;
};

void writer_init(struct writer *writer);

// rq's part at hand, prepared in rq->ring_op, is written after all that was queued before it, and
// rq->ring_op.done called on rq's thread. Any queue's thread.
void writer_queue(struct writer *writer, struct rq *rq);

// Takes the writer's place for a write on this thread, if it is idle: true, and writer_end() is due. Any
// queue's thread.
bool writer_try_begin(struct writer *writer);
void writer_end(struct writer *writer, struct queue *queue);

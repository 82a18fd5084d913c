// A queue: one thread and one ring that serve requests of a device. The hot path of bight:
//
//   transport -> queue_submit -> rq_start -> rq_step -> map_extent -> io_rw -> ring_queue
//   ring done -> rq_part_done -> rq_end -> rq->done (transport)
//
//  Q1. A queue's data is touched by its own thread alone; others send it messages by ring_post().
//  Q2. A request is answered exactly once, by rq->done(), on its queue's thread.
//  Q3. nr_inflight counts the requests between rq_start() and rq_end(). While the queue is frozen
//      none is started; those that were under way come to their end.
//  Q4. nr_parts counts the parts of READ and WRITE that are with the io, those from before the last
//      barrier apart from those after it. A barrier is over when there are none of the former.
//  Q5. A transport with memory of its own for requests counts it in buf_bytes. Beyond max_buf_bytes a stream
//      of them gets no more than one request's, which wakes the next, or QUEUE_STREAM_BYTES: who does not
//      take its answers makes others slower with large requests alone.
#pragma once

#include <pthread.h>
#include <stdbool.h>

#include "core/limits.h"
#include "core/rq.h"
#include "core/stats.h"
#include "io/plug.h"

#define QUEUE_STREAM_BYTES (512 * 1024)

struct device;

struct queue {
    _Alignas(64) struct device *dev; // queues are neighbours in an array, and share no cache line
    struct ring *ring;
    unsigned index;
    unsigned nr_inflight;
    struct limits limits; // the device's, as of the last unfreeze: those are changed by another thread
    bool is_frozen;
    bool is_freeze_due;           // frozen, and the device has not been told yet
    struct rq *held, **held_tail; // waiting for the end of the freeze
    unsigned nr_parts[2], phase;  // Q4: new ones count in nr_parts[phase]
    bool is_barrier_due;
    uint64_t buf_bytes; // Q5
    struct queue_stats *stats;
    struct plug plug;
    uint64_t write_end_bytes; // write-back's: of the last WRITE

    // Messages from other threads (lifecycle.c).
    struct ring_op freeze_op, unfreeze_op, barrier_op, stop_op;
    bool is_stopping;
    pthread_t thread;
};

// The device's answer to a request. Never blocks. Queue's thread.
void queue_submit(struct queue *queue, struct rq *rq);

// Q5: whether a stream that has stream_bytes may have len_bytes more. Queue's thread.
static inline bool queue_has_room(const struct queue *queue, uint64_t stream_bytes, uint64_t len_bytes)
{
    return !stream_bytes || stream_bytes + len_bytes <= QUEUE_STREAM_BYTES ||
           queue->buf_bytes + len_bytes <= queue->limits.max_buf_bytes;
}

// They are taken; to give them back, less than 0.
static inline void queue_count_bufs(struct queue *queue, uint64_t *stream_bytes, int64_t len_bytes)
{
    queue->buf_bytes += (uint64_t)len_bytes;
    *stream_bytes += (uint64_t)len_bytes;
}

// Begins again what was held back; for lifecycle.c.
void queue_restart_held(struct queue *queue);

// The transport has no more requests at hand. Queue's thread.
static inline void queue_unplug(struct queue *queue)
{
    plug_flush(&queue->plug);
}

// For an io: takes rq back until the next unfreeze of the device, then begins again with what is not
// done yet. Queue's thread.
void rq_hold(struct rq *rq);

// For an io: the part at hand has moved res bytes, or failed with a negative errno. 0 bytes: the end
// of the file below. Queue's thread.
void rq_part_done(struct rq *rq, int res);

// For an io: shortens the part at hand to len_bytes (> 0).
void rq_cut_part(struct rq *rq, uint64_t len_bytes);

// READ, WRITE: goes through map and io from done_bytes up to run_bytes, then calls ran(). For write-back.
void rq_run(struct rq *rq, uint64_t run_bytes, void (*ran)(struct rq *rq, int error));

// The lower layers are done with it: ends with rq->ran() where that is set, else with rq_end().
void rq_ran(struct rq *rq, int error);

// For who looks at the data, or has it moved otherwise than through the ring: there is memory behind iov when
// it comes back. 0 or a negative errno to end with. Queue's thread.
int rq_need_memory(struct rq *rq);

// DISCARD, WRITE_ZEROES: the map is told before and after, and the io does it. Ends with rq_end().
void rq_punch(struct rq *rq);

// n bytes of the data have been moved.
void rq_advance(struct rq *rq, uint64_t n);

// The request is over with error (0 or a negative errno). Queue's thread.
void rq_end(struct rq *rq, int error);

// Has a worker run work(rq), and done() called with its result on the queue's thread. Any done() may
// be rq_work_done(), which ends the request with that. Queue's thread.
void rq_call_worker(struct rq *rq, int (*work)(struct rq *rq), void (*done)(struct ring_op *op, int res));
void rq_work_done(struct ring_op *op, int res);

// Q4, the queue's turn is over: tells the device (lifecycle.c).
void queue_tell_barrier(struct queue *queue);

// The queue is frozen and idle: tells the device (lifecycle.c).
void queue_tell_frozen(struct queue *queue);

// Q3, for requests and for what else must come to its end before a freeze or the queue's end.
static inline void queue_count_in(struct queue *queue)
{
    queue->nr_inflight++;
}

static inline void queue_count_out(struct queue *queue)
{
    queue->nr_inflight--;
    if (queue->is_freeze_due && !queue->nr_inflight)
        queue_tell_frozen(queue);
}

// A request's way through the core. See queue.h for the path and the invariants.

#include "core/queue.h"

#include <assert.h>
#include <errno.h>

#include "core/block_status.h"
#include "core/device.h"
#include "core/flush.h"
#include "io/io.h"
#include "util/iov.h"
#include "util/util.h"
#include "writeback/writeback.h"

static void queue_hold(struct queue *queue, struct rq *rq)
{
    rq->next = NULL;
    *queue->held_tail = rq;
    queue->held_tail = &rq->next;
}

// Q4.
static void rq_part_in(struct rq *rq)
{
    struct queue *queue = rq->queue;

    queue->nr_parts[queue->phase]++;
    rq->part_phase = (uint8_t)(queue->phase + 1);
}

static void rq_part_out(struct rq *rq)
{
    struct queue *queue = rq->queue;
    unsigned phase = rq->part_phase;

    if (!phase)
        return;
    rq->part_phase = 0;
    queue->nr_parts[phase - 1]--;
    if (queue->is_barrier_due && !queue->nr_parts[queue->phase ^ 1])
        queue_tell_barrier(queue);
}

static void rq_map_call(struct rq *rq, enum map_call_code code, void (*done)(struct ring_op *op, int res))
{
    struct map *map = rq->queue->dev->map;

    rq->map_call.code = code;
    rq->map_call.done = done;
    if (code != MAP_PUNCH_END) { // else the map still looks at these
        rq->map_call.start_bytes = rq->offset_bytes + rq->done_bytes;
        rq->map_call.len_bytes = rq->len_bytes - rq->done_bytes;
        rq->map_call.ring = rq->queue->ring;
    }
    map->ops->call(map, &rq->map_call);
}

static void rq_punch_ended(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, map_call.op);

    (void)res;
    rq_end(rq, rq->error);
}

void rq_end(struct rq *rq, int error)
{
    struct queue *queue = rq->queue;
    struct op_stats *stats = &queue->stats->op[rq->op];

    assert(error <= 0);
    rq->error = error;
    rq_part_out(rq);
    if (rq->is_punching) {
        rq->is_punching = false;
        rq_map_call(rq, MAP_PUNCH_END, rq_punch_ended);
        return;
    }
    stats_add(&stats->nr_done, 1);
    if (error)
        stats_add(&stats->nr_errors, 1);
    else
        stats_add(&stats->nr_bytes, rq->len_bytes);
    stats_add(&stats->latency[stats_bucket(queue->ring->now_ns - rq->start_ns)], 1);
    stats_add(&queue->stats->nr_inflight, -1U);
    queue_count_out(queue);
    rq->done(rq); // Q2
}

static void rq_uncut_part(struct rq *rq)
{
    if (!rq->iov_cut_bytes)
        return;
    rq->iov[rq->part_nr_iov - 1].iov_len += rq->iov_cut_bytes;
    rq->iov_cut_bytes = 0;
}

void rq_cut_part(struct rq *rq, uint64_t len_bytes)
{
    unsigned i = 0;
    uint64_t left = len_bytes;

    rq_uncut_part(rq);
    while (left > rq->iov[i].iov_len)
        left -= rq->iov[i++].iov_len;
    rq->part_nr_iov = (uint16_t)(i + 1);
    rq->iov_cut_bytes = rq->iov[i].iov_len - left;
    rq->iov[i].iov_len = left;
    rq->ext.len_bytes = len_bytes;
}

void rq_advance(struct rq *rq, uint64_t n)
{
    rq->done_bytes += n;
    rq_uncut_part(rq);
    while (rq->nr_iov && n >= rq->iov->iov_len) {
        n -= rq->iov->iov_len;
        rq->iov++;
        rq->nr_iov--;
    }
    if (n) {
        rq->iov->iov_base = (char *)rq->iov->iov_base + n;
        rq->iov->iov_len -= n;
    }
}

int rq_need_memory(struct rq *rq)
{
    int (*give_memory)(struct rq * rq) = rq->give_memory;

    if (__builtin_expect(!give_memory, 1))
        return 0;
    rq->give_memory = NULL;
    rq->buf_index = -1;
    return give_memory(rq);
}

void rq_ran(struct rq *rq, int error)
{
    if (rq->ran)
        rq->ran(rq, error);
    else
        rq_end(rq, error);
}

// READ: the part at hand is zeroes.
static int rq_zero_part(struct rq *rq)
{
    int ret = rq_need_memory(rq);

    if (ret < 0)
        return ret;
    iov_zero(rq->iov, 0, rq_part_bytes(rq));
    rq_advance(rq, rq_part_bytes(rq));
    return 0;
}

static void rq_step(struct rq *rq);

static void rq_fetched(struct ring_op *op, int res)
{
    (void)res; // or it would ask again
    rq_step(container_of(op, struct rq, map_call.op));
}

// The next part of a READ or WRITE: what lies in one extent.
static void rq_step(struct rq *rq)
{
    struct device *dev = rq->queue->dev;

    rq_uncut_part(rq); // begins again after rq_hold()
    while (rq->done_bytes < rq->run_bytes) {
        uint64_t left_bytes = rq->run_bytes - rq->done_bytes;
        int ret = map_extent(dev->map, rq->offset_bytes + rq->done_bytes, left_bytes, false, false, &rq->ext);

        if (ret == -EAGAIN) {
            rq_map_call(rq, MAP_FETCH, rq_fetched);
            return;
        }
        if (ret < 0) {
            rq_ran(rq, ret);
            return;
        }
        if (rq->op == REQ_OP_WRITE && dev->map->ops->begin_write)
            dev->map->ops->begin_write(dev->map, &rq->ext);
        if (rq->ext.state == EXTENT_MAPPED) {
            rq_part_in(rq);
            if (rq->ext.len_bytes < rq->len_bytes - rq->done_bytes)
                rq_cut_part(rq, rq->ext.len_bytes);
            else
                rq->part_nr_iov = rq->nr_iov;
            io_rw(dev->io, rq);
            return;
        }
        assert(rq->op == REQ_OP_READ); // a map that has holes on the data path allocates for writes
        ret = rq_zero_part(rq);
        if (ret < 0) {
            rq_ran(rq, ret);
            return;
        }
    }
    rq_ran(rq, 0);
}

void rq_run(struct rq *rq, uint64_t run_bytes, void (*ran)(struct rq *rq, int error))
{
    rq->ran = ran;
    rq->run_bytes = run_bytes;
    rq_step(rq);
}

void rq_part_done(struct rq *rq, int res)
{
    rq_part_out(rq);
    if (rq->op == REQ_OP_WRITE && res > 0)
        flush_note_write(rq);
    if (res < 0) {
        rq_ran(rq, res);
        return;
    }
    if (!res) {
        // The file ends before the device does: zeroes. A write that moves nothing never will.
        if (rq->op != REQ_OP_READ) {
            rq_ran(rq, -EIO);
            return;
        }
        res = rq_zero_part(rq);
        if (res < 0) {
            rq_ran(rq, res);
            return;
        }
    } else if ((uint64_t)res == rq->len_bytes - rq->done_bytes) {
        rq->done_bytes = rq->len_bytes;
        rq_ran(rq, 0);
        return;
    } else {
        rq_advance(rq, (uint64_t)res);
    }
    rq_step(rq);
}

static int rq_work(struct ring_op *op)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    return rq->work(rq);
}

void rq_work_done(struct ring_op *op, int res)
{
    rq_end(container_of(op, struct rq, ring_op), res);
}

void rq_call_worker(struct rq *rq, int (*work)(struct rq *rq), void (*done)(struct ring_op *op, int res))
{
    rq->work = work;
    rq->ring_op.done = done;
    rq->ring_op.code = RING_CALL;
    rq->ring_op.call = rq_work;
    ring_queue(rq->queue->ring, &rq->ring_op);
}

static void rq_may_punch(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, map_call.op);

    (void)res;
    io_submit_other(rq->queue->dev->io, rq);
}

void rq_punch(struct rq *rq)
{
    struct map *map = rq->queue->dev->map;

    // One that was held back has said so before, unless there is another map since.
    if (!map->ops->call || !rq->len_bytes || (rq->is_punching && rq->map_call.map == map)) {
        rq->is_punching &= rq->map_call.map == map;
        io_submit_other(rq->queue->dev->io, rq);
        return;
    }
    rq->is_punching = true;
    rq_map_call(rq, MAP_PUNCH, rq_may_punch);
}

static void rq_start(struct rq *rq)
{
    struct queue *queue = rq->queue;
    int error;

    queue_count_in(queue);
    if (rq->ran) { // was held on its way
        rq_step(rq);
        return;
    }
    error = device_check(&queue->limits, rq); // here: a freeze may have changed the limits
    if (error) {
        rq_end(rq, error);
        return;
    }
    if (queue->dev->writeback) {
        error = rq_need_memory(rq); // what is cached is copied
        if (error) {
            rq_end(rq, error);
            return;
        }
        if (writeback_submit(rq))
            return;
    }
    switch (rq->op) {
    case REQ_OP_READ:
    case REQ_OP_WRITE:
        rq_run(rq, rq->len_bytes, NULL);
        break;
    case REQ_OP_FLUSH:
        flush_submit(rq);
        break;
    case REQ_OP_BLOCK_STATUS:
        rq_call_worker(rq, block_status_work, rq_work_done);
        break;
    case REQ_OP_PREFETCH:
        io_submit_other(queue->dev->io, rq);
        break;
    default:
        rq_punch(rq);
    }
}

void queue_submit(struct queue *queue, struct rq *rq)
{
    rq->queue = queue;
    rq->start_ns = queue->ring->now_ns;
    rq->done_bytes = 0;
    rq->iov_cut_bytes = 0;
    rq->ran = NULL;
    rq->part_phase = 0;
    rq->is_punching = false;
    rq->is_piped = false;
    stats_add(&queue->stats->nr_inflight, 1);
    if (queue->is_frozen)
        queue_hold(queue, rq);
    else
        rq_start(rq);
}

void rq_hold(struct rq *rq)
{
    rq_part_out(rq);
    queue_hold(rq->queue, rq);
    queue_count_out(rq->queue);
}

void queue_restart_held(struct queue *queue)
{
    struct rq *rq = queue->held, *next;

    queue->held = NULL;
    queue->held_tail = &queue->held;
    for (; rq; rq = next) {
        next = rq->next;
        rq_start(rq);
    }
}

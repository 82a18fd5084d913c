// An io says how bytes move between memory and the file that the map named.
#pragma once

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "core/rq.h"
#include "util/log.h"

struct device;
struct image;
struct io;

struct io_ops {
    const char *name;
    bool is_stored;  // what is written stays somewhere
    bool takes_spec; // --io NAME:SPEC
    bool takes_bufs; // rw() can do without memory behind rq->iov (rq_need_memory())
    // Optional. Cold. Whether the image is to be opened with O_DIRECT where that can be.
    bool (*wants_direct)(const char *spec);
    size_t io_bytes; // of the io's own struct, which begins with a struct io
    // Optional. Cold. The struct is zeroed and its struct io is set; the image is open. spec: what
    // follows "name:" in --io; without init none is taken. 0 or a negative errno with err set.
    int (*init)(struct io *io, const char *spec, struct err *err);
    // Optional. Cold; nothing is in flight.
    void (*exit)(struct io *io);
    // Required, hot, queue's thread: moves rq's part at hand, or less of it, between rq->iov
    // (part_nr_iov vectors) and rq->ext. Ends with rq_part_done(), now or later.
    void (*rw)(struct io *io, struct rq *rq);
    // Required, queue's thread: everything that is complete in rq->ext.fd becomes durable.
    // rq->ring_op.done is set and gets the result.
    void (*flush)(struct io *io, struct rq *rq);
    // Required, queue's thread: DISCARD, WRITE_ZEROES, PREFETCH. Ends with rq_end().
    void (*other)(struct io *io, struct rq *rq);
};

struct io {
    const struct io_ops *ops;
    struct device *dev;
    const struct image *image;
    struct io *lower; // fault: the io that does the work; NULL for all others
    // What the file below turned out not to be able to; latched once.
    atomic_bool cannot_punch, cannot_zero_range, cannot_discard;
};

extern const struct io_ops io_direct_ops, io_buffered_ops, io_null_ops, io_fault_ops;

// text: "direct", "buffered", "null" or "fault:SPEC". Where direct was asked for and the image could
// not be opened so, this is said and buffered taken.
int io_create(struct io **io, struct device *dev, const struct image *image, const char *text,
              struct err *err);
void io_destroy(struct io *io);
bool io_wants_direct(const char *text);

void io_rw(struct io *io, struct rq *rq);
void io_flush(struct io *io, struct rq *rq);
void io_submit_other(struct io *io, struct rq *rq);

// For ios: the part at hand as one operation of the ring; io_rw_done() passes on what came.
void io_queue_rw(struct rq *rq, void (*done)(struct ring_op *op, int res));
void io_rw_done(struct ring_op *op, int res);
// What io_rw_done() has done again.
static inline bool io_is_retried(int res)
{
    return res == -EINTR || res == -EAGAIN;
}
// The same without the queueing.
void io_prep_rw(struct rq *rq, void (*done)(struct ring_op *op, int res));
// fdatasync of rq->ext.fd through the ring.
void io_queue_fsync(struct io *io, struct rq *rq);

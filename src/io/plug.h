// Neighbours that come in one batch are one I/O: what blk-mq calls a plug.
//
//  P1. A plug belongs to a queue. It is empty at the end of each batch: the transport flushes it when it
//      has no more requests at hand, the hook does if it forgets.
//  P2. The first of a chain does the I/O for all: its ring_op has their vectors, which stand in an array
//      of the plug's until it is done. The others wait in rq->merged.
//  P3. What the I/O did not reach, because of an error or of its own shortness, is issued again, each
//      request by itself: an error is told to the request that it belongs to.
#pragma once

#include "core/rq.h"

#define PLUG_MAX_RQS 64
#define PLUG_MAX_BYTES (128 * 1024) // of a chain: more is no faster, and keeps others waiting
#define PLUG_NR_IOVS 16             // chains in flight

struct plug_iovs {
    struct plug_iovs *next;
    struct iovec iov[PLUG_MAX_RQS];
};

struct plug {
    struct rq *first, *last;
    unsigned nr_iov;
    uint64_t len_bytes;
    void (*issue)(struct rq *rq);
    struct ring_hook hook;
    struct plug_iovs *free;
    struct plug_iovs iovs[PLUG_NR_IOVS];
};

void plug_init(struct plug *plug);

// Has issue(rq) called for rq's part at hand, or for the chain that it becomes a part of, by the end of the
// batch. issue() does what rq->ring_op says, and has its done() called. One plug, one issue(). Queue's
// thread.
void plug_rw(struct rq *rq, void (*issue)(struct rq *rq));

// Issues what is held back. Queue's thread.
void plug_issue(struct plug *plug);

static inline void plug_flush(struct plug *plug)
{
    if (plug->first)
        plug_issue(plug);
}

// What rq->ring_op moves.
static inline uint64_t plug_bytes(const struct rq *rq)
{
    return rq->merged ? rq->merged_bytes : rq_part_bytes(rq);
}

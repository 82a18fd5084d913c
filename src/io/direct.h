// Between direct.c (hot) and range_lock.c (cold).
#pragma once

#include <pthread.h>

#include "core/device.h"
#include "io/io.h"

struct direct {
    struct io io;
    bool is_locking;             // D2; changed only while all queues are frozen
    atomic_bool is_freeze_asked; // the freeze for that is on its way
    struct freeze freeze;
    pthread_mutex_t lock;
    struct rq *held, *waiting; // ranges, guarded by lock; waiting: first come first
};

bool direct_wants_direct(const char *spec);
int direct_init(struct io *io, const char *spec, struct err *err);
void direct_exit(struct io *io);

// Takes [start, end) of the file for rq; locked() is called on the queue's thread, now or later.
// Ranges that overlap exclude each other when one of them is exclusive. Queue's thread.
void direct_lock(struct rq *rq, uint64_t start, uint64_t end, bool is_exclusive,
                 void (*locked)(struct ring_op *op, int res));
void direct_unlock(struct rq *rq);

// D2: from now on, without asking for a freeze: the io is not in use, or the device is frozen. Under
// fault:SPEC, the one below; of another kind, nothing.
void direct_lock_always(struct io *io);

// D2: rq is taken back, and begins again when every write takes its range.
void direct_start_locking(struct rq *rq);

// The worker threads of the process: they run what may block. One pool, first in first out, threads
// started when they are first needed.
#pragma once

#include <stddef.h>

struct ring_op;

// How many threads there may be. Before the first workers_submit().
void workers_set_max(unsigned nr_threads);
unsigned workers_max(void);

// A RING_CALL, READ, WRITE or FSYNC is done by a worker, its result posted to op->ring. Any thread.
void workers_submit(struct ring_op *op);

// Runs what is queued to its end and joins the threads; the next submit starts new ones.
void workers_stop(void);

// In a worker: a buffer of WORKERS_SCRATCH_BYTES, aligned to pages, this thread's until it returns
// from call(). NULL when there is no memory.
#define WORKERS_SCRATCH_BYTES (1024 * 1024)
void *workers_scratch(void);

// A device on a file in a scratch directory, and requests to it from the test's thread.
#pragma once

#include <semaphore.h>
#include <stdatomic.h>

#include "core/device.h"
#include "core/queue.h"
#include "rings.h"

struct fixture_options {
    const struct ring_ops *ring; // required
    const char *io;              // NULL: "null"
    uint64_t size_bytes;         // of the file; 0: 1 MiB
    unsigned nr_queues;          // 0: 1
    unsigned nr_workers;         // 0: 16
    uint32_t block_bytes;
    uint64_t writeback_bytes;
    struct image_options image;
};

struct fixture {
    char dir[64], path[80];
    struct device *dev;
    bool is_stopped;
    int stop_error; // what device_stop() returned
};

// Fails the test when the device cannot be created.
struct fixture fixture_create(const struct fixture_options *options);

// device_stop() and workers_stop(), for what is to be looked at or put back behind them.
void fixture_stop(struct fixture *fixture);

// The rest, and that before it if need be. What device_stop() returned.
int fixture_destroy(struct fixture *fixture);

// A directory for scratch files, on a file system that can do direct I/O where there is one.
void fixture_make_dir(char dir[64]);

// Makes a file of that size, sparse.
void fixture_make_file(const char *path, uint64_t size_bytes);

// A request of the test's: done() counts and wakes fixture_wait().
struct fixture_rq {
    struct rq rq;
    struct queue *queue;
    struct ring_op post;
    struct iovec iov[8];
    sem_t sem;
    atomic_int nr_done;
    // Optional, on the queue's thread. true: it has been submitted again, and is not done yet.
    bool (*again)(struct fixture_rq *frq);
};

// Fills in a request of one vector (buf may be NULL for what has no data).
void fixture_rq_init(struct fixture_rq *frq, enum req_op op, unsigned flags, uint64_t offset, void *buf,
                     uint64_t len);

// Hands it to the queue's thread. Any thread.
void fixture_submit(struct queue *queue, struct fixture_rq *frq);

// Its error once it is done. Fails the test when it is not done in time, or done twice.
int fixture_wait(struct fixture_rq *frq);

// All of that. On queue 0.
int fixture_do(struct device *dev, enum req_op op, unsigned flags, uint64_t offset, void *buf, uint64_t len);

// Runs call(arg) on the queue's thread, and waits for it.
void fixture_on_queue(struct queue *queue, void (*call)(void *arg), void *arg);

// The process that does the I/O: devices, transports, the main ring, signals. bight serve is one; bight
// attach has a supervisor above it.
#pragma once

#include <stdbool.h>

#include "core/device.h"
#include "transport/transport.h"

struct device_change;
struct worker;

struct worker_options {
    struct device_options device; // of all; name is put in
    const char *const *names, *const *images;
    unsigned nr_images;
    const char *ring_name;
    unsigned nr_workers, max_connections;
    uint64_t poll_ns;                    // of struct transport_options
    const struct transport_holds *holds; // T1 of transport/transport.h: somebody else's
    // All on the main thread. Optional. What is asked for is served from now on; what it begins on the
    // ring is over when worker->nr_pending is 0. 0, or a negative errno with err set: it ends.
    int (*ready)(struct worker *worker, struct err *err);
    // Optional. Before anything stops: true when worker_go_on_stopping() will be called.
    bool (*before_stop)(struct worker *worker);
    // Optional. It has begun to stop.
    void (*stopping)(struct worker *worker);
    // Optional. All is over and written out, or error says what was not. No ring any more.
    void (*stopped)(struct worker *worker, int error, const struct err *err);
    // Optional. For device_change.committed, whose arg is the worker.
    void (*committed)(struct device_change *change);
    void *arg; // for these
};

struct worker {
    const struct worker_options *options;
    struct device **devs;
    unsigned nr_devs;
    struct ring *ring;
    struct transport_set transports;
    unsigned nr_pending; // what else has to come to its end before the loop ends
    bool is_stopping;
    int signal_fd;
    struct ring_op signal_op;
};

// Blocks those that worker_run() waits for. Before other threads and what is to be undone.
void worker_block_signals(void);

// Serves until a signal or worker_stop() ends it. 0, or a negative errno with err set (or empty: it has
// been said).
int worker_run(const struct worker_options *options, struct err *err);

// Main thread.
void worker_stop(struct worker *worker);
void worker_go_on_stopping(struct worker *worker);

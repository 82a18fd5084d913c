// Inside of the io_uring ring: uring.c is hot, uring_setup.c is cold.
#pragma once

#include <liburing.h>

#include "ring/ring.h"
#include "util/util.h"

#define URING_SQ_ENTRIES 512
#define URING_CQ_ENTRIES 4096
#define URING_MAX_FDS 1024 // higher file descriptors are used unregistered,
#define URING_MAX_PINS 4   // or in slots of their own, if they must
#define URING_MAX_BUFS 4
#define URING_MAX_BUF_BYTES (2 * MiB) // registered memory is pinned, touched or not
#define URING_MEMLOCK_SHARE 16        // of RLIMIT_MEMLOCK for one ring: the user has more of them

#define URING_RETRY_NS 1000000 // a cancellation

// Waiting for a batch (uring.c): never longer than that,
#define URING_BATCH_NS 50000
// for I/O: a quarter of what is in flight, so that the disk keeps enough to do meanwhile;
#define URING_BATCH_SHARE 4
#define URING_BATCH_MAX 16
// for requests: about what a client needs to send as many new ones as it got answers.
#define URING_REQUEST_NS 3000
// for the requests of a deep stream: so many at least, so long, and after failing so many answers without.
#define URING_GATHER_MIN 4
#define URING_GATHER_START_NS 20000
#define URING_GATHER_MIN_NS 4000
#define URING_GATHER_MAX_NS 200000
#define URING_GATHER_SKIP_MAX 1024

struct uring {
    struct ring ring;
    struct io_uring io;
    struct ring_op wake_op;   // waits for wake_fd
    struct ring_op cancel_op; // what a cancellation itself ends as
    struct ring_op *cancels;  // asked to end, and not done yet; by next
    struct ring_op retry_op;  // asks again
    bool is_retry_set;
    uint64_t event_count;    // where what eventfds counted goes
    unsigned nr_io;          // READ, WRITE and FSYNC in flight: completions that will come soon
    uint64_t gather_ns;      // how long requests are let gather (uring.c); 0: not
    unsigned nr_gather_skip; // waits until that is tried again
    unsigned nr_gather_skip_max;
    bool has_gathered; // in the last wait
    bool is_late;      // the last wait for a batch brought nothing
    bool has_buffers, has_reserved_bufs, has_taskrun_flag;
    unsigned nr_files;                // slots: of low file descriptors, and then of those in pins
    uint32_t cmd_bytes;               // room for a command's data in a submission
    bool is_fd_fixed[URING_MAX_FDS];  // fd is registered, in the slot of the same number
    int pins[URING_MAX_PINS];         // -1: free
    size_t buf_bytes[URING_MAX_BUFS]; // 0: the slot is free
    size_t buf_bytes_left;            // that may still be registered
    char mode[128];
};

void uring_queue(struct ring *ring, struct ring_op *op);
int uring_wait(struct ring *ring, uint64_t timeout_ns);
int uring_poll(struct ring *ring);
void uring_cancel(struct ring *ring, struct ring_op *op);
void uring_queue_cancel(struct uring *uring, struct ring_op *op);
void uring_arm_wake(struct uring *uring);

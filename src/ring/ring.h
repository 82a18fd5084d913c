// A ring moves bytes and waits for things: it is to its thread what an event loop is, and it is
// where all system calls of the data path are made. Two kinds do the same operations: io_uring
// (uring.c), and epoll with worker threads where io_uring is forbidden (threads.c).
//
// Invariants:
//  R1. A ring belongs to the thread that created it. Only ring_post() may be called by others.
//  R2. Every operation that was queued or posted completes exactly once, by a call of its done() on
//      the ring's thread, never from inside ring_queue().
//  R3. The ring does not look at an operation any more once done() has been called: done() may
//      free or reuse it.
//  R4. What was posted to one ring by one thread is done in the order of posting.
//  R5. A ring is destroyed after every thread that may post to it has ended or gone past its post.
//  R6. A file that is pinned stays open until nothing is in flight that the ring has submitted, also when its
//      process was killed. Who holds on to something by an open file (a lock, a lease, a pipe's end) holds on
//      until then. Threads that move bytes end before their process does; an io_uring is taken apart by the
//      kernel some time later, and lets go of its registered files when its last request is over.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "util/log.h"

enum ring_code {
    RING_READ,    // preadv2: fd, rw, rw_flags (RWF_*); res: bytes
    RING_WRITE,   // pwritev2: the same
    RING_FSYNC,   // fdatasync: fd
    RING_RECV,    // recv: fd, recv; res: bytes, 0 at end of stream
    RING_SENDMSG, // sendmsg: fd, msg; res: bytes, which may be fewer than asked
    RING_POLL,    // one shot: fd, events (POLLIN, or POLLOUT alone); res: the events that came
    RING_TIMEOUT, // timeout_ns from now
    RING_CMD,     // a driver's own command (IORING_OP_URING_CMD): fd, cmd; res: the driver's, or -EOPNOTSUPP
    RING_CALL,    // call() on a worker thread; res: what it returned
    RING_EVENT_WAIT,   // fd is an eventfd: waits until it is signalled, and resets it
    RING_EVENT_SIGNAL, // the other side of that. Neither can be made to block by who shares the eventfd
};

#define RING_CMD_BYTES 80 // of data that a command may have

struct ring;
struct ring_op {
    void (*done)(struct ring_op *op, int res); // res: >= 0, or a negative errno
    enum ring_code code;
    int fd;
    union {
        int rw_flags;
        unsigned events;
    };
    int buf_index; // READ, WRITE: registered buffer that holds iov[0] (from ring_add_buf), or -1; of one from
                   // ring_reserve_bufs(), iov[0] has the offset
    union {
        struct {
            const struct iovec *iov; // stays valid and unchanged until done()
            unsigned nr_iov;
            uint64_t offset_bytes;
        } rw;
        struct {
            void *buf;
            uint32_t len_bytes;
        } recv;
        struct msghdr *msg;
        struct {
            uint32_t op;
            uint32_t data_bytes;
            const void *data; // is copied by ring_queue()
            const void *addr; // the submission's addr and len: what they are is for the driver to say
            uint32_t len;
        } cmd;
        uint64_t timeout_ns; // made an absolute time by ring_queue()
        int (*call)(struct ring_op *op);
    };
    // The ring's own.
    struct ring_op *next;
    struct ring *ring;
    int res;
};

// Work put off to the end of a batch: after all completions at hand have been dispatched, before
// the ring submits and sleeps again. It is what makes many replies leave in one sendmsg.
struct ring_hook {
    void (*run)(struct ring_hook *hook);
    struct ring_hook *next;
    bool is_queued;
};

// What is looked at instead of waiting to be told: the ring polls as long as that finds something often
// enough, and sleeps else (ring.c).
struct ring_poller {
    // Takes what is there. true: that was something.
    bool (*poll)(struct ring_poller *poller);
    // The ring is about to sleep: from now on it has to be woken. false: there is something already.
    bool (*arm)(struct ring_poller *poller);
    struct ring_poller *next;
};

struct ring_ops {
    const char *name;
    // Required. In the owner's thread. Reports -ENOSYS, -EPERM... where the kernel forbids it.
    int (*create)(struct ring **ring, struct err *err);
    // Required, any thread. Nothing is in flight any more (R5).
    void (*destroy)(struct ring *ring);
    // Required, hot. Takes all but TIMEOUT and CALL.
    void (*queue)(struct ring *ring, struct ring_op *op);
    // Required, hot. Submits, waits for one completion at least or for timeout_ns (UINT64_MAX:
    // for ever; 0: not at all), and calls done() for all that have come. 0 or a negative errno that
    // the ring cannot go on after.
    int (*wait)(struct ring *ring, uint64_t timeout_ns);
    // Optional, hot: wait() with a timeout of 0, cheap when there is nothing to submit or to take.
    int (*poll)(struct ring *ring);
    // Required. R2 for an op that might wait for ever: EVENT_WAIT, EVENT_SIGNAL or POLL, queued and not
    // done. It is done soon, with -ECANCELED unless it can be done at once.
    void (*cancel)(struct ring *ring, struct ring_op *op);
    // Optional. fd will be used often; an fd that was added must be removed before it is closed.
    // must_be_held: R6. A ring without it has nothing in flight when its process has ended.
    void (*add_fd)(struct ring *ring, int fd, bool must_be_held);
    // Required. fd is about to be closed: nothing is in flight on it.
    void (*remove_fd)(struct ring *ring, int fd);
    // Optional. An index for buf_index, or -1 where there is none to be had.
    int (*add_buf)(struct ring *ring, void *buf, size_t len_bytes);
    void (*remove_buf)(struct ring *ring, int buf_index);
    // Optional. The first of nr indexes in a row, in which somebody else (a driver) registers buffers; -1.
    int (*reserve_bufs)(struct ring *ring, unsigned nr);
};

struct ring {
    const struct ring_ops *ops;
    unsigned nr_answered;   // requests, in this turn, by the transport: as many new ones may follow at once
    unsigned nr_due;        // streams of requests that got their last answers in this turn
    unsigned nr_received;   // requests that have come by them since the last wait
    bool is_gathered;       // in this turn: they were let gather, for all of the time
    bool is_peer_idle;      // and one who sent them has read all its answers: it waited as well
    uint64_t now_ns;        // time of the last wake-up: good enough for latencies, free to read
    int wake_fd;            // eventfd: the inbox has something
    struct ring_op *timers; // sorted by time
    struct ring_hook *hooks;
    struct ring_hook **hooks_tail;
    struct ring_poller *pollers;
    uint64_t poll_max_ns;            // how long to look for more before sleeping; 0: not at all
    uint64_t poll_ns;                // that, or 0 while it does not pay
    uint64_t busy_ns;                // when a poller found something last, or ring_found() was called
    const char *mode;                // for people: which flags the kernel took
    char pad[64];                    // what other threads write does not share a line with the above
    _Atomic(struct ring_op *) inbox; // last posted first
    atomic_bool is_woken;
};

extern const struct ring_ops ring_uring_ops;
extern const struct ring_ops ring_threads_ops;

// The kind called "uring" or "threads"; "auto" is uring where the kernel lets us. NULL and err set
// for an unknown name, or when uring was asked for and cannot be had.
const struct ring_ops *ring_choose(const char *name, struct err *err);

// -1, or what every ring that is created from now on pins (R6).
extern int ring_guard_fd;

// 0 or a negative errno with err set. In the thread that will own the ring.
int ring_create(const struct ring_ops *ops, struct ring **ring, struct err *err);

// R5. Any thread.
void ring_destroy(struct ring *ring);

// Queues an operation; it is submitted by the next ring_run(). Owner's thread.
void ring_queue(struct ring *ring, struct ring_op *op);

// One turn: submit, wait, dispatch, run the hooks. 0, or a negative errno when the ring is broken.
int ring_run(struct ring *ring);

// Has op->done(op, res) called on the ring's thread. Any thread.
void ring_post(struct ring *ring, struct ring_op *op, int res);

// Has hook->run() called at the end of this batch; again before that is no error. Owner's thread.
void ring_defer(struct ring *ring, struct ring_hook *hook);

// Takes a queued RING_TIMEOUT back; it is not done() then. false: it was not queued (any more).
bool ring_cancel_timeout(struct ring *ring, struct ring_op *op);

// Has an op end that might wait for ever (see ring_ops.cancel).
void ring_cancel(struct ring *ring, struct ring_op *op);

// Owner's thread. poll_max_ns is the ring's, for all of its pollers.
void ring_add_poller(struct ring *ring, struct ring_poller *poller, uint64_t poll_max_ns);
void ring_remove_poller(struct ring *ring, struct ring_poller *poller);

// Something was done from which more will follow soon.
static inline void ring_found(struct ring *ring)
{
    ring->busy_ns = ring->now_ns;
}

void ring_add_fd(struct ring *ring, int fd);
void ring_pin_fd(struct ring *ring, int fd); // the same, and R6
void ring_remove_fd(struct ring *ring, int fd);
int ring_add_buf(struct ring *ring, void *buf, size_t len_bytes);
void ring_remove_buf(struct ring *ring, int buf_index);
int ring_reserve_bufs(struct ring *ring, unsigned nr);

// For the two kinds: what came by ring_post(), after wake_fd was read.
void ring_drain_inbox(struct ring *ring);
int ring_init(struct ring *ring, const struct ring_ops *ops);
void ring_exit(struct ring *ring);

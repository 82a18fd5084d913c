// A request: what a transport asks of a device. It lives in a tag set (tags.h), goes down through
// queue -> map -> io -> ring, and comes back by way of rq_end() exactly once.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "map/map.h"
#include "ring/ring.h"
#include "writeback/sync.h"

enum req_op {
    REQ_OP_READ,
    REQ_OP_WRITE,
    REQ_OP_FLUSH,
    REQ_OP_DISCARD, // a hint: contents are undefined afterwards
    REQ_OP_WRITE_ZEROES,
    REQ_OP_BLOCK_STATUS, // iov[0] is an array of struct extent to fill
    REQ_OP_PREFETCH,     // a hint: reads of the range will follow
    REQ_OP_NR,
};

enum rq_flags {
    RQ_FUA = 1 << 0,        // WRITE, WRITE_ZEROES, DISCARD: durable when complete
    RQ_NOUNMAP = 1 << 1,    // WRITE_ZEROES: the range stays allocated
    RQ_FAST_ZERO = 1 << 2,  // WRITE_ZEROES: -EOPNOTSUPP rather than writing zeroes out
    RQ_ONE_EXTENT = 1 << 3, // BLOCK_STATUS: one extent is enough
};

struct io;
struct queue;

// Takes a READ's data in place of memory: the pages of the page cache themselves, not copies of them.
struct rq_pipe {
    int fds[2]; // to read from, to write to; both O_NONBLOCK
};

struct rq {
    // The transport's, set before queue_submit().
    uint8_t op; // enum req_op
    uint8_t flags;
    uint16_t tag;
    uint16_t nr_iov;
    int16_t buf_index; // registered buffer that holds all of iov, or -1
    // NULL, or iov has only offsets into the registered buffer, which the kernel can move and we cannot see
    // (rq_need_memory()): puts memory behind iov, with a WRITE's data in it. 0 or a negative errno.
    int (*give_memory)(struct rq *rq);
    struct iovec *iov;     // READ, WRITE: len_bytes in all; is used up on the way
    uint64_t offset_bytes; // in the device
    uint64_t len_bytes;
    // Optional, READ: an empty pipe that has room for len_bytes and stays the transport's, or NULL. An io
    // that has put all data into it says so (is_piped).
    struct rq_pipe *(*get_pipe)(struct rq *rq);
    void (*done)(struct rq *rq); // on the queue's thread

    // The answer, for done().
    int error;           // 0 or a negative errno
    unsigned nr_extents; // BLOCK_STATUS: how many were filled

    // The core's.
    struct queue *queue;
    struct rq *next; // held back, or in a list of the io's
    uint64_t start_ns;
    uint64_t done_bytes; // of len_bytes; READ, WRITE: also gone from iov
    // Optional: the lower layers do no more than run_bytes of len_bytes, or one FLUSH, and end with this, not
    // rq_end().
    void (*ran)(struct rq *rq, int error);
    uint64_t run_bytes;

    // Where the part at hand is (offset_bytes + done_bytes, ext.len_bytes long), for the io.
    struct extent ext;
    uint8_t part_phase; // the part at hand is with the io: queue->phase then, and 1 more; 0: it is not
    bool is_punching;   // map_call has to be ended
    bool is_piped;      // for done(), READ: the data is in the pipe, and iov was not touched
    struct map_call map_call;
    size_t iov_cut_bytes; // taken off the part's last vector, which belongs to the next part
    uint16_t part_nr_iov;

    struct ring_op ring_op;                          // the io's operation in flight
    struct io *io;                                   // buffered: that works on it
    struct rq *merged;                               // io/plug.h: served by the same operation
    uint64_t merged_bytes;                           // the first of them: of all
    int (*work)(struct rq *rq);                      // what a worker thread does for it
    void (*flush_done)(struct ring_op *op, int res); // fault: ring_op.done while it waits
    // The io's, while it has the request.
    struct {
        uint64_t start, end; // range locked
        struct rq *next;
        uint8_t is_held, is_exclusive;
    } lock;
    // Write-back's, while it has the request (writeback/).
    struct {
        struct rq *next;             // waiting, or in a list of ranges
        struct wb_sync sync;         // the range that has to be below; zeroed, for what makes zeroes
        uint64_t placed_end;         // space was allocated up to there
        int64_t nr_promised;         // pages, to zeroes that take space
        void (*done)(struct rq *rq); // the transport's, while it is ours
        int error;
        uint8_t op; // what it is, while it is below as its own FLUSH
        uint8_t is_admitted, is_waiting, is_running, has_run;
    } wb;
};

static inline int rq_is_write(const struct rq *rq)
{
    return rq->op == REQ_OP_WRITE || rq->op == REQ_OP_DISCARD || rq->op == REQ_OP_WRITE_ZEROES;
}

// Length of the part at hand.
static inline uint64_t rq_part_bytes(const struct rq *rq)
{
    return rq->ext.len_bytes;
}

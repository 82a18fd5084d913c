// An NBD connection in the transmission phase. conn.c is hot and runs on the queue's thread;
// server.c makes and frees connections on the main thread.
//
//  N1. A connection's life: nbd_conn_create() on the main thread; adopt_op posted to the queue's ring;
//      requests; when it is over (is_rx_over, no tag in use, nothing in flight) the file descriptor is
//      closed. Once no message to it is under way either (nr_refs), closed_op is posted to the main
//      ring, where nbd_conn_free() ends it.
//  N2. At most one RECV and one SENDMSG are in flight. Replies that were put into the message in flight
//      keep their tag and buffer until it has been sent.
//  N3. Tags and buffers belong to the connection: a client that stalls has only itself to wait for.
//  N4. While a RECV into rx_buf is armed, rx_buf holds less than a request header.
//  N5. The data of a READ may be in a pipe (rq.h), which goes into the socket on this thread, without
//      blocking: not before the socket has room for all of it. Only a unix socket tells that.
#pragma once

#include "core/tags.h"
#include "transport/nbd/handshake.h"
#include "transport/nbd/proto.h"
#include "util/arena.h"

#define NBD_RX_BYTES (256 * 1024)
// Memory for the data of all requests in flight: the largest one, and more for small ones.
#define NBD_ARENA_BYTES (48 * 1024 * 1024)
#define NBD_FIXED_BYTES (512 * 1024) // of that, registered with the ring
#define NBD_STATUS_BYTES (64 * 1024) // BLOCK_STATUS: struct extents, then the reply made of them
#define NBD_TX_MAX_CHUNKS 256        // reply headers in one sendmsg
#define NBD_MAX_PIPES 16             // of one connection
#define NBD_MAX_ALL_PIPES 64         // of all: file descriptors are for other things too
#define NBD_PIPE_MIN_BYTES (16 * 1024)
#define NBD_PIPE_MAX_BYTES (256 * 1024)
#define NBD_ROOM_BYTES (16 * 1024) // and a sixteenth of the data: what the kernel counts beside it
#define NBD_HOLE_BYTES (32 * 1024) // granularity in which READ looks for zeroes

struct nbd_conn;
struct nbd_client;

struct nbd_rq {
    struct rq rq;
    struct nbd_conn *conn;
    struct nbd_rq *next; // in a list of replies
    uint64_t cookie;
    uint64_t offset_bytes, len_bytes; // as asked
    char *buf;
    size_t buf_pages;
    struct rq_pipe pipe;
    bool has_pipe;
    bool want_one_chunk; // READ with DF
    uint64_t sent_bytes; // READ: of the data, in chunks that have been put into messages
    struct iovec iov;
};

// Room for a chunk's header and what stands before its data.
struct nbd_chunk_head {
    uint8_t bytes[48];
};

struct nbd_conn {
    int fd;
    enum nbd_mode mode;
    bool has_meta_context;
    bool is_rx_over; // no more requests will be read
    bool is_recv_armed;
    bool is_send_armed;
    bool is_broken;  // replies have nowhere to go any more
    bool is_stalled; // out of tags or memory: reading goes on after replies have left
    struct device *dev;
    struct queue *queue;
    struct tags tags;
    struct arena arena;
    uint64_t buf_bytes;                    // of it, in use
    uint64_t sndbuf_bytes, pipe_max_bytes; // of a unix socket, else 0
    struct rq_pipe pipes[NBD_MAX_PIPES];
    unsigned nr_pipes, nr_free_pipes; // made; of these, in pipes[], empty
    int buf_index;                    // of the arena's first NBD_FIXED_BYTES, or -1

    uint8_t *rx_buf;
    size_t rx_begin, rx_end;   // not parsed yet
    uint64_t skip_bytes;       // payload of a request that was refused
    struct nbd_rq *payload_rq; // WRITE whose payload is still coming
    size_t payload_bytes;      // of it, have come
    struct ring_op recv_op;

    struct nbd_rq *replies, **replies_tail; // to be sent
    struct nbd_rq *sending;                 // wholly in the message in flight
    struct msghdr msg;
    struct iovec tx_iov[2 * NBD_TX_MAX_CHUNKS];
    struct nbd_chunk_head tx_heads[NBD_TX_MAX_CHUNKS];
    unsigned nr_tx_heads;
    struct ring_op send_op;
    struct ring_op room_op; // instead of send_op: waits for room (N5)
    struct ring_hook reply_hook;

    // Messages. stop: no more requests; in flight ones are answered. abort: not even that. Each is
    // sent at most once, and counts in nr_refs, as the open connection does.
    atomic_int nr_refs;
    struct ring_op adopt_op, stop_op, abort_op;
    struct ring *main_ring;
    struct ring_op closed_op;  // done() is server.c's
    struct nbd_client *client; // server.c's
};

// fd is the connection's from now on. in: what was received behind the handshake. NULL: no memory,
// fd is still the caller's. Main thread.
struct nbd_conn *nbd_conn_create(int fd, const struct nbd_handshake *handshake, const void *in,
                                 size_t in_len);
void nbd_conn_free(struct nbd_conn *conn);

// Into conn->pipes. false: there is none to be had. Queue's thread; seldom.
bool nbd_conn_make_pipe(struct nbd_conn *conn);
void nbd_conn_close_pipe(struct nbd_conn *conn, struct rq_pipe *pipe);

// done() of adopt_op, stop_op and abort_op: on the queue's thread.
void nbd_conn_adopted(struct ring_op *op, int res);
void nbd_conn_stop(struct ring_op *op, int res);
void nbd_conn_abort(struct ring_op *op, int res);
// Sends one of the latter two. Main thread.
void nbd_conn_send(struct nbd_conn *conn, struct ring_op *op);

// A request header, checked for what can be checked without the device.
struct nbd_request {
    uint16_t flags, type;
    uint64_t cookie, offset_bytes, len_bytes;
    uint64_t payload_bytes; // that follow the header
    int error;              // what it has to be answered, 0 or a negative errno
};

static inline size_t nbd_request_bytes(enum nbd_mode mode)
{
    return mode == NBD_MODE_EXTENDED ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
}

// head: nbd_request_bytes(mode) bytes. 0, or -EBADMSG for a wrong magic: the stream makes no sense any
// more. Pure.
int nbd_request_parse(const uint8_t *head, enum nbd_mode mode, bool has_meta_context,
                      struct nbd_request *request);

// "Error values": error is 0 or a negative errno. Pure.
uint32_t nbd_error(int error);

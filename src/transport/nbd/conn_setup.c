// How a connection is made and freed, on the main thread. Cold.

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/nbd/conn.h"
#include "util/unix_socket.h"
#include "util/util.h"

static atomic_int nr_all_pipes;

// The largest request for which there is room whenever poll() says so, which is when a quarter is used (N5).
static uint64_t pipe_max_bytes(uint64_t sndbuf_bytes)
{
    uint64_t half = sndbuf_bytes / 2;

    return half < NBD_ROOM_BYTES ? 0 : min_of(NBD_PIPE_MAX_BYTES, half - NBD_ROOM_BYTES);
}

bool nbd_conn_make_pipe(struct nbd_conn *conn)
{
    struct rq_pipe *pipe = &conn->pipes[conn->nr_free_pipes];

    if (conn->nr_pipes == NBD_MAX_PIPES)
        return false;
    if (atomic_fetch_add(&nr_all_pipes, 1) >= NBD_MAX_ALL_PIPES ||
        pipe2(pipe->fds, O_CLOEXEC | O_NONBLOCK) < 0) {
        atomic_fetch_sub(&nr_all_pipes, 1);
        return false;
    }
    conn->nr_pipes++;
    // A slot takes one page, so one more than that for a request that begins within one.
    if (fcntl(pipe->fds[1], F_SETPIPE_SZ, 2 * NBD_PIPE_MAX_BYTES) < 0) {
        nbd_conn_close_pipe(conn, pipe);
        return false;
    }
    conn->nr_free_pipes++;
    return true;
}

void nbd_conn_close_pipe(struct nbd_conn *conn, struct rq_pipe *pipe)
{
    close(pipe->fds[0]);
    close(pipe->fds[1]);
    conn->nr_pipes--;
    atomic_fetch_sub(&nr_all_pipes, 1);
}

struct nbd_conn *nbd_conn_create(int fd, const struct nbd_handshake *handshake, const void *in, size_t in_len)
{
    struct nbd_conn *conn = calloc(1, sizeof(*conn));

    if (!conn)
        return NULL;
    conn->fd = fd;
    conn->mode = handshake->mode;
    conn->dev = handshake->dev;
    conn->has_meta_context = handshake->meta_dev == handshake->dev;
    conn->queue = device_pick_queue(conn->dev);
    conn->replies_tail = &conn->replies;
    conn->recv_op = (struct ring_op){.code = RING_RECV, .fd = fd};
    conn->send_op = (struct ring_op){.code = RING_SENDMSG, .fd = fd, .msg = &conn->msg};
    conn->room_op = (struct ring_op){.code = RING_POLL, .fd = fd, .events = POLLOUT};
    conn->sndbuf_bytes = unix_socket_sndbuf(fd);
    conn->pipe_max_bytes = pipe_max_bytes(conn->sndbuf_bytes);
    conn->adopt_op.done = nbd_conn_adopted;
    conn->stop_op.done = nbd_conn_stop;
    conn->abort_op.done = nbd_conn_abort;
    atomic_init(&conn->nr_refs, 1);
    conn->rx_buf = malloc(NBD_RX_BYTES);
    if (!conn->rx_buf)
        goto out_free;
    memcpy(conn->rx_buf, in, in_len);
    conn->rx_end = in_len;
    if (tags_create(&conn->tags, conn->dev->depth, sizeof(struct nbd_rq)) < 0)
        goto out_rx_buf;
    if (arena_create(&conn->arena, NBD_ARENA_BYTES) < 0)
        goto out_tags;
    return conn;

out_tags:
    tags_destroy(&conn->tags);
out_rx_buf:
    free(conn->rx_buf);
out_free:
    free(conn);
    return NULL;
}

void nbd_conn_free(struct nbd_conn *conn)
{
    while (conn->nr_free_pipes)
        nbd_conn_close_pipe(conn, &conn->pipes[--conn->nr_free_pipes]);
    arena_destroy(&conn->arena);
    tags_destroy(&conn->tags);
    free(conn->rx_buf);
    free(conn);
}

void nbd_conn_send(struct nbd_conn *conn, struct ring_op *op)
{
    int nr_refs = atomic_load(&conn->nr_refs);

    // None left: closed_op is on its way, and there is nobody to send to.
    while (nr_refs) {
        if (atomic_compare_exchange_weak(&conn->nr_refs, &nr_refs, nr_refs + 1)) {
            ring_post(conn->queue->ring, op, 0);
            return;
        }
    }
}

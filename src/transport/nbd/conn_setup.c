// How a connection is made and freed, on the main thread. Cold.

#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/nbd/conn.h"

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

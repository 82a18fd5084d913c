// The transmission phase: bytes in, requests, replies out. A request's way:
//
//   conn_received -> conn_parse -> conn_start -> queue_submit ... rq done: conn_rq_done
//   end of the batch: conn_send_replies -> conn_put_reply -> sendmsg -> conn_sent
//
// See conn.h for the invariants.

#include "transport/nbd/conn.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "util/be.h"
#include "util/util.h"

// Payloads that lack more than this are received where they belong, the rest by way of rx_buf.
#define DIRECT_RX_BYTES (16 * 1024)

static void conn_parse(struct nbd_conn *conn);

static void nbd_rq_put(struct nbd_conn *conn, struct nbd_rq *nrq)
{
    if (nrq->buf) {
        arena_put(&conn->arena, nrq->buf, nrq->buf_pages);
        queue_count_bufs(conn->queue, &conn->buf_bytes, -(int64_t)(nrq->buf_pages * ARENA_PAGE_BYTES));
    }
    if (nrq->has_pipe && nrq->rq.is_piped) // not sent
        nbd_conn_close_pipe(conn, &nrq->pipe);
    else if (nrq->has_pipe)
        conn->pipes[conn->nr_free_pipes++] = nrq->pipe;
    tags_put(&conn->tags, &nrq->rq);
}

// N1
static void conn_unref(struct nbd_conn *conn)
{
    if (atomic_fetch_sub(&conn->nr_refs, 1) == 1)
        ring_post(conn->main_ring, &conn->closed_op, 0);
}

// TCP answers a close with unread bytes by a reset, and the peer may lose the last replies to that.
static void conn_drain(struct nbd_conn *conn)
{
    if (conn->is_broken)
        return;
    shutdown(conn->fd, SHUT_WR);
    for (unsigned i = 0; i < 16 && recv(conn->fd, conn->rx_buf, NBD_RX_BYTES, MSG_DONTWAIT) > 0; i++)
        ;
}

// Nothing of conn may be touched after this.
static void conn_close_if_over(struct nbd_conn *conn)
{
    if (!conn->is_rx_over || conn->is_recv_armed || conn->is_send_armed || conn->reply_hook.is_queued ||
        tags_nr_used(&conn->tags))
        return;
    ring_remove_buf(conn->queue->ring, conn->buf_index);
    ring_remove_fd(conn->queue->ring, conn->fd);
    conn_drain(conn);
    close(conn->fd);
    conn->fd = -1;
    conn_unref(conn);
}

// ---- Replies

static void conn_begin_msg(struct nbd_conn *conn)
{
    conn->nr_tx_heads = 0;
    conn->msg = (struct msghdr){.msg_iov = conn->tx_iov};
}

static bool nbd_rq_is_piped(const struct nbd_rq *nrq)
{
    return nrq->has_pipe && nrq->rq.is_piped && !nrq->rq.error;
}

// The header of a chunk, or of a whole simple reply, into the message under way. data_len: bytes that
// follow the header, some of them appended to it by the caller.
static uint8_t *conn_put_head(struct nbd_conn *conn, const struct nbd_rq *nrq, unsigned type, unsigned flags,
                              uint64_t data_len)
{
    uint8_t *head = conn->tx_heads[conn->nr_tx_heads++].bytes;
    struct iovec *iov = &conn->tx_iov[conn->msg.msg_iovlen++];

    iov->iov_base = head;
    if (conn->mode == NBD_MODE_EXTENDED) {
        be_put32(head, NBD_EXTENDED_REPLY_MAGIC);
        be_put64(head + 16, nrq->offset_bytes);
        be_put64(head + 24, data_len);
        iov->iov_len = NBD_EXTENDED_REPLY_BYTES;
    } else {
        be_put32(head, NBD_STRUCTURED_REPLY_MAGIC);
        be_put32(head + 16, (uint32_t)data_len);
        iov->iov_len = NBD_STRUCTURED_REPLY_BYTES;
    }
    be_put16(head + 4, (uint16_t)flags);
    be_put16(head + 6, (uint16_t)type);
    be_put64(head + 8, nrq->cookie);
    return head + iov->iov_len;
}

// More of the header that was put last.
static void conn_extend_head(struct nbd_conn *conn, size_t len)
{
    conn->tx_iov[conn->msg.msg_iovlen - 1].iov_len += len;
}

static void conn_put_data(struct nbd_conn *conn, void *data, size_t len)
{
    conn->tx_iov[conn->msg.msg_iovlen++] = (struct iovec){.iov_base = data, .iov_len = len};
}

static void conn_put_simple(struct nbd_conn *conn, const struct nbd_rq *nrq)
{
    uint8_t *head = conn->tx_heads[conn->nr_tx_heads++].bytes;

    be_put32(head, NBD_SIMPLE_REPLY_MAGIC);
    be_put32(head + 4, nbd_error(nrq->rq.error));
    be_put64(head + 8, nrq->cookie);
    conn_put_data(conn, head, NBD_SIMPLE_REPLY_BYTES);
    if (!nrq->rq.error && nrq->rq.op == REQ_OP_READ && nrq->len_bytes && !nbd_rq_is_piped(nrq))
        conn_put_data(conn, nrq->buf, nrq->len_bytes);
}

static void conn_put_data_head(struct nbd_conn *conn, const struct nbd_rq *nrq, uint64_t at, uint64_t len,
                               unsigned flags)
{
    uint8_t *more = conn_put_head(conn, nrq, NBD_REPLY_TYPE_OFFSET_DATA, flags, 8 + len);

    be_put64(more, nrq->offset_bytes + at);
    conn_extend_head(conn, 8);
}

static bool is_zero(const char *data, size_t len)
{
    // The first bytes decide for nearly all data that is not zero.
    return !data[0] && !memcmp(data, data + 1, len - 1);
}

// How many bytes from at on are all zero or all data, in steps of NBD_HOLE_BYTES.
static uint64_t chunk_len(const struct nbd_rq *nrq, uint64_t at, bool *is_hole)
{
    uint64_t end = at;

    while (end < nrq->len_bytes) {
        uint64_t n = min_of(NBD_HOLE_BYTES, nrq->len_bytes - end);
        bool is_zero_piece = is_zero(nrq->buf + end, n);

        if (end == at)
            *is_hole = is_zero_piece;
        else if (is_zero_piece != *is_hole)
            break;
        end += n;
    }
    return end - at;
}

// The data of a READ as chunks. false: the message is full before the end of it.
static bool conn_put_read(struct nbd_conn *conn, struct nbd_rq *nrq)
{
    while (nrq->sent_bytes < nrq->len_bytes) {
        uint64_t at = nrq->sent_bytes, len = nrq->len_bytes - at;
        bool is_hole = false;
        unsigned flags;
        uint8_t *more;

        if (conn->nr_tx_heads == NBD_TX_MAX_CHUNKS)
            return false;
        if (!nrq->want_one_chunk)
            len = chunk_len(nrq, at, &is_hole);
        nrq->sent_bytes += len;
        flags = nrq->sent_bytes == nrq->len_bytes ? NBD_REPLY_FLAG_DONE : 0;
        if (is_hole) {
            more = conn_put_head(conn, nrq, NBD_REPLY_TYPE_OFFSET_HOLE, flags, 12);
            be_put64(more, nrq->offset_bytes + at);
            be_put32(more + 8, (uint32_t)len);
            conn_extend_head(conn, 12);
        } else {
            conn_put_data_head(conn, nrq, at, len, flags);
            conn_put_data(conn, nrq->buf + at, len);
        }
    }
    return true;
}

// "NBD_REPLY_TYPE_BLOCK_STATUS": the extents in buf become descriptors in place, which are shorter.
static void conn_put_block_status(struct nbd_conn *conn, struct nbd_rq *nrq)
{
    bool is_extended = conn->mode == NBD_MODE_EXTENDED;
    size_t desc_bytes = is_extended ? 16 : 8, head_bytes = is_extended ? 8 : 4;
    uint8_t *desc = (uint8_t *)nrq->buf, *more;

    for (unsigned i = 0; i < nrq->rq.nr_extents; i++, desc += desc_bytes) {
        struct extent ext = ((struct extent *)(void *)nrq->buf)[i];
        uint32_t state = ext.state == EXTENT_HOLE        ? NBD_STATE_HOLE | NBD_STATE_ZERO
                         : ext.state == EXTENT_UNWRITTEN ? NBD_STATE_ZERO
                                                         : 0;

        if (is_extended) {
            be_put64(desc, ext.len_bytes);
            be_put64(desc + 8, state);
        } else {
            be_put32(desc, (uint32_t)ext.len_bytes); // at most the request's length of 32 bits
            be_put32(desc + 4, state);
        }
    }
    more =
        conn_put_head(conn, nrq, is_extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
                      NBD_REPLY_FLAG_DONE, head_bytes + desc_bytes * nrq->rq.nr_extents);
    be_put32(more, NBD_CONTEXT_ID);
    if (is_extended)
        be_put32(more + 4, nrq->rq.nr_extents);
    conn_extend_head(conn, head_bytes);
    conn_put_data(conn, nrq->buf, desc_bytes * nrq->rq.nr_extents);
}

// false: the message is full, and the reply goes on in the next one.
static bool conn_put_reply(struct nbd_conn *conn, struct nbd_rq *nrq)
{
    uint8_t *more;

    if (conn->nr_tx_heads == NBD_TX_MAX_CHUNKS)
        return false;
    if (conn->mode == NBD_MODE_SIMPLE) {
        conn_put_simple(conn, nrq);
    } else if (nrq->rq.error) {
        more = conn_put_head(conn, nrq, NBD_REPLY_TYPE_ERROR, NBD_REPLY_FLAG_DONE, 6);
        be_put32(more, nbd_error(nrq->rq.error));
        be_put16(more + 4, 0); // no message
        conn_extend_head(conn, 6);
    } else if (nrq->rq.op == REQ_OP_READ && nrq->len_bytes) {
        return conn_put_read(conn, nrq);
    } else if (nrq->rq.op == REQ_OP_BLOCK_STATUS) {
        conn_put_block_status(conn, nrq);
    } else if (nrq->rq.op == REQ_OP_READ || conn->mode == NBD_MODE_EXTENDED) {
        conn_put_head(conn, nrq, NBD_REPLY_TYPE_NONE, NBD_REPLY_FLAG_DONE, 0);
    } else {
        conn_put_simple(conn, nrq); // allowed without data, and the shortest
    }
    return true;
}

static void conn_drop_replies(struct nbd_conn *conn)
{
    struct nbd_rq *nrq;

    while ((nrq = conn->replies)) {
        conn->replies = nrq->next;
        nbd_rq_put(conn, nrq);
    }
    conn->replies_tail = &conn->replies;
}

static void conn_hang_up(struct nbd_conn *conn)
{
    conn->is_broken = true;
    conn->is_rx_over = true;
    shutdown(conn->fd, SHUT_RDWR); // ends the RECV that is armed
}

static void conn_answered(const struct nbd_conn *conn)
{
    // Where a worker still has one, its result is not to wait for others to gather.
    if (tags_nr_used(&conn->tags) == (conn->payload_rq ? 1 : 0))
        conn->queue->ring->nr_due++;
}

static void conn_resume(struct nbd_conn *conn)
{
    if (!conn->is_stalled || !tags_can_resume(&conn->tags))
        return;
    conn->is_stalled = false;
    conn_parse(conn);
}

// N5. With what the kernel counts beside the bytes.
static bool conn_has_room(const struct nbd_conn *conn, uint64_t len)
{
    int nr_unread_bytes;

    return !ioctl(conn->fd, SIOCOUTQ, &nr_unread_bytes) &&
           (uint64_t)nr_unread_bytes + len + len / 16 + NBD_ROOM_BYTES <= conn->sndbuf_bytes;
}

// true: all of it is sent, or will never be.
static bool conn_send_piped(struct nbd_conn *conn, struct nbd_rq *nrq)
{
    const struct iovec *head = conn->tx_iov;
    uint64_t left = nrq->len_bytes;
    ssize_t n = 1;

    if (!conn_has_room(conn, left))
        return false;
    conn_begin_msg(conn);
    if (conn->mode == NBD_MODE_SIMPLE)
        conn_put_simple(conn, nrq);
    else
        conn_put_data_head(conn, nrq, 0, nrq->len_bytes, NBD_REPLY_FLAG_DONE);
    if (send(conn->fd, head->iov_base, head->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE) !=
        (ssize_t)head->iov_len)
        n = 0;
    while (left && n > 0) {
        n = splice(nrq->pipe.fds[0], NULL, conn->fd, NULL, left, SPLICE_F_NONBLOCK);
        if (n > 0)
            left -= (uint64_t)n;
        else if (n < 0 && errno == EINTR)
            n = 1;
    }
    nrq->rq.is_piped = left;
    if (left)
        conn_hang_up(conn);
    return true;
}

// The replies that are next, one by one. false: those behind have to wait.
static bool conn_send_piped_replies(struct nbd_conn *conn)
{
    struct nbd_rq *nrq;

    while (!conn->is_broken && (nrq = conn->replies) && nbd_rq_is_piped(nrq)) {
        if (!conn_send_piped(conn, nrq)) {
            conn->is_send_armed = true;
            ring_queue(conn->queue->ring, &conn->room_op);
            return false;
        }
        conn->replies = nrq->next;
        nbd_rq_put(conn, nrq);
        conn_answered(conn);
    }
    return true;
}

// All replies that there are in one message.
static void conn_send_replies(struct ring_hook *hook)
{
    struct nbd_conn *conn = container_of(hook, struct nbd_conn, reply_hook);
    struct nbd_rq **sending_tail = &conn->sending;
    struct nbd_rq *nrq;

    if (conn->is_send_armed || !conn_send_piped_replies(conn))
        return; // conn_sent() comes back here
    if (conn->is_broken) {
        conn_drop_replies(conn);
        conn_close_if_over(conn);
        return;
    }
    conn_begin_msg(conn);
    while ((nrq = conn->replies) && !nbd_rq_is_piped(nrq) && conn_put_reply(conn, nrq)) {
        conn->replies = nrq->next;
        nrq->next = NULL;
        *sending_tail = nrq;
        sending_tail = &nrq->next;
    }
    if (!conn->replies)
        conn->replies_tail = &conn->replies;
    if (!conn->nr_tx_heads) {
        conn_resume(conn);
        conn_close_if_over(conn);
        return;
    }
    conn->is_send_armed = true;
    ring_queue(conn->queue->ring, &conn->send_op);
}

// Takes n sent bytes off the message. true: all of it is gone.
static bool conn_msg_advance(struct nbd_conn *conn, size_t n)
{
    struct msghdr *msg = &conn->msg;

    while (msg->msg_iovlen && n >= msg->msg_iov->iov_len) {
        n -= msg->msg_iov->iov_len;
        msg->msg_iov++;
        msg->msg_iovlen--;
    }
    if (!msg->msg_iovlen)
        return true;
    msg->msg_iov->iov_base = (char *)msg->msg_iov->iov_base + n;
    msg->msg_iov->iov_len -= n;
    return false;
}

// Or it is broken: then that is found out.
static void conn_found_room(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, room_op);

    (void)res;
    conn->is_send_armed = false;
    ring_defer(conn->queue->ring, &conn->reply_hook);
}

static void conn_sent(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, send_op);
    struct nbd_rq *nrq;

    if (res == -EINTR || res == -EAGAIN || (res > 0 && !conn_msg_advance(conn, (size_t)res))) {
        ring_queue(conn->queue->ring, op);
        return;
    }
    conn->is_send_armed = false;
    if (res <= 0)
        conn_hang_up(conn);
    while ((nrq = conn->sending)) {
        conn->sending = nrq->next;
        nbd_rq_put(conn, nrq);
    }
    conn_answered(conn);
    if (conn->replies)
        ring_defer(conn->queue->ring, &conn->reply_hook);
    conn_resume(conn);
    conn_close_if_over(conn);
}

// ---- Requests

static void conn_rq_done(struct rq *rq)
{
    struct nbd_rq *nrq = container_of(rq, struct nbd_rq, rq);
    struct nbd_conn *conn = nrq->conn;

    nrq->next = NULL;
    *conn->replies_tail = nrq;
    conn->replies_tail = &nrq->next;
    ring_defer(conn->queue->ring, &conn->reply_hook);
}

static const uint8_t cmd_to_op[] = {
    [NBD_CMD_READ] = REQ_OP_READ,
    [NBD_CMD_WRITE] = REQ_OP_WRITE,
    [NBD_CMD_FLUSH] = REQ_OP_FLUSH,
    [NBD_CMD_TRIM] = REQ_OP_DISCARD,
    [NBD_CMD_CACHE] = REQ_OP_PREFETCH,
    [NBD_CMD_WRITE_ZEROES] = REQ_OP_WRITE_ZEROES,
    [NBD_CMD_BLOCK_STATUS] = REQ_OP_BLOCK_STATUS,
};

static uint8_t request_rq_flags(const struct nbd_request *request)
{
    unsigned flags = 0;

    if (request->flags & NBD_CMD_FLAG_FUA)
        flags |= RQ_FUA;
    if (request->flags & NBD_CMD_FLAG_NO_HOLE)
        flags |= RQ_NOUNMAP;
    if (request->flags & NBD_CMD_FLAG_FAST_ZERO)
        flags |= RQ_FAST_ZERO;
    if (request->flags & NBD_CMD_FLAG_REQ_ONE)
        flags |= RQ_ONE_EXTENT;
    return (uint8_t)flags;
}

// N5
static struct rq_pipe *conn_get_pipe(struct rq *rq)
{
    struct nbd_rq *nrq = container_of(rq, struct nbd_rq, rq);
    struct nbd_conn *conn = nrq->conn;

    if (nrq->has_pipe) // was not filled before
        return &nrq->pipe;
    if (!conn->nr_free_pipes && !nbd_conn_make_pipe(conn))
        return NULL;
    nrq->pipe = conn->pipes[--conn->nr_free_pipes];
    nrq->has_pipe = true;
    return &nrq->pipe;
}

// false: no memory is free now.
static bool nbd_rq_get_buf(struct nbd_conn *conn, struct nbd_rq *nrq, size_t len)
{
    nrq->buf_pages = arena_pages(len);
    if (!queue_has_room(conn->queue, conn->buf_bytes, len)) // Q5
        return false;
    nrq->buf = arena_get(&conn->arena, nrq->buf_pages);
    if (!nrq->buf)
        return false;
    queue_count_bufs(conn->queue, &conn->buf_bytes, (int64_t)(nrq->buf_pages * ARENA_PAGE_BYTES));
    nrq->iov = (struct iovec){.iov_base = nrq->buf, .iov_len = len};
    nrq->rq.iov = &nrq->iov;
    nrq->rq.nr_iov = 1;
    nrq->rq.buf_index =
        (int16_t)(nrq->buf + len <= conn->arena.base + NBD_FIXED_BYTES ? conn->buf_index : -1);
    return true;
}

// A tag, and memory unless the request is to be answered with *error. NULL: there is none, the client
// has to wait (is_stalled).
static struct nbd_rq *conn_get_rq(struct nbd_conn *conn, const struct nbd_request *request, int *error)
{
    struct rq *rq = tags_get(&conn->tags);
    struct nbd_rq *nrq;
    size_t buf_bytes = 0;

    if (!rq)
        goto stalled;
    nrq = container_of(rq, struct nbd_rq, rq);
    nrq->conn = conn;
    nrq->cookie = request->cookie;
    nrq->offset_bytes = request->offset_bytes;
    nrq->len_bytes = request->len_bytes;
    nrq->sent_bytes = 0;
    nrq->want_one_chunk = request->flags & NBD_CMD_FLAG_DF;
    nrq->buf = NULL;
    nrq->has_pipe = false;
    rq->op = *error ? REQ_OP_NR : cmd_to_op[request->type];
    rq->flags = request_rq_flags(request);
    rq->offset_bytes = request->offset_bytes;
    rq->len_bytes = request->len_bytes;
    rq->iov = NULL;
    rq->nr_iov = 0;
    rq->get_pipe = NULL;
    rq->done = conn_rq_done;
    // Before memory is given out, and before a payload is read that nobody will take.
    if (!*error)
        *error = device_check(&conn->queue->limits, rq);
    if (*error)
        return nrq;
    if (rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE)
        buf_bytes = rq->len_bytes;
    else if (rq->op == REQ_OP_BLOCK_STATUS)
        buf_bytes = NBD_STATUS_BYTES;
    if (rq->op == REQ_OP_READ && buf_bytes >= NBD_PIPE_MIN_BYTES && buf_bytes <= conn->pipe_max_bytes)
        rq->get_pipe = conn_get_pipe;
    if (!buf_bytes || nbd_rq_get_buf(conn, nrq, buf_bytes))
        return nrq;
    tags_put(&conn->tags, rq);
stalled:
    conn->is_stalled = true;
    return NULL;
}

static void conn_start(struct nbd_conn *conn, const struct nbd_request *request)
{
    int error = request->error;
    struct nbd_rq *nrq = conn_get_rq(conn, request, &error);

    if (!nrq)
        return;
    conn->rx_begin += nbd_request_bytes(conn->mode);
    if (error)
        conn->skip_bytes = request->payload_bytes;
    if (request->error) {
        nrq->rq.error = error;
        conn_rq_done(&nrq->rq);
    } else if (request->payload_bytes && !error) {
        conn->payload_rq = nrq;
        conn->payload_bytes = 0;
    } else {
        queue_submit(conn->queue, &nrq->rq); // the device's own check answers what it found above
    }
}

// Moves what is there of the payload. false: more has to come.
static bool conn_take_payload(struct nbd_conn *conn)
{
    struct nbd_rq *nrq = conn->payload_rq;
    size_t n = min_of(conn->rx_end - conn->rx_begin, nrq->len_bytes - conn->payload_bytes);

    memcpy(nrq->buf + conn->payload_bytes, conn->rx_buf + conn->rx_begin, n);
    conn->rx_begin += n;
    conn->payload_bytes += n;
    if (conn->payload_bytes < nrq->len_bytes)
        return false;
    conn->payload_rq = NULL;
    queue_submit(conn->queue, &nrq->rq);
    return true;
}

static bool conn_take_skipped(struct nbd_conn *conn)
{
    size_t n = min_of(conn->rx_end - conn->rx_begin, conn->skip_bytes);

    conn->rx_begin += n;
    conn->skip_bytes -= n;
    return !conn->skip_bytes;
}

static bool conn_take_request(struct nbd_conn *conn)
{
    struct nbd_request request;

    if (conn->rx_end - conn->rx_begin < nbd_request_bytes(conn->mode))
        return false;
    if (nbd_request_parse(conn->rx_buf + conn->rx_begin, conn->mode, conn->has_meta_context, &request) < 0) {
        conn_hang_up(conn);
        return false;
    }
    if (request.type == NBD_CMD_DISC) { // with whatever flags: it has no reply
        // What is in flight is answered, then the connection is closed.
        conn->is_rx_over = true;
        return false;
    }
    conn->queue->ring->nr_received++;
    conn_start(conn, &request);
    return !conn->is_stalled;
}

static void conn_arm_recv(struct nbd_conn *conn)
{
    struct ring_op *op = &conn->recv_op;
    size_t left = conn->payload_rq ? conn->payload_rq->len_bytes - conn->payload_bytes : 0;

    if (left > DIRECT_RX_BYTES) {
        op->recv.buf = conn->payload_rq->buf + conn->payload_bytes;
        op->recv.len_bytes = (uint32_t)left;
    } else {
        memmove(conn->rx_buf, conn->rx_buf + conn->rx_begin, conn->rx_end - conn->rx_begin);
        conn->rx_end -= conn->rx_begin;
        conn->rx_begin = 0;
        op->recv.buf = conn->rx_buf + conn->rx_end; // N4
        op->recv.len_bytes = (uint32_t)(NBD_RX_BYTES - conn->rx_end);
    }
    conn->is_recv_armed = true;
    ring_queue(conn->queue->ring, op);
}

// Takes all that is complete in rx_buf, and goes on reading unless the client has to wait.
static void conn_parse(struct nbd_conn *conn)
{
    bool goes_on = true;

    while (goes_on && !conn->is_rx_over) {
        if (conn->payload_rq)
            goes_on = conn_take_payload(conn);
        else if (conn->skip_bytes)
            goes_on = conn_take_skipped(conn);
        else
            goes_on = conn_take_request(conn);
    }
    queue_unplug(conn->queue);
    if (!conn->is_rx_over && !conn->is_stalled)
        conn_arm_recv(conn);
}

// A payload that will never be whole.
static void conn_drop_payload(struct nbd_conn *conn)
{
    if (conn->payload_rq && conn->is_rx_over && !conn->is_recv_armed) {
        nbd_rq_put(conn, conn->payload_rq);
        conn->payload_rq = NULL;
    }
}

// A unix socket knows what of our answers has not been read; TCP does not, and gets no patience.
static bool conn_peer_is_idle(const struct nbd_conn *conn)
{
    int nr_unread_bytes;

    return ioctl(conn->fd, SIOCOUTQ, &nr_unread_bytes) < 0 || !nr_unread_bytes;
}

static void conn_received(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, recv_op);

    conn->is_recv_armed = false;
    if (res == -EINTR || res == -EAGAIN) {
        if (!conn->is_rx_over)
            conn_arm_recv(conn);
    } else if (res <= 0) {
        conn->is_rx_over = true;
    } else if (conn->payload_rq && op->recv.buf != conn->rx_buf + conn->rx_end) {
        conn->payload_bytes += (size_t)res;
    } else {
        conn->rx_end += (size_t)res;
    }
    if (res > 0) {
        if (conn->queue->ring->is_gathered)
            conn->queue->ring->is_peer_idle |= conn_peer_is_idle(conn);
        conn_parse(conn);
    }
    conn_drop_payload(conn);
    conn_close_if_over(conn);
}

void nbd_conn_adopted(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, adopt_op);

    (void)res;
    conn->recv_op.done = conn_received;
    conn->send_op.done = conn_sent;
    conn->room_op.done = conn_found_room;
    conn->reply_hook.run = conn_send_replies;
    ring_add_fd(conn->queue->ring, conn->fd);
    conn->buf_index = ring_add_buf(conn->queue->ring, conn->arena.base, NBD_FIXED_BYTES);
    conn_parse(conn); // there may be requests behind the handshake
    conn_close_if_over(conn);
}

void nbd_conn_stop(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, stop_op);

    (void)res;
    if (conn->fd >= 0) { // else it is over already
        conn->is_rx_over = true;
        conn->is_stalled = false;
        shutdown(conn->fd, SHUT_RD); // ends the RECV that is armed
        conn_drop_payload(conn);
        conn_close_if_over(conn);
    }
    conn_unref(conn);
}

void nbd_conn_abort(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, abort_op);

    (void)res;
    if (conn->fd >= 0) {
        conn_hang_up(conn);
        conn_drop_payload(conn);
        ring_defer(conn->queue->ring, &conn->reply_hook);
    }
    conn_unref(conn);
}

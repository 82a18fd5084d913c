#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "util/util.h"

// Waits are made of short ones: an idle CPU of a virtual machine has been seen to miss a wake-up of the
// kernel's own (while memory was being registered) until its next timer.
#define SLICE_MS 100
#define NR_SLICES 300

static void session_closed(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, closed_op);
    struct session *session = (struct session *)conn->client; // which is server.c's elsewhere

    (void)res;
    if (session->is_closed)
        abort();
    session->is_closed = true;
}

int session_sndbuf_bytes;

bool session_begin(struct session *session, struct ring *main_ring, struct device *dev, enum nbd_mode mode,
                   bool has_meta_context, const void *early, size_t early_len)
{
    struct nbd_handshake handshake = {.mode = mode, .dev = dev, .meta_dev = has_meta_context ? dev : NULL};
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return false;
    *session = (struct session){.fd = fds[0], .main_ring = main_ring};
    fcntl(fds[0], F_SETFL, O_NONBLOCK);
    if (session_sndbuf_bytes)
        setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &session_sndbuf_bytes, sizeof(session_sndbuf_bytes));
    session->conn = nbd_conn_create(fds[1], &handshake, early, early_len);
    if (!session->conn) {
        close(fds[0]);
        close(fds[1]);
        return false;
    }
    session->conn->main_ring = main_ring;
    session->conn->closed_op.done = session_closed;
    session->conn->client = (struct nbd_client *)session;
    ring_post(session->conn->queue->ring, &session->conn->adopt_op, 0);
    return true;
}

// More of what comes back. 1: some, 0: not now, -1: the server has hung up.
static int session_take(struct session *session)
{
    ssize_t n = recv(session->fd, wire_grow(&session->in, 65536), 65536, 0);

    session->in.len -= 65536 - (size_t)max_of(n, 0);
    if (n > 0)
        return 1;
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

// The events that came, 0: none in all that time.
static int session_wait(const struct session *session, short events)
{
    struct pollfd pfd = {.fd = session->fd, .events = events};

    for (unsigned i = 0; i < NR_SLICES; i++) {
        if (poll(&pfd, 1, SLICE_MS) > 0)
            return pfd.revents;
    }
    return 0;
}

bool session_send(struct session *session, const void *bytes, size_t len)
{
    const char *at = bytes;

    while (len) {
        int events = session_wait(session, POLLIN | POLLOUT);
        ssize_t n;

        if (!events)
            return false;
        if (events & POLLIN && session_take(session) < 0)
            return true;
        n = send(session->fd, at, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return true;
        at += max_of(n, 0);
        len -= (size_t)max_of(n, 0);
    }
    return true;
}

bool session_receive(struct session *session, size_t len)
{
    while (session->in.len < len) {
        if (!session_wait(session, POLLIN) || session_take(session) < 0)
            return false;
    }
    return true;
}

bool session_finish(struct session *session)
{
    int ret;

    shutdown(session->fd, SHUT_WR);
    do {
        if (!session_wait(session, POLLIN))
            return false;
        ret = session_take(session);
    } while (ret >= 0);
    return true;
}

struct patience {
    struct ring_op op;
    unsigned nr_slices;
};

static void session_slice_over(struct ring_op *op, int res)
{
    struct patience *patience = container_of(op, struct patience, op);

    (void)res;
    patience->nr_slices--;
}

bool session_end(struct session *session)
{
    struct patience patience = {.nr_slices = NR_SLICES};

    if (session->fd >= 0)
        close(session->fd);
    session->fd = -1;
    while (!session->is_closed && patience.nr_slices) {
        patience.op = (struct ring_op){.done = session_slice_over,
                                       .code = RING_TIMEOUT,
                                       .timeout_ns = SLICE_MS * 1000000ULL};
        ring_queue(session->main_ring, &patience.op);
        if (ring_run(session->main_ring) < 0)
            return false;
        ring_cancel_timeout(session->main_ring, &patience.op);
    }
    wire_free(&session->in);
    if (session->is_closed)
        nbd_conn_free(session->conn);
    return session->is_closed;
}

struct asked_list session_number(uint8_t *bytes, size_t len, enum nbd_mode mode)
{
    bool is_extended = mode == NBD_MODE_EXTENDED;
    size_t head_bytes = is_extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
    struct asked_list list = {.asked = calloc(len / head_bytes + 1, sizeof(struct asked))};

    while (len >= head_bytes) {
        struct asked *asked = &list.asked[list.nr_asked];
        uint64_t payload;

        if (be_get32(bytes) != (is_extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC)) {
            list.is_broken = true;
            break;
        }
        asked->flags = be_get16(bytes + 4);
        asked->type = be_get16(bytes + 6);
        be_put64(bytes + 8, list.nr_asked);
        asked->offset = be_get64(bytes + 16);
        asked->len = is_extended ? be_get64(bytes + 24) : be_get32(bytes + 24);
        if (asked->type == NBD_CMD_DISC)
            break;
        payload = asked->type == NBD_CMD_WRITE || (is_extended && asked->flags & NBD_CMD_FLAG_PAYLOAD_LEN)
                      ? asked->len
                      : 0;
        list.nr_asked++;
        bytes += head_bytes;
        len -= head_bytes;
        asked->is_complete = payload <= len;
        payload = min_of(payload, len);
        bytes += payload;
        len -= payload;
    }
    return list;
}

struct reply {
    const uint8_t *data;
    uint16_t flags, type;
    uint64_t len;
};

static const char *check_read_chunk(struct asked *asked, const struct reply *reply)
{
    bool is_hole = reply->type == NBD_REPLY_TYPE_OFFSET_HOLE;
    uint64_t at, n;

    if (is_hole ? reply->len != 12 : reply->len <= 8)
        return "a data or hole chunk of a wrong length";
    at = be_get64(reply->data);
    n = is_hole ? be_get32(reply->data + 8) : reply->len - 8;
    if (asked->type != NBD_CMD_READ || !n || at < asked->offset || n > asked->len ||
        at - asked->offset > asked->len - n)
        return "data outside of what was asked for";
    if (asked->flags & NBD_CMD_FLAG_DF && (asked->nr_chunks || is_hole))
        return "more than one chunk in spite of DF";
    asked->nr_read += n;
    return NULL;
}

static const char *check_status_chunk(const struct asked *asked, const struct reply *reply)
{
    bool is_extended = reply->type == NBD_REPLY_TYPE_BLOCK_STATUS_EXT;
    uint64_t head = is_extended ? 8 : 4, desc = is_extended ? 16 : 8, sum = 0,
             nr = (reply->len - head) / desc;

    if (asked->type != NBD_CMD_BLOCK_STATUS || reply->len < head + desc || (reply->len - head) % desc)
        return "a block status chunk of a wrong length, or for another command";
    if (be_get32(reply->data) != NBD_CONTEXT_ID || (is_extended && be_get32(reply->data + 4) != nr))
        return "a block status of another context, or a wrong count";
    for (uint64_t i = 0; i < nr; i++) {
        const uint8_t *at = reply->data + head + i * desc;
        uint64_t n = is_extended ? be_get64(at) : be_get32(at);

        if (!n || n > asked->len - sum)
            return "a block status beyond what was asked for";
        sum += n;
    }
    return asked->flags & NBD_CMD_FLAG_REQ_ONE && nr != 1 ? "more than one extent in spite of REQ_ONE" : NULL;
}

static const char *check_chunk(struct asked *asked, const struct reply *reply)
{
    const char *wrong = NULL;
    bool is_done = reply->flags & NBD_REPLY_FLAG_DONE;

    if (reply->flags & ~NBD_REPLY_FLAG_DONE)
        return "unknown chunk flags";
    switch (reply->type) {
    case NBD_REPLY_TYPE_NONE:
        if (reply->len || !is_done)
            return "a chunk of no type with a length, or not the last";
        break;
    case NBD_REPLY_TYPE_OFFSET_DATA:
    case NBD_REPLY_TYPE_OFFSET_HOLE:
        wrong = check_read_chunk(asked, reply);
        break;
    case NBD_REPLY_TYPE_BLOCK_STATUS:
    case NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
        wrong = check_status_chunk(asked, reply);
        break;
    case NBD_REPLY_TYPE_ERROR:
        if (reply->len < 6 || !be_get32(reply->data) || reply->len != 6U + be_get16(reply->data + 4))
            return "an error chunk of a wrong length, or without an error";
        asked->is_done = is_done;
        return NULL;
    default:
        return "an unknown chunk type";
    }
    if (wrong)
        return wrong;
    asked->nr_chunks++;
    if (is_done && asked->type == NBD_CMD_READ && asked->nr_read != asked->len)
        return "a read that is done before all data has come";
    if (is_done && asked->type == NBD_CMD_BLOCK_STATUS && !asked->nr_chunks)
        return "a block status without status";
    asked->is_done = is_done;
    return NULL;
}

// One reply or chunk; *used: its bytes, 0 when it is cut off.
static const char *check_reply(struct asked_list *list, const uint8_t *in, size_t in_len, enum nbd_mode mode,
                               size_t *used)
{
    struct asked *asked;
    struct reply reply;
    uint32_t magic;
    size_t head;
    bool is_simple;

    *used = 0;
    if (in_len < NBD_SIMPLE_REPLY_BYTES)
        return NULL;
    magic = be_get32(in);
    is_simple = magic == NBD_SIMPLE_REPLY_MAGIC;
    if (is_simple
            ? mode == NBD_MODE_EXTENDED
            : mode == NBD_MODE_SIMPLE || magic != (mode == NBD_MODE_EXTENDED ? NBD_EXTENDED_REPLY_MAGIC
                                                                             : NBD_STRUCTURED_REPLY_MAGIC))
        return "a reply with a wrong magic";
    if (be_get64(in + 8) >= list->nr_asked)
        return "a reply to nothing";
    asked = &list->asked[be_get64(in + 8)];
    if (asked->is_done)
        return "a second reply";
    if (is_simple) {
        bool has_data = !be_get32(in + 4) && asked->type == NBD_CMD_READ;
        size_t len = NBD_SIMPLE_REPLY_BYTES + (has_data ? asked->len : 0);

        if (mode != NBD_MODE_SIMPLE && (asked->type == NBD_CMD_READ || asked->type == NBD_CMD_BLOCK_STATUS))
            return "a simple reply where a structured one belongs";
        if (in_len < len)
            return NULL;
        asked->is_done = true;
        *used = len;
        return NULL;
    }
    head = mode == NBD_MODE_EXTENDED ? NBD_EXTENDED_REPLY_BYTES : NBD_STRUCTURED_REPLY_BYTES;
    if (in_len < head)
        return NULL;
    reply = (struct reply){.data = in + head, .flags = be_get16(in + 4), .type = be_get16(in + 6)};
    reply.len = mode == NBD_MODE_EXTENDED ? be_get64(in + 24) : be_get32(in + 16);
    if (mode == NBD_MODE_EXTENDED && be_get64(in + 16) != asked->offset)
        return "an extended reply with another offset";
    if (reply.len > LIMITS_MAX_TRANSFER_BYTES + 64)
        return "a chunk that is longer than any may be";
    if (in_len - head < reply.len)
        return NULL;
    *used = head + reply.len;
    return check_chunk(asked, &reply);
}

const char *session_check(struct asked_list *list, const uint8_t *in, size_t in_len, enum nbd_mode mode)
{
    size_t used;

    for (; in_len; in += used, in_len -= used) {
        const char *wrong = check_reply(list, in, in_len, mode, &used);

        if (wrong)
            return wrong;
        if (!used && !list->is_broken)
            return "a reply that is cut off";
        if (!used)
            return NULL;
    }
    for (size_t i = 0; i < list->nr_asked; i++) {
        if (list->asked[i].is_complete && !list->asked[i].is_done && !list->is_broken)
            return "a request without a reply";
    }
    return NULL;
}

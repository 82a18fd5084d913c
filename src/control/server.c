#include "control/server.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "util/util.h"

#define TIMEOUT_NS (30 * NSEC_PER_SEC) // for a line to come, or an answer to be taken
#define MAX_DEPTH 8                    // of what is nested in a request

struct server_conn {
    struct server *server;
    struct server_conn *next, **at; // the pointer that points here
    int fd;
    char *in; // SERVER_LINE_BYTES
    size_t in_len;
    char *out;
    struct iovec iov; // of out, not sent yet
    struct msghdr msg;
    struct ring_op io_op, timer_op;
    bool is_timer_set, is_closing, is_last;
};

static void conn_take_line(struct server_conn *conn);

char *server_text(struct json_object *object, int flags)
{
    char *text = strdup(json_object_to_json_string_ext(object, flags));

    if (text)
        util_make_utf8(text);
    return text;
}

struct json_object *server_parse(const char *line, size_t len, struct err *err)
{
    struct json_tokener *tokener = json_tokener_new_ex(MAX_DEPTH);
    struct json_object *request = NULL, *version;

    if (!tokener) {
        err_set(err, -ENOMEM, "out of memory");
        return NULL;
    }
    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT); // not UTF-8 alone: paths are of any bytes
    request = json_tokener_parse_ex(tokener, line, (int)len);
    if (!request || !json_object_is_type(request, json_type_object)) {
        err_set(err, -EBADMSG, "no JSON object in a line; see bight(1) for what is understood");
    } else if (!json_object_object_get_ex(request, "bight", &version) ||
               json_object_get_int(version) != SERVER_VERSION) {
        err_set(err, -EBADMSG, "not a request of version %d; use the bight that has attached it",
                SERVER_VERSION);
    } else {
        json_tokener_free(tokener);
        return request;
    }
    json_tokener_free(tokener);
    json_object_put(request);
    return NULL;
}

static void conn_cancel_timer(struct server_conn *conn)
{
    if (conn->is_timer_set)
        ring_cancel_timeout(conn->server->ring, &conn->timer_op);
    conn->is_timer_set = false;
}

static void conn_unlink(struct server_conn *conn)
{
    *conn->at = conn->next;
    if (conn->next)
        conn->next->at = conn->at;
    conn->server->nr_conns--;
    --*conn->server->nr_pending;
}

static void conn_destroy(struct server_conn *conn)
{
    close(conn->fd);
    free(conn->in);
    free(conn->out);
    free(conn);
}

static void conn_free(struct server_conn *conn)
{
    conn_cancel_timer(conn);
    ring_remove_fd(conn->server->ring, conn->fd);
    conn_unlink(conn);
    conn_destroy(conn);
}

static void conn_timed_out(struct ring_op *op, int res)
{
    struct server_conn *conn = container_of(op, struct server_conn, timer_op);

    (void)res;
    conn->is_timer_set = false;
    shutdown(conn->fd, SHUT_RDWR); // what is in flight ends, and the connection with it
}

static void conn_set_timer(struct server_conn *conn)
{
    conn_cancel_timer(conn);
    conn->timer_op = (struct ring_op){.done = conn_timed_out, .code = RING_TIMEOUT, .timeout_ns = TIMEOUT_NS};
    conn->is_timer_set = true;
    ring_queue(conn->server->ring, &conn->timer_op);
}

// ---- Answers

static void conn_sent(struct ring_op *op, int res)
{
    struct server_conn *conn = container_of(op, struct server_conn, io_op);

    if (res <= 0 && res != -EINTR && res != -EAGAIN) {
        conn_free(conn);
        return;
    }
    if (res > 0) {
        conn->iov.iov_base = (char *)conn->iov.iov_base + res;
        conn->iov.iov_len -= (size_t)res;
    }
    if (conn->iov.iov_len) {
        ring_queue(conn->server->ring, op);
        return;
    }
    free(conn->out);
    conn->out = NULL;
    if (conn->is_closing || conn->server->is_stopping)
        conn_free(conn);
    else
        conn_take_line(conn);
}

// The line, in conn->out and conn->iov. false: no memory for it.
static bool conn_put_answer(struct server_conn *conn, struct json_object *result, const struct err *err)
{
    struct json_object *answer = result ? result : json_object_new_object();
    const char *text;

    json_object_object_add(answer, "bight", json_object_new_int(SERVER_VERSION));
    json_object_object_add(answer, "ok", json_object_new_boolean(!!result));
    if (conn->is_last)
        json_object_object_add(answer, "ended", json_object_new_boolean(true));
    if (!result) {
        json_object_object_add(answer, "error", json_object_new_string(err->line));
        json_object_object_add(answer, "usage", json_object_new_boolean(err->is_usage));
    }
    text = json_object_to_json_string_ext(answer, JSON_C_TO_STRING_PLAIN);
    conn->iov.iov_len = strlen(text) + 1;
    conn->iov.iov_base = conn->out = malloc(conn->iov.iov_len + 1);
    if (conn->out)
        sprintf(conn->out, "%s\n", text);
    json_object_put(answer);
    return conn->out;
}

void server_reply(struct server_conn *conn, struct json_object *result, const struct err *err)
{
    if (!conn_put_answer(conn, result, err)) {
        conn_free(conn);
        return;
    }
    conn->msg = (struct msghdr){.msg_iov = &conn->iov, .msg_iovlen = 1};
    conn->io_op =
        (struct ring_op){.done = conn_sent, .code = RING_SENDMSG, .fd = conn->fd, .msg = &conn->msg};
    conn_set_timer(conn);
    ring_queue(conn->server->ring, &conn->io_op);
}

void server_park(struct server_conn *conn)
{
    conn_cancel_timer(conn);
    ring_remove_fd(conn->server->ring, conn->fd);
    conn_unlink(conn);
}

void server_reply_last(struct server_conn *conn, struct json_object *result, const struct err *err)
{
    struct timeval timeout = {.tv_sec = 5};

    setsockopt(conn->fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    conn->is_last = true;
    if (conn_put_answer(conn, result, err))
        (void)!send(conn->fd, conn->out, conn->iov.iov_len, MSG_NOSIGNAL); // who has gone does not care
    conn_destroy(conn);
}

// ---- Requests

static void conn_handle_line(struct server_conn *conn, size_t len)
{
    struct err err = {.line = ""};
    struct json_object *request = server_parse(conn->in, len, &err);

    conn->in_len -= len + 1;
    memmove(conn->in, conn->in + len + 1, conn->in_len);
    if (request) {
        conn_cancel_timer(conn);
        conn->server->handle(conn->server, conn, request); // V3
    } else {
        conn->is_closing = true; // where would the next line begin?
        server_reply(conn, NULL, &err);
    }
}

static void conn_received(struct ring_op *op, int res)
{
    struct server_conn *conn = container_of(op, struct server_conn, io_op);

    if (res == -EINTR || res == -EAGAIN) {
        ring_queue(conn->server->ring, op);
    } else if (res <= 0) {
        conn_free(conn);
    } else {
        conn->in_len += (size_t)res;
        conn_take_line(conn);
    }
}

static void conn_take_line(struct server_conn *conn)
{
    char *end = memchr(conn->in, '\n', conn->in_len);
    struct err err;

    if (end) {
        conn_handle_line(conn, (size_t)(end - conn->in));
        return;
    }
    if (conn->in_len == SERVER_LINE_BYTES) { // V2
        err_set(&err, -EMSGSIZE, "a request is too long; %d bytes are taken", SERVER_LINE_BYTES);
        err.is_usage = false;
        conn->is_closing = true;
        server_reply(conn, NULL, &err);
        return;
    }
    conn->io_op = (struct ring_op){
        .done = conn_received,
        .code = RING_RECV,
        .fd = conn->fd,
        .recv = {conn->in + conn->in_len, (uint32_t)(SERVER_LINE_BYTES - conn->in_len)},
    };
    if (!conn->is_timer_set)
        conn_set_timer(conn);
    ring_queue(conn->server->ring, &conn->io_op);
}

// ---- Connections

static bool is_welcome(int fd)
{
    struct ucred peer;
    socklen_t len = sizeof(peer);

    return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) && (peer.uid == geteuid() || !peer.uid);
}

static void server_accept(struct server *server, int fd)
{
    struct server_conn *conn = calloc(1, sizeof(*conn));

    if (!is_welcome(fd) || server->nr_conns >= SERVER_MAX_CONNS || !conn ||
        !(conn->in = malloc(SERVER_LINE_BYTES))) { // V1, V2
        close(fd);
        free(conn);
        return;
    }
    conn->server = server;
    conn->fd = fd;
    conn->at = &server->conns;
    conn->next = server->conns;
    if (conn->next)
        conn->next->at = &conn->next;
    server->conns = conn;
    server->nr_conns++;
    ++*server->nr_pending;
    conn_take_line(conn);
}

static void server_poll(struct server *server)
{
    ring_queue(server->ring, &server->poll_op);
}

static void server_ready(struct ring_op *op, int res)
{
    struct server *server = container_of(op, struct server, poll_op);
    int fd;

    (void)res;
    if (server->is_stopping)
        return;
    for (unsigned i = 0; i < SERVER_MAX_CONNS; i++) {
        fd = accept4(server->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            break;
        server_accept(server, fd);
    }
    server_poll(server);
}

void server_start(struct server *server)
{
    server->poll_op =
        (struct ring_op){.done = server_ready, .code = RING_POLL, .fd = server->fd, .events = POLLIN};
    server_poll(server);
}

void server_stop(struct server *server)
{
    server->is_stopping = true;
    for (struct server_conn *conn = server->conns; conn; conn = conn->next) {
        if (conn->is_timer_set && !conn->out) // a line is awaited
            shutdown(conn->fd, SHUT_RDWR);
    }
}

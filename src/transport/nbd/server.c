// Listening, the handshake, and the list of clients: the cold side of NBD, on the main thread.
//
//  S1. A client is in the list from accept() until nothing is left of it; nr_clients counts the list.
//  S2. During the handshake the file descriptor is the client's, then the connection's (conn.h N1).
//  S3. In the handshake either a RECV or a SENDMSG is in flight, and the timer. A client ends when
//      neither is.

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/nbd/conn.h"
#include "transport/nbd/listen.h"
#include "transport/transport.h"
#include "util/unix_socket.h"
#include "util/util.h"

// Who has not chosen an export by then is not going to.
#define HANDSHAKE_TIMEOUT_NS (60 * NSEC_PER_SEC)
// After SIGTERM, for clients that do not take their replies.
#define STOP_TIMEOUT_NS (5 * NSEC_PER_SEC)
// After accept() failed for want of file descriptors or memory.
#define ACCEPT_PAUSE_NS (NSEC_PER_SEC / 10)
#define ACCEPT_BATCH 32
#define UNIX_SNDBUF_BYTES (512 * 1024)

struct nbd_server;

struct nbd_client {
    struct nbd_server *server;
    struct nbd_client *next, **at; // the pointer that points here
    int fd;                        // -1 once it is the connection's
    struct nbd_handshake handshake;
    uint8_t *in; // NBD_HANDSHAKE_IN_BYTES
    size_t in_len;
    struct msghdr msg;
    struct iovec iov;
    struct ring_op io_op; // RECV or SENDMSG
    struct ring_op timer_op;
    bool is_timer_set;
    struct nbd_conn *conn; // in the transmission phase
    pid_t peer_pid;        // 0: not on this machine, or not known
};

struct nbd_listener {
    struct nbd_server *server;
    int fd;
    bool is_ours; // to be unlinked
    struct ring_op poll_op;
    struct ring_op pause_op;
    bool is_pausing;
};

struct nbd_server {
    struct transport transport;
    struct transport_options options;
    struct nbd_listener *listeners;
    unsigned nr_listeners;
    struct nbd_client *clients;
    unsigned nr_clients;
    bool is_stopping;
    struct ring_op stop_timer_op;
    bool is_stop_timer_set;
};

static void client_go_on(struct nbd_client *client);

static void server_check_stopped(struct nbd_server *server)
{
    if (!server->is_stopping || server->nr_clients)
        return;
    if (server->is_stop_timer_set)
        ring_cancel_timeout(server->options.ring, &server->stop_timer_op);
    server->is_stop_timer_set = false;
    transport_stopped(&server->transport);
}

// ---- Clients

static void client_cancel_timer(struct nbd_client *client)
{
    if (client->is_timer_set)
        ring_cancel_timeout(client->server->options.ring, &client->timer_op);
    client->is_timer_set = false;
}

static void client_free(struct nbd_client *client)
{
    struct nbd_server *server = client->server;

    client_cancel_timer(client);
    if (client->fd >= 0) {
        ring_remove_fd(server->options.ring, client->fd);
        close(client->fd);
    }
    nbd_handshake_end(&client->handshake);
    free(client->in);
    *client->at = client->next;
    if (client->next)
        client->next->at = client->at;
    free(client);
    server->nr_clients--;
    server_check_stopped(server); // server may be gone
}

static void client_conn_closed(struct ring_op *op, int res)
{
    struct nbd_conn *conn = container_of(op, struct nbd_conn, closed_op);
    struct nbd_client *client = conn->client;

    (void)res;
    nbd_conn_free(conn);
    client_free(client);
}

// The handshake is over: the connection goes to a queue.
static void client_hand_over(struct nbd_client *client)
{
    struct nbd_conn *conn = nbd_conn_create(client->fd, &client->handshake, client->in, client->in_len);

    if (!conn) {
        log_line("nbd: no memory for a connection; use fewer, or a smaller --depth");
        client_free(client);
        return;
    }
    client_cancel_timer(client);
    ring_remove_fd(client->server->options.ring, client->fd);
    client->fd = -1; // S2
    nbd_handshake_end(&client->handshake);
    free(client->in);
    client->in = NULL;
    client->conn = conn;
    conn->client = client;
    conn->main_ring = client->server->options.ring;
    conn->closed_op.done = client_conn_closed;
    ring_post(conn->queue->ring, &conn->adopt_op, 0);
    if (client->server->is_stopping)
        nbd_conn_send(conn, &conn->stop_op);
}

static void client_sent(struct ring_op *op, int res)
{
    struct nbd_client *client = container_of(op, struct nbd_client, io_op);

    if (res <= 0 && res != -EINTR && res != -EAGAIN) {
        client_free(client);
        return;
    }
    if (res > 0) {
        client->iov.iov_base = (char *)client->iov.iov_base + res;
        client->iov.iov_len -= (size_t)res;
    }
    if (client->iov.iov_len)
        ring_queue(client->server->options.ring, op);
    else if (client->handshake.state == NBD_HANDSHAKE_CLOSE)
        client_free(client);
    else if (client->handshake.state == NBD_HANDSHAKE_DONE)
        client_hand_over(client);
    else
        client_go_on(client); // clients send options without waiting
}

static void client_send(struct nbd_client *client)
{
    struct nbd_handshake *handshake = &client->handshake;

    client->iov = (struct iovec){.iov_base = handshake->out, .iov_len = handshake->out_len};
    client->msg = (struct msghdr){.msg_iov = &client->iov, .msg_iovlen = 1};
    handshake->out_len = 0;
    client->io_op =
        (struct ring_op){.done = client_sent, .code = RING_SENDMSG, .fd = client->fd, .msg = &client->msg};
    ring_queue(client->server->options.ring, &client->io_op);
}

static void client_received(struct ring_op *op, int res)
{
    struct nbd_client *client = container_of(op, struct nbd_client, io_op);

    if (res == -EINTR || res == -EAGAIN) {
        ring_queue(client->server->options.ring, op);
    } else if (res <= 0) {
        client_free(client);
    } else {
        client->in_len += (size_t)res;
        client_go_on(client);
    }
}

static void client_recv(struct nbd_client *client)
{
    client->io_op = (struct ring_op){
        .done = client_received,
        .code = RING_RECV,
        .fd = client->fd,
        .recv = {client->in + client->in_len, (uint32_t)(NBD_HANDSHAKE_IN_BYTES - client->in_len)},
    };
    ring_queue(client->server->options.ring, &client->io_op);
}

// One message at a time, and its answer before the next: what a client can make us keep is bounded.
static void client_go_on(struct nbd_client *client)
{
    struct nbd_handshake *handshake = &client->handshake;
    size_t used;

    do {
        used = nbd_handshake_input(handshake, client->in, client->in_len);
        client->in_len -= used;
        memmove(client->in, client->in + used, client->in_len);
    } while (used && !handshake->out_len && handshake->state == NBD_HANDSHAKE_GOES_ON);
    if (handshake->out_len)
        client_send(client);
    else if (handshake->state == NBD_HANDSHAKE_CLOSE)
        client_free(client);
    else
        client_recv(client);
}

static void client_timed_out(struct ring_op *op, int res)
{
    struct nbd_client *client = container_of(op, struct nbd_client, timer_op);

    (void)res;
    client->is_timer_set = false;
    shutdown(client->fd, SHUT_RDWR); // S3: what is in flight ends, and the client with it
}

static int client_create(struct nbd_server *server, int fd)
{
    struct nbd_client *client = calloc(1, sizeof(*client));
    socklen_t peer_len = sizeof(struct ucred);
    struct ucred peer;

    if (!client)
        return -ENOMEM;
    client->in = malloc(NBD_HANDSHAKE_IN_BYTES);
    if (!client->in ||
        nbd_handshake_begin(&client->handshake, server->options.devs, server->options.nr_devs) < 0) {
        free(client->in);
        free(client);
        return -ENOMEM;
    }
    client->server = server;
    client->fd = fd;
    if (!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_len))
        client->peer_pid = peer.pid;
    client->next = server->clients;
    client->at = &server->clients;
    if (client->next)
        client->next->at = &client->next;
    server->clients = client;
    server->nr_clients++;
    client->timer_op =
        (struct ring_op){.done = client_timed_out, .code = RING_TIMEOUT, .timeout_ns = HANDSHAKE_TIMEOUT_NS};
    client->is_timer_set = true;
    ring_queue(server->options.ring, &client->timer_op);
    client_send(client);
    return 0;
}

// ---- Listeners

static void listener_poll(struct nbd_listener *listener);

static void listener_pause_over(struct ring_op *op, int res)
{
    struct nbd_listener *listener = container_of(op, struct nbd_listener, pause_op);

    (void)res;
    listener->is_pausing = false;
    listener_poll(listener);
}

static void listener_pause(struct nbd_listener *listener)
{
    listener->is_pausing = true;
    listener->pause_op =
        (struct ring_op){.done = listener_pause_over, .code = RING_TIMEOUT, .timeout_ns = ACCEPT_PAUSE_NS};
    ring_queue(listener->server->options.ring, &listener->pause_op);
}

// TCP sizes its buffers by itself. A unix socket's default is less than what replies to one batch take,
// and each time it is full costs a sleep and a wake-up.
static void tune_unix_socket(int fd)
{
    int sndbuf_bytes = UNIX_SNDBUF_BYTES;

    if (!unix_socket_sndbuf(fd))
        return;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &sndbuf_bytes, sizeof(sndbuf_bytes)) < 0) // root only
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &sndbuf_bytes, sizeof(sndbuf_bytes));
}

// false: no more now.
static bool listener_accept(struct nbd_listener *listener)
{
    struct nbd_server *server = listener->server;
    int one = 1, fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0)
        return errno == EINTR || errno == ECONNABORTED;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); // fails on unix sockets: no harm
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    tune_unix_socket(fd);
    if (server->nr_clients >= server->options.max_connections || client_create(server, fd) < 0)
        close(fd);
    return true;
}

static void listener_ready(struct ring_op *op, int res)
{
    struct nbd_listener *listener = container_of(op, struct nbd_listener, poll_op);
    bool goes_on = true;

    (void)res;
    if (listener->server->is_stopping)
        return;
    // Not until nobody is left: in a storm, those who have gone again must be dealt with as well.
    for (unsigned i = 0; i < ACCEPT_BATCH && goes_on; i++)
        goes_on = listener_accept(listener);
    if (!goes_on && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS))
        listener_pause(listener);
    else
        listener_poll(listener);
}

static void listener_poll(struct nbd_listener *listener)
{
    listener->poll_op =
        (struct ring_op){.done = listener_ready, .code = RING_POLL, .fd = listener->fd, .events = POLLIN};
    ring_queue(listener->server->options.ring, &listener->poll_op);
}

static void server_add_listener(struct nbd_server *server, const struct transport_hold *hold)
{
    struct nbd_listener *listener = &server->listeners[server->nr_listeners++];
    char uri[512];

    *listener = (struct nbd_listener){.server = server, .fd = hold->fd, .is_ours = hold->addr};
    nbd_listen_uri(hold->fd, uri, sizeof(uri));
    log_verbose("nbd: listening on %s", uri);
    listener_poll(listener);
}

// ---- The server

static int nbd_hold(struct transport_hold *hold, const struct transport_hold_options *options,
                    struct err *err)
{
    (void)options;
    hold->fd = nbd_listen("--nbd", hold->addr, err);
    return hold->fd < 0 ? hold->fd : 0;
}

static void nbd_release(struct transport_hold *hold)
{
    if (hold->fd < 0) { // of a process that was killed
        if (!strncmp(hold->addr, "unix:", 5))
            unix_socket_remove_stale(hold->addr + 5);
        return;
    }
    if (hold->addr)
        unix_socket_unlisten(hold->fd);
    close(hold->fd);
}

static void nbd_uri(const struct transport_hold *hold, char *uri, unsigned uri_bytes)
{
    nbd_listen_uri(hold->fd, uri, uri_bytes);
}

static int nbd_busy(struct transport *transport, struct err *err)
{
    struct nbd_server *server = container_of(transport, struct nbd_server, transport);
    unsigned nr = 0;
    pid_t pid = 0;

    for (struct nbd_client *client = server->clients; client; client = client->next) {
        if (!client->conn)
            continue;
        nr++;
        if (client->peer_pid > 0)
            pid = client->peer_pid;
    }
    if (!nr)
        return 0;
    if (pid)
        return err_set(err, -EBUSY, "%u NBD %s connected (process %d)", nr,
                       nr == 1 ? "client is" : "clients are", (int)pid);
    return err_set(err, -EBUSY, "%u NBD %s connected", nr, nr == 1 ? "client is" : "clients are");
}

static void nbd_destroy(struct transport *transport)
{
    struct nbd_server *server = container_of(transport, struct nbd_server, transport);

    free(server->listeners);
    free(server);
}

static int nbd_start(struct transport **transport, const struct transport_options *options,
                     struct transport_hold *holds, unsigned nr_holds, struct err *err)
{
    struct nbd_server *server = calloc(1, sizeof(*server));

    if (!server || !(server->listeners = calloc(nr_holds, sizeof(*server->listeners)))) {
        free(server);
        return err_set(err, -ENOMEM, "nbd: out of memory");
    }
    server->options = *options;
    for (unsigned i = 0; i < nr_holds; i++)
        server_add_listener(server, &holds[i]);
    *transport = &server->transport;
    return 0;
}

static void stop_timed_out(struct ring_op *op, int res)
{
    struct nbd_server *server = container_of(op, struct nbd_server, stop_timer_op);

    (void)res;
    server->is_stop_timer_set = false;
    for (struct nbd_client *client = server->clients; client; client = client->next) {
        if (client->conn)
            nbd_conn_send(client->conn, &client->conn->abort_op);
    }
}

static void nbd_stop(struct transport *transport)
{
    struct nbd_server *server = container_of(transport, struct nbd_server, transport);

    server->is_stopping = true;
    for (unsigned i = 0; i < server->nr_listeners; i++) {
        struct nbd_listener *listener = &server->listeners[i];

        if (listener->is_pausing)
            ring_cancel_timeout(server->options.ring, &listener->pause_op);
        if (listener->is_ours) // else it goes on to listen for the next server
            unix_socket_unlisten(listener->fd);
    }
    for (struct nbd_client *client = server->clients; client; client = client->next) {
        if (client->conn)
            nbd_conn_send(client->conn, &client->conn->stop_op);
        else
            shutdown(client->fd, SHUT_RDWR); // S3
    }
    server->stop_timer_op =
        (struct ring_op){.done = stop_timed_out, .code = RING_TIMEOUT, .timeout_ns = STOP_TIMEOUT_NS};
    server->is_stop_timer_set = true;
    ring_queue(server->options.ring, &server->stop_timer_op);
    server_check_stopped(server);
}

const struct transport_ops nbd_transport_ops = {
    .name = "nbd",
    .takes_listen_fds = true,
    .hold = nbd_hold,
    .release = nbd_release,
    .start = nbd_start,
    .stop = nbd_stop,
    .destroy = nbd_destroy,
    .uri = nbd_uri,
    .busy = nbd_busy,
};

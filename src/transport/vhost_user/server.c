// The addresses that front-ends connect to, one at a time: the next one waits in the backlog. Cold, on
// the main thread.

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/device.h"
#include "transport/transport.h"
#include "transport/vhost_user/session.h"
#include "util/unix_socket.h"
#include "util/util.h"

// After accept() failed for want of file descriptors or memory.
#define ACCEPT_PAUSE_NS (NSEC_PER_SEC / 10)

struct server;

struct listener {
    struct server *server;
    const char *path;
    int fd;
    struct session *session; // at most one
    bool has_writeback;      // what its guest has chosen
    struct ring_op op;       // POLL, or TIMEOUT after an accept() that failed
};

struct server {
    struct transport transport;
    struct transport_options options;
    struct listener *listeners;
    unsigned nr_listeners;
    bool is_stopping, is_stopped;
};

static void listener_ready(struct ring_op *op, int res);

static void listener_wait(struct listener *listener)
{
    listener->op =
        (struct ring_op){.done = listener_ready, .code = RING_POLL, .fd = listener->fd, .events = POLLIN};
    ring_queue(listener->server->options.ring, &listener->op);
}

static void server_check_stopped(struct server *server)
{
    if (!server->is_stopping || server->is_stopped)
        return;
    for (unsigned i = 0; i < server->nr_listeners; i++) {
        if (server->listeners[i].session)
            return;
    }
    server->is_stopped = true;
    transport_stopped(&server->transport);
}

static void listener_session_closed(void *arg)
{
    struct listener *listener = arg;

    log_verbose("vhost-user: %s: the front-end has gone", listener->path);
    listener->session = NULL;
    if (!listener->server->is_stopping)
        listener_wait(listener);
    server_check_stopped(listener->server);
}

static void listener_paused(struct ring_op *op, int res)
{
    (void)res;
    listener_wait(container_of(op, struct listener, op));
}

static void listener_ready(struct ring_op *op, int res)
{
    struct listener *listener = container_of(op, struct listener, op);
    struct server *server = listener->server;
    int fd;

    (void)res;
    if (server->is_stopping)
        return;
    fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0)
        listener->session = session_create(fd, &(struct session_options){
                                                   .dev = server->options.devs[0],
                                                   .ring = server->options.ring,
                                                   .poll_ns = server->options.poll_ns,
                                                   .has_writeback = &listener->has_writeback,
                                                   .closed = listener_session_closed,
                                                   .arg = listener,
                                               });
    if (listener->session) {
        log_verbose("vhost-user: %s: a front-end has come", listener->path);
    } else if (fd >= 0 || errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        if (fd >= 0)
            close(fd);
        listener->op =
            (struct ring_op){.done = listener_paused, .code = RING_TIMEOUT, .timeout_ns = ACCEPT_PAUSE_NS};
        ring_queue(server->options.ring, &listener->op);
    } else {
        listener_wait(listener);
    }
}

static int vhost_user_hold(struct transport_hold *hold, const struct transport_hold_options *options,
                           struct err *err)
{
    (void)options;
    hold->fd = unix_socket_listen("--vhost-user: ", hold->addr, err);
    return hold->fd < 0 ? hold->fd : 0;
}

static void vhost_user_release(struct transport_hold *hold)
{
    if (hold->fd < 0) { // of a process that was killed
        unix_socket_remove_stale(hold->addr);
        return;
    }
    unix_socket_unlisten(hold->fd);
    close(hold->fd);
}

static int vhost_user_start(struct transport **transport, const struct transport_options *options,
                            struct transport_hold *holds, unsigned nr_holds, struct err *err)
{
    struct server *server = calloc(1, sizeof(*server));

    if (!server || !(server->listeners = calloc(nr_holds, sizeof(*server->listeners)))) {
        free(server);
        return err_set(err, -ENOMEM, "vhost-user: out of memory");
    }
    server->options = *options;
    server->nr_listeners = nr_holds;
    for (unsigned i = 0; i < nr_holds; i++) {
        struct listener *listener = &server->listeners[i];

        *listener = (struct listener){.server = server,
                                      .path = holds[i].addr,
                                      .fd = holds[i].fd,
                                      .has_writeback = true};
        log_verbose("vhost-user: listening on %s", listener->path);
        listener_wait(listener);
    }
    *transport = &server->transport;
    return 0;
}

static void vhost_user_stop(struct transport *transport)
{
    struct server *server = container_of(transport, struct server, transport);

    server->is_stopping = true;
    for (unsigned i = 0; i < server->nr_listeners; i++) {
        if (server->listeners[i].session)
            session_close(server->listeners[i].session);
    }
    server_check_stopped(server);
}

static void vhost_user_destroy(struct transport *transport)
{
    struct server *server = container_of(transport, struct server, transport);

    free(server->listeners);
    free(server);
}

static int vhost_user_busy(struct transport *transport, struct err *err)
{
    struct server *server = container_of(transport, struct server, transport);

    for (unsigned i = 0; i < server->nr_listeners; i++) {
        if (server->listeners[i].session)
            return err_set(err, -EBUSY, "a virtual machine is connected to %s", server->listeners[i].path);
    }
    return 0;
}

static int vhost_user_device_changed(struct transport *transport, struct device *dev, struct err *err)
{
    struct server *server = container_of(transport, struct server, transport);

    (void)err;
    for (unsigned i = 0; dev == server->options.devs[0] && i < server->nr_listeners; i++) {
        if (server->listeners[i].session)
            session_device_changed(server->listeners[i].session);
    }
    return 0;
}

const struct transport_ops vhost_user_transport_ops = {
    .name = "vhost-user",
    .hold = vhost_user_hold,
    .release = vhost_user_release,
    .start = vhost_user_start,
    .stop = vhost_user_stop,
    .destroy = vhost_user_destroy,
    .busy = vhost_user_busy,
    .device_changed = vhost_user_device_changed,
};

#include "control/http.h"

#include <dlfcn.h>
#include <errno.h>
#include <microhttpd.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "control/metrics.h"
#include "transport/nbd/listen.h"
#include "util/util.h"

#define LIBRARY "libmicrohttpd.so.12"
#define MAX_CONNECTIONS 32
#define TIMEOUT_SEC 10
#define LOOK_NS NSEC_PER_SEC // for its time-outs

// Loaded where --metrics is asked for: the library brings GnuTLS and eight more, and their relocations and
// constructors were half of the time that any bight took to start (bench/NOTES.md).
#define FUNCTIONS(of)                                                                            \
    of(start_daemon) of(stop_daemon) of(run) of(get_daemon_info) of(create_response_from_buffer) \
        of(add_response_header) of(queue_response) of(destroy_response)
#define POINTER(name) __typeof__ (&MHD_##name)(name);
#define LOOK_UP(name) &&(mhd.name = (__typeof__(mhd.name))dlsym(library, "MHD_" #name))
static struct {
    FUNCTIONS(POINTER)
} mhd;

struct http {
    struct MHD_Daemon *daemon;
    struct device *dev;
    struct ring *ring;
    int epoll_fd;
    bool is_stopping;
    struct ring_op poll_op, timer_op;
};

static enum MHD_Result http_send(struct MHD_Connection *connection, unsigned status, char *text)
{
    struct MHD_Response *response =
        mhd.create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
    enum MHD_Result ret;

    if (!response) {
        free(text);
        return MHD_NO;
    }
    mhd.add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE,
                            status == MHD_HTTP_OK
                                ? "application/openmetrics-text; version=1.0.0; charset=utf-8"
                                : "text/plain");
    ret = mhd.queue_response(connection, status, response);
    mhd.destroy_response(response);
    return ret;
}

static enum MHD_Result http_answer(void *arg, struct MHD_Connection *connection, const char *url,
                                   const char *method, const char *version, const char *data,
                                   size_t *data_bytes, void **state)
{
    struct http *http = arg;
    bool is_known = !strcmp(url, "/metrics") || !strcmp(url, "/");
    char *text;

    (void)version;
    (void)data;
    (void)state;
    *data_bytes = 0;
    if (strcmp(method, MHD_HTTP_METHOD_GET) && strcmp(method, MHD_HTTP_METHOD_HEAD))
        return MHD_NO;
    text = is_known ? metrics_text(http->dev) : strdup("GET /metrics\n");
    return text ? http_send(connection, is_known ? MHD_HTTP_OK : MHD_HTTP_NOT_FOUND, text) : MHD_NO;
}

static void http_ready(struct ring_op *op, int res)
{
    struct http *http = container_of(op, struct http, poll_op);

    (void)res;
    if (http->is_stopping)
        return;
    mhd.run(http->daemon);
    ring_queue(http->ring, op);
}

static void http_look(struct ring_op *op, int res)
{
    struct http *http = container_of(op, struct http, timer_op);

    (void)res;
    mhd.run(http->daemon);
    op->timeout_ns = LOOK_NS;
    ring_queue(http->ring, op);
}

static bool http_load(void)
{
    void *library = dlopen(LIBRARY, RTLD_NOW);

    return library FUNCTIONS(LOOK_UP);
}

int http_listen(const char *addr, struct err *err)
{
    return nbd_listen("--metrics", addr, err);
}

int http_start(struct http **http_out, int fd, struct ring *ring, struct device *dev, struct err *err)
{
    struct http *http = calloc(1, sizeof(*http));
    const union MHD_DaemonInfo *info;
    int own_fd = dup(fd), ret = err_set(err, -EIO, "--metrics: the HTTP server does not start; leave it out");

    if (!http || own_fd < 0)
        goto out;
    if (!http_load()) {
        ret = err_set(err, -ENOENT, "--metrics: %s: install it (Debian: libmicrohttpd12)", dlerror());
        goto out;
    }
    http->dev = dev;
    http->ring = ring;
    http->daemon = mhd.start_daemon(MHD_USE_EPOLL, 0, NULL, NULL, http_answer, http, MHD_OPTION_LISTEN_SOCKET,
                                    own_fd, MHD_OPTION_CONNECTION_LIMIT, (unsigned)MAX_CONNECTIONS,
                                    MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)TIMEOUT_SEC, MHD_OPTION_END);
    info = http->daemon ? mhd.get_daemon_info(http->daemon, MHD_DAEMON_INFO_EPOLL_FD) : NULL;
    if (!info)
        goto out;
    http->epoll_fd = info->epoll_fd;
    http->poll_op =
        (struct ring_op){.done = http_ready, .code = RING_POLL, .fd = http->epoll_fd, .events = POLLIN};
    http->timer_op = (struct ring_op){.done = http_look, .code = RING_TIMEOUT, .timeout_ns = LOOK_NS};
    ring_queue(ring, &http->poll_op);
    ring_queue(ring, &http->timer_op);
    *http_out = http;
    return 0;
out:
    if (own_fd >= 0)
        close(own_fd);
    free(http);
    return ret;
}

void http_stop(struct http *http)
{
    http->is_stopping = true;
    ring_cancel_timeout(http->ring, &http->timer_op);
}

void http_destroy(struct http *http)
{
    mhd.stop_daemon(http->daemon);
    free(http);
}

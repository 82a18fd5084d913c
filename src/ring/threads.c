// The ring for machines that forbid io_uring: sockets by epoll, files by the worker threads. Nothing
// here is fast for its own sake; it has to be right and to behave as uring.c does.
//
// Socket operations are tried at once in the next turn, and wait in epoll after EAGAIN. A file
// descriptor has at most one operation that waits to read (RECV, POLL) and one that waits to write.

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ring/ring.h"
#include "ring/workers.h"
#include "util/util.h"

struct threads_fd {
    struct ring_op *reader, *writer;
    bool is_in_epoll;
};

struct threads {
    struct ring ring;
    int epoll_fd;
    struct ring_op *ready, **ready_tail; // to be tried in the next turn
    struct threads_fd *fds;              // by number
    int nr_fds;
    aio_context_t aio; // 0: none yet, or there is none to be had
    int null_fd;       // for aio; -1: nor that
    bool has_tried_aio;
};

static struct threads_fd *threads_fd(struct threads *threads, int fd)
{
    if (fd >= threads->nr_fds) {
        int nr_fds = max_of(2 * threads->nr_fds, fd + 1);
        struct threads_fd *fds = realloc(threads->fds, (size_t)nr_fds * sizeof(*fds));

        if (!fds)
            return NULL;
        memset(fds + threads->nr_fds, 0, (size_t)(nr_fds - threads->nr_fds) * sizeof(*fds));
        threads->fds = fds;
        threads->nr_fds = nr_fds;
    }
    return &threads->fds[fd];
}

static int threads_update_epoll(struct threads *threads, int fd, struct threads_fd *state)
{
    struct epoll_event event = {.data.fd = fd};

    if (state->reader)
        event.events |= state->reader->code == RING_POLL ? state->reader->events : EPOLLIN;
    if (state->writer)
        event.events |= EPOLLOUT;
    event.events |= EPOLLONESHOT;
    if (epoll_ctl(threads->epoll_fd, state->is_in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) < 0)
        return -errno;
    state->is_in_epoll = true;
    return 0;
}

// Of a file descriptor's two places.
static bool op_is_writer(const struct ring_op *op)
{
    return op->code == RING_SENDMSG || op->code == RING_EVENT_SIGNAL ||
           (op->code == RING_POLL && op->events == POLLOUT);
}

static int threads_park(struct threads *threads, struct ring_op *op)
{
    struct threads_fd *state = threads_fd(threads, op->fd);
    struct ring_op **at;
    int ret;

    if (!state)
        return -ENOMEM;
    at = op_is_writer(op) ? &state->writer : &state->reader;
    assert(!*at);
    *at = op;
    ret = threads_update_epoll(threads, op->fd, state);
    if (ret < 0)
        *at = NULL; // it is done, with that
    return ret;
}

// The system has a number of them (fs.aio-max-nr), so only who needs one has one.
static void threads_make_aio(struct threads *threads)
{
    threads->has_tried_aio = true;
    if (threads->null_fd >= 0 && syscall(SYS_io_setup, 1, &threads->aio) < 0)
        threads->aio = 0;
}

// An eventfd's write knows no RWF_NOWAIT, and who shares it may fill it between a look at it and the write.
// What an AIO says to an eventfd when it ends never waits: here, one that has nothing to do.
static int threads_signal(struct threads *threads, int fd)
{
    struct iocb iocb = {.aio_lio_opcode = IOCB_CMD_PREAD,
                        .aio_flags = IOCB_FLAG_RESFD,
                        .aio_resfd = (uint32_t)fd};
    struct iocb *list = &iocb;
    uint64_t count = 1;
    struct io_event event;

    if (!threads->has_tried_aio)
        threads_make_aio(threads);
    iocb.aio_fildes = (uint32_t)threads->null_fd;
    if (!threads->aio) // forbidden as well, or all are taken
        return write(fd, &count, sizeof(count)) < 0 ? -errno : (int)sizeof(count);
    if (syscall(SYS_io_submit, threads->aio, 1, &list) != 1)
        return -errno; // -EINVAL: that is no eventfd
    syscall(SYS_io_getevents, threads->aio, 1, 1, &event, NULL);
    return sizeof(count);
}

// -EAGAIN: not yet.
static int threads_try_socket(struct threads *threads, struct ring_op *op)
{
    struct pollfd pfd = {.fd = op->fd, .events = (short)op->events};
    uint64_t count = 1;
    struct iovec iov = {&count, sizeof(count)};
    ssize_t n;

    switch (op->code) {
    case RING_RECV:
        n = recv(op->fd, op->recv.buf, op->recv.len_bytes, MSG_DONTWAIT);
        break;
    case RING_SENDMSG:
        n = sendmsg(op->fd, op->msg, MSG_DONTWAIT | MSG_NOSIGNAL);
        break;
    case RING_EVENT_WAIT:
        n = preadv2(op->fd, &iov, 1, -1, RWF_NOWAIT);
        break;
    case RING_EVENT_SIGNAL:
        pfd.events = POLLOUT;
        return poll(&pfd, 1, 0) > 0 ? threads_signal(threads, op->fd) : -EAGAIN;
    default:
        n = poll(&pfd, 1, 0);
        if (n > 0)
            return pfd.revents;
        return n < 0 && errno != EINTR ? -errno : -EAGAIN;
    }
    if (n >= 0)
        return (int)n;
    return errno == EINTR ? -EAGAIN : -errno;
}

// true: op is done.
static bool threads_try(struct threads *threads, struct ring_op *op)
{
    int res = threads_try_socket(threads, op);

    if (res == -EAGAIN) {
        res = threads_park(threads, op);
        if (!res)
            return false;
    }
    op->done(op, res);
    return true;
}

static void threads_queue(struct ring *ring, struct ring_op *op)
{
    struct threads *threads = container_of(ring, struct threads, ring);

    op->next = NULL;
    switch (op->code) {
    case RING_READ:
    case RING_WRITE:
    case RING_FSYNC:
        workers_submit(op);
        break;
    case RING_CMD:
        ring_post(ring, op, -EOPNOTSUPP);
        break;
    default:
        *threads->ready_tail = op;
        threads->ready_tail = &op->next;
    }
}

// true: something is done.
static bool threads_try_ready(struct threads *threads)
{
    struct ring_op *op = threads->ready, *next;
    bool is_any_done = false;

    threads->ready = NULL;
    threads->ready_tail = &threads->ready;
    for (; op; op = next) {
        next = op->next; // R3
        is_any_done |= threads_try(threads, op);
    }
    return is_any_done;
}

static void threads_dispatch(struct threads *threads, const struct epoll_event *event)
{
    int fd = event->data.fd;
    struct threads_fd *state = &threads->fds[fd];
    struct ring_op *reader = state->reader, *writer = state->writer;
    uint64_t count;

    if (fd == threads->ring.wake_fd) {
        if (read(fd, &count, sizeof(count)) < 0)
            assert(errno == EAGAIN);
        ring_drain_inbox(&threads->ring);
        return;
    }
    // Both are tried, and parked again if need be: one shot disarmed both.
    state->reader = state->writer = NULL;
    if (reader)
        threads_try(threads, reader);
    if (writer)
        threads_try(threads, writer);
}

static int threads_wait(struct ring *ring, uint64_t timeout_ns)
{
    struct threads *threads = container_of(ring, struct threads, ring);
    struct epoll_event events[64];
    int timeout_ms, n;

    if (threads_try_ready(threads) || threads->ready || ring->hooks)
        timeout_ms = 0;
    else if (timeout_ns == UINT64_MAX)
        timeout_ms = -1;
    else
        timeout_ms = (int)min_of((timeout_ns + 999999) / 1000000, 1000000);
    n = epoll_wait(threads->epoll_fd, events, ARRAY_SIZE(events), timeout_ms);
    if (n < 0 && errno != EINTR)
        return -errno;
    ring->now_ns = util_now_ns();
    for (int i = 0; i < n; i++)
        threads_dispatch(threads, &events[i]);
    return 0;
}

static void threads_cancel(struct ring *ring, struct ring_op *op)
{
    struct threads *threads = container_of(ring, struct threads, ring);
    struct threads_fd *state = threads_fd(threads, op->fd);
    int res;

    if (state && state->reader == op)
        state->reader = NULL;
    if (state && state->writer == op)
        state->writer = NULL;
    threads->ready_tail = &threads->ready;
    for (struct ring_op **at = &threads->ready; *at;) {
        if (*at == op) {
            *at = op->next;
        } else {
            at = &(*at)->next;
            threads->ready_tail = at;
        }
    }
    res = threads_try_socket(threads, op);                  // it may not have been tried yet
    ring_post(ring, op, res == -EAGAIN ? -ECANCELED : res); // R2: not from in here
}

static void threads_remove_fd(struct ring *ring, int fd)
{
    struct threads *threads = container_of(ring, struct threads, ring);
    struct threads_fd *state = fd < threads->nr_fds ? &threads->fds[fd] : NULL;

    if (!state || !state->is_in_epoll)
        return;
    assert(!state->reader && !state->writer);
    epoll_ctl(threads->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    state->is_in_epoll = false;
}

static int threads_create(struct ring **ring, struct err *err)
{
    struct threads *threads = calloc(1, sizeof(*threads));
    struct epoll_event wake = {.events = EPOLLIN};
    int ret;

    if (!threads)
        return err_set(err, -ENOMEM, "ring: threads: out of memory");
    ret = ring_init(&threads->ring, &ring_threads_ops);
    if (ret < 0)
        goto out_free;
    threads->ready_tail = &threads->ready;
    threads->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (threads->epoll_fd < 0) {
        ret = -errno;
        goto out_ring;
    }
    wake.data.fd = threads->ring.wake_fd;
    if (!threads_fd(threads, threads->ring.wake_fd)) {
        ret = -ENOMEM;
        goto out_epoll;
    }
    if (epoll_ctl(threads->epoll_fd, EPOLL_CTL_ADD, threads->ring.wake_fd, &wake) < 0) {
        ret = -errno;
        goto out_epoll;
    }
    threads->null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    threads->ring.mode = "epoll and worker threads";
    *ring = &threads->ring;
    return 0;

out_epoll:
    free(threads->fds);
    close(threads->epoll_fd);
out_ring:
    ring_exit(&threads->ring);
out_free:
    free(threads);
    return err_set(err, ret, "ring: threads: epoll: %s", strerror(-ret));
}

static void threads_destroy(struct ring *ring)
{
    struct threads *threads = container_of(ring, struct threads, ring);

    if (threads->aio)
        syscall(SYS_io_destroy, threads->aio);
    if (threads->null_fd >= 0)
        close(threads->null_fd);
    close(threads->epoll_fd);
    free(threads->fds);
    ring_exit(ring);
    free(threads);
}

const struct ring_ops ring_threads_ops = {
    .name = "threads",
    .create = threads_create,
    .destroy = threads_destroy,
    .queue = threads_queue,
    .wait = threads_wait,
    .cancel = threads_cancel,
    .remove_fd = threads_remove_fd,
};

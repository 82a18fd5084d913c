// The kernel's side of a FUSE channel: a socket of messages in the place of /dev/fuse. Used by unit tests and
// fuzzers alike, so it reports instead of asserting.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/fuse/fuse.h"
#include "util/util.h"

#define KERNEL_PAYLOAD_BYTES (64 * 1024)
#define KERNEL_PATIENCE_MS 30000

struct kernel {
    int fd, chan_fd;
    struct ring *main_ring;
    struct fuse_chan chan;
    bool is_over;
    _Alignas(8) uint8_t in[sizeof(struct fuse_out_header) + KERNEL_PAYLOAD_BYTES]; // the last answer
    size_t in_bytes;
};

static inline void kernel_chan_over(struct ring_op *op, int res)
{
    struct fuse_chan *chan = container_of(op, struct fuse_chan, over_op);

    (void)res;
    container_of(chan, struct kernel, chan)->is_over = true;
}

static inline bool kernel_begin(struct kernel *kernel, struct device *dev, struct ring *main_ring)
{
    int fds[2], bytes = 1 << 20;

    memset(kernel, 0, sizeof(*kernel));
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) < 0)
        return false;
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    kernel->fd = fds[0];
    kernel->chan_fd = fds[1];
    kernel->main_ring = main_ring;
    if (fuse_chan_create(&kernel->chan, dev, &dev->queues[0], fds[1], KERNEL_PAYLOAD_BYTES) < 0)
        return false;
    kernel->chan.main_ring = main_ring;
    kernel->chan.over_op.done = kernel_chan_over;
    ring_post(kernel->chan.queue->ring, &kernel->chan.start_op, 0);
    return true;
}

// Also when a signal comes, as that of libFuzzer's timer. false: not in time.
static inline bool kernel_wait(const struct kernel *kernel, short events, int patience_ms)
{
    struct pollfd pfd = {.fd = kernel->fd, .events = events};
    int n;

    do {
        n = poll(&pfd, 1, patience_ms);
    } while (n < 0 && errno == EINTR);
    return n == 1;
}

// header.len is told as it is given, whatever is sent.
static inline bool kernel_send(const struct kernel *kernel, struct fuse_in_header header, const void *args,
                               size_t args_bytes)
{
    struct iovec iov[] = {{&header, sizeof(header)}, {(void *)(uintptr_t)args, args_bytes}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};

    return kernel_wait(kernel, POLLOUT, KERNEL_PATIENCE_MS) && sendmsg(kernel->fd, &msg, MSG_NOSIGNAL) >= 0;
}

// The next answer: its header at kernel->in. false: none, or one that is not as long as it says.
static inline bool kernel_receive(struct kernel *kernel, int patience_ms)
{
    const struct fuse_out_header *out = (const struct fuse_out_header *)(const void *)kernel->in;
    ssize_t n;

    if (!kernel_wait(kernel, POLLIN, patience_ms))
        return false;
    n = recv(kernel->fd, kernel->in, sizeof(kernel->in), 0);
    kernel->in_bytes = n > 0 ? (size_t)n : 0;
    return kernel->in_bytes >= sizeof(*out) && out->len == kernel->in_bytes && out->error <= 0 &&
           out->error > -4096;
}

static inline void kernel_patience_over(struct ring_op *op, int res)
{
    (void)res;
    op->fd = -1;
}

// The channel stops and is gone. false: it does not come to its end.
static inline bool kernel_end(struct kernel *kernel)
{
    struct ring_op patience = {.done = kernel_patience_over,
                               .code = RING_TIMEOUT,
                               .timeout_ns = KERNEL_PATIENCE_MS * 1000000ULL};

    ring_queue(kernel->main_ring, &patience);
    ring_post(kernel->chan.queue->ring, &kernel->chan.stop_op, 0);
    while (!kernel->is_over && patience.fd != -1) {
        if (ring_run(kernel->main_ring) < 0)
            return false;
    }
    ring_cancel_timeout(kernel->main_ring, &patience);
    return kernel->is_over;
}

// After the queue's thread has ended, or has nothing to do with the channel any more.
static inline void kernel_free(struct kernel *kernel)
{
    fuse_chan_destroy(&kernel->chan);
    close(kernel->fd);
    close(kernel->chan_fd);
}

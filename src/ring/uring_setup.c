// The io_uring ring, cold part: what the kernel can do is asked step by step.

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "ring/uring.h"
#include "util/util.h"

static void uring_woken(struct ring_op *op, int res)
{
    struct uring *uring = container_of(op, struct uring, wake_op);

    (void)res; // whatever it was: look, and wait again
    uring_arm_wake(uring);
    ring_drain_inbox(&uring->ring);
}

static void uring_retry_cancels(struct ring_op *op, int res)
{
    struct uring *uring = container_of(op, struct uring, retry_op);

    (void)res;
    uring->is_retry_set = false;
    for (struct ring_op *asked = uring->cancels; asked; asked = asked->next)
        uring_queue_cancel(uring, asked);
}

static void uring_cancelled(struct ring_op *op, int res)
{
    struct uring *uring = container_of(op, struct uring, cancel_op);

    if (res >= 0 || !uring->cancels || uring->is_retry_set)
        return;
    uring->is_retry_set = true;
    uring->retry_op.timeout_ns = URING_RETRY_NS;
    ring_queue(&uring->ring, &uring->retry_op);
}

// Best first: completions run only when the owner asks for them, and nobody else submits (6.1);
// at least no interrupts of the owner by completions, and submissions with room for a command's data
// (5.19); any kernel that has io_uring.
static int uring_init_queue(struct uring *uring, const char **mode)
{
    static const struct {
        unsigned flags;
        const char *mode;
    } tries[] = {
        {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
             IORING_SETUP_SQE128,
         "single issuer, deferred task run"},
        {IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SQE128, "cooperative task run"},
        {0, "plain"},
    };
    int ret = -EINVAL;

    for (unsigned i = 0; i < ARRAY_SIZE(tries) && ret == -EINVAL; i++) {
        struct io_uring_params params = {
            .flags = tries[i].flags | IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE,
            .cq_entries = URING_CQ_ENTRIES,
        };

        ret = io_uring_queue_init_params(URING_SQ_ENTRIES, &uring->io, &params);
        *mode = tries[i].mode;
        uring->has_taskrun_flag = tries[i].flags & IORING_SETUP_TASKRUN_FLAG;
    }
    return ret;
}

// Which entry of pins is fd; -1: a free one. URING_MAX_PINS: none.
static unsigned uring_find_pin(const struct uring *uring, int fd)
{
    unsigned i = 0;

    while (i < URING_MAX_PINS && uring->pins[i] != fd)
        i++;
    return i;
}

// The slot for the i-th pin: behind those of low file descriptors.
static unsigned uring_pin_slot(const struct uring *uring, unsigned i)
{
    return uring->nr_files - URING_MAX_PINS + i;
}

static void uring_add_fd(struct ring *ring, int fd, bool must_be_held)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    unsigned pin;

    if (fd < URING_MAX_FDS && (unsigned)fd < uring->nr_files) {
        uring->is_fd_fixed[fd] = io_uring_register_files_update(&uring->io, (unsigned)fd, &fd, 1) == 1;
        return;
    }
    pin = uring_find_pin(uring, -1);
    if (must_be_held && pin < URING_MAX_PINS &&
        io_uring_register_files_update(&uring->io, uring_pin_slot(uring, pin), &fd, 1) == 1)
        uring->pins[pin] = fd;
}

static void uring_remove_fd(struct ring *ring, int fd)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    unsigned pin;
    int none = -1;

    if (fd < URING_MAX_FDS && uring->is_fd_fixed[fd]) {
        io_uring_register_files_update(&uring->io, (unsigned)fd, &none, 1);
        uring->is_fd_fixed[fd] = false;
        return;
    }
    pin = uring_find_pin(uring, fd);
    if (pin == URING_MAX_PINS)
        return;
    io_uring_register_files_update(&uring->io, uring_pin_slot(uring, pin), &none, 1);
    uring->pins[pin] = -1;
}

static int uring_add_buf(struct ring *ring, void *buf, size_t len_bytes)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    struct iovec iov = {.iov_base = buf, .iov_len = len_bytes};
    __u64 tag = 0;

    if (len_bytes > uring->buf_bytes_left)
        return -1;
    for (int i = 0; i < URING_MAX_BUFS; i++) {
        if (uring->buf_bytes[i])
            continue;
        if (io_uring_register_buffers_update_tag(&uring->io, (unsigned)i, &iov, &tag, 1) != 1) {
            // RLIMIT_MEMLOCK, most likely. The attempt has touched all of buf: once is enough.
            uring->buf_bytes_left = 0;
            return -1;
        }
        uring->buf_bytes[i] = len_bytes;
        uring->buf_bytes_left -= len_bytes;
        return i;
    }
    return -1;
}

static void uring_remove_buf(struct ring *ring, int buf_index)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    struct iovec none = {0};
    __u64 tag = 0;

    io_uring_register_buffers_update_tag(&uring->io, (unsigned)buf_index, &none, &tag, 1);
    uring->buf_bytes_left += uring->buf_bytes[buf_index];
    uring->buf_bytes[buf_index] = 0;
}

// The table cannot grow: it is made anew, which needs it to be empty.
static int uring_reserve_bufs(struct ring *ring, unsigned nr)
{
    struct uring *uring = container_of(ring, struct uring, ring);

    if (!uring->has_buffers || uring->has_reserved_bufs)
        return -1;
    for (unsigned i = 0; i < URING_MAX_BUFS; i++) {
        if (uring->buf_bytes[i])
            return -1;
    }
    io_uring_unregister_buffers(&uring->io);
    uring->has_reserved_bufs = !io_uring_register_buffers_sparse(&uring->io, URING_MAX_BUFS + nr);
    if (uring->has_reserved_bufs)
        return URING_MAX_BUFS;
    uring->buf_bytes_left = 0;
    uring->has_buffers = false;
    return -1;
}

// What a ring may register.
static size_t uring_buf_bytes(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_MEMLOCK, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY)
        return URING_MAX_BUF_BYTES;
    return min_of(URING_MAX_BUF_BYTES, limit.rlim_cur / URING_MEMLOCK_SHARE);
}

// R6 is kept by registered files, so there have to be some: Linux 5.19, and as many as the process may open.
static int uring_register_files(struct uring *uring)
{
    struct rlimit limit;

    for (unsigned i = 0; i < URING_MAX_PINS; i++)
        uring->pins[i] = -1;
    uring->nr_files = URING_MAX_FDS + URING_MAX_PINS;
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_max < uring->nr_files)
        uring->nr_files = (unsigned)limit.rlim_max; // then there are no high ones
    return io_uring_register_files_sparse(&uring->io, uring->nr_files);
}

static int uring_create(struct ring **ring, struct err *err)
{
    struct uring *uring = calloc(1, sizeof(*uring));
    const char *mode;
    int ret;

    if (!uring)
        return err_set(err, -ENOMEM, "ring: uring: out of memory");
    ret = ring_init(&uring->ring, &ring_uring_ops);
    if (ret < 0) {
        err_set(err, ret, "ring: uring: eventfd: %s", strerror(-ret));
        goto out_free;
    }
    ret = uring_init_queue(uring, &mode);
    if (ret < 0) {
        err_set(err, ret, "ring: uring: io_uring_setup: %s; allow io_uring here, or use --ring threads",
                strerror(-ret));
        goto out_ring;
    }
    uring->cmd_bytes = uring->io.flags & IORING_SETUP_SQE128 ? RING_CMD_BYTES : 16;
    ret = uring_register_files(uring);
    if (ret < 0) {
        err_set(err, ret, "ring: uring: registering files: %s; use --ring threads", strerror(-ret));
        goto out_queue;
    }
    uring->has_buffers = !io_uring_register_buffers_sparse(&uring->io, URING_MAX_BUFS);
    uring->buf_bytes_left = uring->has_buffers ? uring_buf_bytes() : 0;
    io_uring_register_ring_fd(&uring->io); // saves a look-up per enter; an error costs nothing
    snprintf(uring->mode, sizeof(uring->mode), "%s, registered files%s", mode,
             uring->has_buffers ? ", registered buffers" : "");
    uring->ring.mode = uring->mode;
    uring->cancel_op = (struct ring_op){.done = uring_cancelled, .code = RING_POLL};
    uring->retry_op = (struct ring_op){.done = uring_retry_cancels, .code = RING_TIMEOUT};
    uring->wake_op =
        (struct ring_op){.done = uring_woken, .code = RING_EVENT_WAIT, .fd = uring->ring.wake_fd};
    uring_arm_wake(uring);
    *ring = &uring->ring;
    return 0;

out_queue:
    io_uring_queue_exit(&uring->io);
out_ring:
    ring_exit(&uring->ring);
out_free:
    free(uring);
    return ret;
}

static void uring_destroy(struct ring *ring)
{
    struct uring *uring = container_of(ring, struct uring, ring);

    io_uring_queue_exit(&uring->io);
    ring_exit(ring);
    free(uring);
}

const struct ring_ops ring_uring_ops = {
    .name = "uring",
    .create = uring_create,
    .destroy = uring_destroy,
    .queue = uring_queue,
    .wait = uring_wait,
    .poll = uring_poll,
    .cancel = uring_cancel,
    .add_fd = uring_add_fd,
    .remove_fd = uring_remove_fd,
    .add_buf = uring_add_buf,
    .remove_buf = uring_remove_buf,
    .reserve_bufs = uring_reserve_bufs,
};

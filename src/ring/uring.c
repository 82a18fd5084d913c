// The io_uring ring, hot part: one io_uring_enter a turn submits all that was queued and reaps all
// that has finished.

#include "ring/uring.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#include "util/util.h"

static const uint64_t uring_event_one = 1;

static struct io_uring_sqe *uring_get_sqe(struct uring *uring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->io);

    // The submission queue is full: what it holds can go now, completions are not touched by this.
    while (!sqe) {
        io_uring_submit(&uring->io);
        sqe = io_uring_get_sqe(&uring->io);
    }
    return sqe;
}

static void uring_prep_rw(struct io_uring_sqe *sqe, const struct ring_op *op)
{
    const struct iovec *iov = op->rw.iov;
    bool is_read = op->code == RING_READ;
    __u64 offset = op->rw.offset_bytes;

    if (op->rw.nr_iov != 1) {
        if (is_read)
            io_uring_prep_readv2(sqe, op->fd, iov, op->rw.nr_iov, offset, op->rw_flags);
        else
            io_uring_prep_writev2(sqe, op->fd, iov, op->rw.nr_iov, offset, op->rw_flags);
        return;
    }
    if (op->buf_index >= 0) {
        if (is_read)
            io_uring_prep_read_fixed(sqe, op->fd, iov->iov_base, (unsigned)iov->iov_len, offset,
                                     op->buf_index);
        else
            io_uring_prep_write_fixed(sqe, op->fd, iov->iov_base, (unsigned)iov->iov_len, offset,
                                      op->buf_index);
    } else {
        if (is_read)
            io_uring_prep_read(sqe, op->fd, iov->iov_base, (unsigned)iov->iov_len, offset);
        else
            io_uring_prep_write(sqe, op->fd, iov->iov_base, (unsigned)iov->iov_len, offset);
    }
    sqe->rw_flags = op->rw_flags;
}

static void uring_prep_cmd(struct io_uring_sqe *sqe, const struct ring_op *op)
{
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, op->fd, op->cmd.addr, op->cmd.len, 0);
    sqe->cmd_op = op->cmd.op;
    memcpy(sqe->cmd, op->cmd.data, op->cmd.data_bytes);
}

void uring_queue(struct ring *ring, struct ring_op *op)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    struct io_uring_sqe *sqe;

    if (op->code == RING_CMD && op->cmd.data_bytes > uring->cmd_bytes) {
        ring_post(ring, op, -EOPNOTSUPP);
        return;
    }
    sqe = uring_get_sqe(uring);
    switch (op->code) {
    case RING_READ:
    case RING_WRITE:
        uring->nr_io++;
        uring_prep_rw(sqe, op);
        break;
    case RING_FSYNC:
        uring->nr_io++;
        io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
        break;
    case RING_RECV:
        io_uring_prep_recv(sqe, op->fd, op->recv.buf, op->recv.len_bytes, 0);
        break;
    case RING_SENDMSG:
        // MSG_WAITALL: the kernel goes on after a short send (since 5.19; others see a short res).
        io_uring_prep_sendmsg(sqe, op->fd, op->msg, MSG_NOSIGNAL | MSG_WAITALL);
        break;
    case RING_POLL:
        io_uring_prep_poll_add(sqe, op->fd, op->events);
        break;
    case RING_EVENT_WAIT:
        io_uring_prep_read(sqe, op->fd, &uring->event_count, sizeof(uring->event_count), 0);
        break;
    case RING_EVENT_SIGNAL:
        io_uring_prep_write(sqe, op->fd, &uring_event_one, sizeof(uring_event_one), 0);
        break;
    case RING_CMD:
        uring_prep_cmd(sqe, op);
        break;
    case RING_TIMEOUT:
    case RING_CALL:
        __builtin_unreachable(); // ring_queue() does these
    }
    if (op->fd < URING_MAX_FDS && uring->is_fd_fixed[op->fd])
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, op);
}

void uring_arm_wake(struct uring *uring)
{
    uring_queue(&uring->ring, &uring->wake_op);
}

static int uring_wait_for(struct uring *uring, unsigned nr, uint64_t timeout_ns)
{
    struct __kernel_timespec ts = {.tv_sec = (int64_t)(timeout_ns / NSEC_PER_SEC),
                                   .tv_nsec = (long long)(timeout_ns % NSEC_PER_SEC)};
    struct io_uring_cqe *cqe;

    if (timeout_ns == UINT64_MAX)
        return io_uring_submit_and_wait(&uring->io, nr);
    if (timeout_ns)
        return io_uring_submit_and_wait_timeout(&uring->io, &cqe, nr, &ts, NULL);
    return io_uring_submit_and_get_events(&uring->io);
}

static bool op_is_io(const struct ring_op *op)
{
    return op->code == RING_READ || op->code == RING_WRITE || op->code == RING_FSYNC;
}

// When all that came is done and more is due, being woken by each single completion or request would
// cost them (in this thread and, on a socket, in the client) more than the work that they bring. The
// kernel lets them gather without waking us. 0: no reason to wait, nothing was submitted.
static int uring_wait_for_batch(struct uring *uring, uint64_t timeout_ns)
{
    unsigned nr_ios = min_of(uring->nr_io / URING_BATCH_SHARE, URING_BATCH_MAX);
    unsigned nr_answered = uring->ring.nr_answered;
    int ret;

    uring->ring.nr_answered = 0;
    if (uring->is_late || (nr_ios < 2 && nr_answered < URING_BATCH_SHARE))
        return 0;
    ret = uring_wait_for(uring, 0, 0);
    if (ret < 0 || io_uring_cq_ready(&uring->io))
        return ret < 0 ? ret : 1;
    if (nr_ios < 2) {
        nr_ios = URING_BATCH_MAX;
        timeout_ns = min_of(timeout_ns, (uint64_t)nr_answered * URING_REQUEST_NS);
    }
    ret = uring_wait_for(uring, nr_ios, min_of(timeout_ns, URING_BATCH_NS));
    return ret ? ret : 1;
}

// ret: what the kernel said last.
static int uring_dispatch(struct uring *uring, int ret)
{
    struct io_uring_cqe *cqe;
    unsigned head, nr_seen = 0;

    // EINTR and ETIME are turns without news; EBUSY and EAGAIN ask to reap before more is submitted.
    if (ret < 0 && ret != -EINTR && ret != -ETIME && ret != -EBUSY && ret != -EAGAIN)
        return ret;
    uring->ring.now_ns = util_now_ns();
    io_uring_for_each_cqe (&uring->io, head, cqe) {
        struct ring_op *op = io_uring_cqe_get_data(cqe);

        nr_seen++;
        if (op_is_io(op))
            uring->nr_io--;
        op->done(op, cqe->res);
    }
    io_uring_cq_advance(&uring->io, nr_seen);
    uring->is_late = !nr_seen;
    return 0;
}

int uring_wait(struct ring *ring, uint64_t timeout_ns)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    int ret = uring_wait_for_batch(uring, timeout_ns);

    if (!ret)
        ret = uring_wait_for(uring, 1, timeout_ns);
    return uring_dispatch(uring, ret);
}

int uring_poll(struct ring *ring)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    struct io_uring *io = &uring->io;
    int ret = 0;

    // Without the flag that tells of completions the kernel has to be asked each time.
    if (io_uring_sq_ready(io) || !uring->has_taskrun_flag ||
        (IO_URING_READ_ONCE(*io->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)))
        ret = uring_wait_for(uring, 0, 0);
    return uring_dispatch(uring, ret);
}

// What was queued before is submitted before.
void uring_cancel(struct ring *ring, struct ring_op *op)
{
    struct uring *uring = container_of(ring, struct uring, ring);
    struct io_uring_sqe *sqe = uring_get_sqe(uring);

    io_uring_prep_cancel(sqe, op, 0);
    io_uring_sqe_set_data(sqe, &uring->cancel_op);
}

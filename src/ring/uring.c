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

// Whether there is something to submit or to take. Without the flag that tells of completions the kernel
// has to be asked each time.
static bool uring_has_news(const struct uring *uring)
{
    const struct io_uring *io = &uring->io;

    return io_uring_sq_ready(io) || io_uring_cq_ready(io) || !uring->has_taskrun_flag ||
           (IO_URING_READ_ONCE(*io->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

static bool op_is_io(const struct ring_op *op)
{
    return op->code == RING_READ || op->code == RING_WRITE || op->code == RING_FSYNC;
}

// Requests of a deep stream that come one by one each wake us and, being answered at once, their sender: that
// is most of what they cost. So they are let gather, for as long as it does not keep the sender waiting: one
// that has read all its answers is idle. Where too few come to one that is, this is not done again for a
// while; few that come to one that still reads (clients read all there is, and then send) say nothing.
static void uring_judge_gathering(struct uring *uring)
{
    struct ring *ring = &uring->ring;
    bool is_enough = ring->nr_received >= URING_GATHER_MIN;

    if (!uring->has_gathered)
        return;
    if (ring->is_peer_idle || !ring->nr_received)
        uring->gather_ns -= uring->gather_ns / 4;
    else if (ring->is_gathered)
        uring->gather_ns += uring->gather_ns / (is_enough ? 8 : 1);
    uring->gather_ns = min_of(uring->gather_ns, URING_GATHER_MAX_NS);
    if (uring->gather_ns < URING_GATHER_MIN_NS || (!is_enough && (ring->is_peer_idle || !ring->nr_received)))
        uring->gather_ns = 0;
    if (uring->gather_ns)
        uring->nr_gather_skip_max = 0;
    else
        uring->nr_gather_skip_max = min_of(2 * uring->nr_gather_skip_max + 16, URING_GATHER_SKIP_MAX);
    uring->nr_gather_skip = uring->nr_gather_skip_max;
    uring->has_gathered = ring->is_gathered = ring->is_peer_idle = false;
}

// 0: not now. Who was not answered is not waited for: the first request after a pause is served at once.
static uint64_t uring_gather_ns(struct uring *uring, unsigned nr_due)
{
    if (!nr_due)
        return 0;
    if (!uring->gather_ns) {
        if (uring->nr_gather_skip) {
            uring->nr_gather_skip--;
            return 0;
        }
        uring->gather_ns = URING_GATHER_START_NS;
    }
    return uring->gather_ns;
}

// When all that came is done and more is due, being woken by each single completion or request would
// cost them (in this thread and, on a socket, in the client) more than the work that they bring. The
// kernel lets them gather without waking us. 0: no reason to wait, nothing was submitted.
static int uring_wait_for_batch(struct uring *uring, uint64_t timeout_ns)
{
    unsigned nr = min_of(uring->nr_io / URING_BATCH_SHARE, URING_BATCH_MAX);
    unsigned nr_answered = uring->ring.nr_answered, nr_due = uring->ring.nr_due;
    uint64_t batch_ns = URING_BATCH_NS;
    bool is_gathering = false;
    int ret;

    uring_judge_gathering(uring);
    uring->ring.nr_answered = 0;
    uring->ring.nr_due = 0;
    if (nr < 2 && nr_answered >= URING_BATCH_SHARE) {
        nr = URING_BATCH_MAX;
        batch_ns = min_of(batch_ns, (uint64_t)nr_answered * URING_REQUEST_NS);
    } else if (nr < 2 && (batch_ns = uring_gather_ns(uring, nr_due))) {
        nr = min_of(max_of(nr_due, 2U), URING_BATCH_MAX); // one alone would end it with one request
        is_gathering = true;
    }
    if (nr < 2 || !timeout_ns || uring->is_late)
        return 0;
    if (uring_has_news(uring)) {
        ret = uring_wait_for(uring, 0, 0);
        if (ret < 0 || io_uring_cq_ready(&uring->io))
            return ret < 0 ? ret : 1;
    }
    ret = uring_wait_for(uring, nr, min_of(timeout_ns, batch_ns));
    uring->has_gathered = is_gathering;
    uring->ring.is_gathered = is_gathering && io_uring_cq_ready(&uring->io) < nr;
    uring->ring.nr_received = 0;
    return ret ? ret : 1;
}

static void uring_forget_cancel(struct uring *uring, const struct ring_op *op)
{
    for (struct ring_op **at = &uring->cancels; *at; at = &(*at)->next) {
        if (*at == op) {
            *at = op->next;
            return;
        }
    }
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
        if (__builtin_expect(!!uring->cancels, 0))
            uring_forget_cancel(uring, op);
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

    return uring_dispatch(uring, uring_has_news(uring) ? uring_wait_for(uring, 0, 0) : 0);
}

// What was queued before is submitted before.
void uring_queue_cancel(struct uring *uring, struct ring_op *op)
{
    struct io_uring_sqe *sqe = uring_get_sqe(uring);

    io_uring_prep_cancel(sqe, op, 0);
    io_uring_sqe_set_data(sqe, &uring->cancel_op);
}

// The kernel does not find an op on its way from one place to the next, where it may begin to wait: one that
// is not done later is asked again (uring_cancelled()).
void uring_cancel(struct ring *ring, struct ring_op *op)
{
    struct uring *uring = container_of(ring, struct uring, ring);

    uring_forget_cancel(uring, op); // asked before
    op->next = uring->cancels;
    uring->cancels = op;
    uring_queue_cancel(uring, op);
}

// buffered: through the kernel's page cache.
//
//  U1. Reads are tried without blocking on the queue's own thread (RWF_NOWAIT): what is cached costs a
//      copy and no switch. What is not goes to the ring, many at once. A try that fails has begun to
//      read, alone: the disk is told of each. So after some that failed in a row more and more reads
//      are not tried: what a turn of the ring has is told to the disk at once.
//  U2. Writes to one file only fight for its lock: one thread at a time hands them to the kernel, in the
//      order in which they came. The queue's own does as long as nobody else writes and writes are
//      quick: without blocking where the file system can tell (XFS), else whole pages, which need no
//      read. A hundredth of its time it may lose with slow ones, 10 ms at once; what is beyond that is a
//      worker's (writer.c).
//  U3. With one worker (--workers 1) everything goes through that thread in order: the loop driver as
//      it was, the baseline to compare with.
//  U4. Where the transport has a pipe for the data (rq.get_pipe), the cached pages themselves go into it. The
//      kernel has no way to splice without blocking: pages are looked for first, and time that is lost
//      nevertheless (they were still being read) is of U2's hundredth.

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "io/io.h"
#include "io/plug.h"
#include "io/writer.h"
#include "io/zero.h"
#include "ring/workers.h"
#include "util/util.h"

// More than this is a long copy, for which the other requests of the queue would have to wait.
#define NOWAIT_MAX_BYTES (256 * 1024)
// Reads that go without a try after tries that failed: 1, 3, 7... and no more than this.
#define UNTRIED_MAX 64
// A write that is longer is better copied by a worker while this thread receives the next one.
#define INLINE_WRITE_MAX_BYTES (8 * 1024)
// A write into the page cache that takes longer did not only copy.
#define QUICK_NS 500000
#define SLOW_FACTOR 100
#define SLOW_BURST_NS NSEC_PER_SEC // 10 ms by the factor: being preempted is not being slow

struct buffered {
    struct io io;
    uint64_t page_bytes;
    atomic_bool cannot_splice;                           // U4: no way to know what is cached; latched
    bool is_single;                                      // U3
    atomic_bool cannot_read_nowait, cannot_write_nowait; // the file system has none; latched
    atomic_uint nr_failed, nr_untried;                   // U1: tries in a row, and reads that go without one
    _Atomic uint64_t slow_until_ns;                      // U2
    struct writer writer;
};

static int buffered_try_nowait(const struct ring_op *op)
{
    int flags = op->rw_flags | RWF_NOWAIT;
    ssize_t n;

    if (op->code == RING_READ)
        n = preadv2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, flags);
    else
        n = pwritev2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, flags);
    return n < 0 ? -errno : (int)n;
}

// U1. Queues share the counts, and may lose some.
static bool buffered_may_try(struct buffered *buffered, const struct rq *rq)
{
    unsigned nr_untried = atomic_load_explicit(&buffered->nr_untried, memory_order_relaxed);

    if (plug_bytes(rq) > NOWAIT_MAX_BYTES ||
        atomic_load_explicit(&buffered->cannot_read_nowait, memory_order_relaxed))
        return false;
    if (nr_untried)
        atomic_store_explicit(&buffered->nr_untried, nr_untried - 1, memory_order_relaxed);
    return !nr_untried;
}

static int buffered_try_read(struct buffered *buffered, const struct ring_op *op)
{
    unsigned nr_failed = atomic_load_explicit(&buffered->nr_failed, memory_order_relaxed);
    int res = buffered_try_nowait(op);

    if (res == -EOPNOTSUPP) {
        atomic_store(&buffered->cannot_read_nowait, true);
    } else if (res == -EAGAIN) {
        nr_failed = min_of(2 * nr_failed + 1, UNTRIED_MAX);
        atomic_store_explicit(&buffered->nr_failed, nr_failed, memory_order_relaxed);
        atomic_store_explicit(&buffered->nr_untried, nr_failed, memory_order_relaxed);
    } else if (nr_failed) {
        atomic_store_explicit(&buffered->nr_failed, 0, memory_order_relaxed);
    }
    return res;
}

static void buffered_read(struct buffered *buffered, struct rq *rq)
{
    struct ring_op *op = &rq->ring_op;
    int res = buffered_may_try(buffered, rq) ? buffered_try_read(buffered, op) : -EAGAIN;

    if (res > 0)
        op->done(op, res);
    else // 0 as well: the end of the file is looked for where it may block
        ring_queue(rq->queue->ring, op);
}

// U2
static bool buffered_may_block(const struct buffered *buffered, uint64_t now_ns)
{
    return now_ns >= atomic_load_explicit(&buffered->slow_until_ns, memory_order_relaxed);
}

// How long did it take what may block? U2
static void buffered_note_time(struct buffered *buffered, uint64_t start_ns)
{
    uint64_t end_ns = util_now_ns(), slow_until_ns;

    if (end_ns - start_ns <= QUICK_NS)
        return;
    slow_until_ns = atomic_load_explicit(&buffered->slow_until_ns, memory_order_relaxed);
    slow_until_ns = max_of(slow_until_ns, end_ns - SLOW_BURST_NS) + SLOW_FACTOR * (end_ns - start_ns);
    atomic_store_explicit(&buffered->slow_until_ns, slow_until_ns, memory_order_relaxed);
}

static bool buffered_is_cached(struct buffered *buffered, int fd, uint64_t offset_bytes, uint64_t len_bytes)
{
    uint64_t first = offset_bytes / buffered->page_bytes;
    uint64_t last = (offset_bytes + len_bytes - 1) / buffered->page_bytes;
    int64_t nr_cached = util_nr_cached_pages(fd, offset_bytes, len_bytes);

    if (nr_cached < 0)
        atomic_store_explicit(&buffered->cannot_splice, true, memory_order_relaxed);
    return nr_cached == (int64_t)(last - first + 1);
}

// What the file had not, the caller has to get: what came is taken back.
static int buffered_unsplice(const struct rq *rq, const struct rq_pipe *pipe, uint64_t n)
{
    return !n || readv(pipe->fds[0], rq->iov, rq->part_nr_iov) == (ssize_t)n ? (int)n : -EIO;
}

static bool buffered_may_splice(const struct buffered *buffered, const struct rq *rq)
{
    return rq->op == REQ_OP_READ && rq->get_pipe && rq_part_bytes(rq) == rq->len_bytes && !rq->done_bytes &&
           !atomic_load_explicit(&buffered->cannot_splice, memory_order_relaxed);
}

// U4. false: nothing was done.
static bool buffered_splice(struct buffered *buffered, struct rq *rq)
{
    uint64_t start_ns = util_now_ns(), left = rq->len_bytes;
    loff_t offset_bytes = (loff_t)rq->ext.offset_bytes;
    struct rq_pipe *pipe;
    ssize_t n = 1;
    int res;

    if (!buffered_may_block(buffered, start_ns) ||
        !buffered_is_cached(buffered, rq->ext.fd, rq->ext.offset_bytes, left) || !(pipe = rq->get_pipe(rq)))
        return false;
    while (left && n > 0) {
        n = splice(rq->ext.fd, &offset_bytes, pipe->fds[1], NULL, left, SPLICE_F_NONBLOCK);
        if (n > 0)
            left -= (uint64_t)n;
    }
    buffered_note_time(buffered, start_ns);
    rq->is_piped = !left;
    res = rq->is_piped ? (int)rq->len_bytes : buffered_unsplice(rq, pipe, rq->len_bytes - left);
    if (res)
        rq_part_done(rq, res);
    return res;
}

// A write that may block.
static int buffered_try_quick(struct buffered *buffered, const struct ring_op *op, uint64_t len_bytes)
{
    uint64_t start_ns = util_now_ns();
    ssize_t n;

    if (((op->rw.offset_bytes | len_bytes) & 4095) || !buffered_may_block(buffered, start_ns))
        return -EAGAIN;
    n = pwritev2(op->fd, op->rw.iov, (int)op->rw.nr_iov, (off_t)op->rw.offset_bytes, 0);
    buffered_note_time(buffered, start_ns);
    return n > 0 ? (int)n : -EAGAIN;
}

// U2. Bytes, or an error: then it is for the writer, which tries again and tells.
static int buffered_try_write(struct buffered *buffered, struct rq *rq)
{
    const struct ring_op *op = &rq->ring_op;
    uint64_t len_bytes = plug_bytes(rq);
    int res = -EOPNOTSUPP;

    if (op->rw_flags || rq_part_bytes(rq) > INLINE_WRITE_MAX_BYTES || !writer_try_begin(&buffered->writer))
        return -EAGAIN;
    if (!atomic_load_explicit(&buffered->cannot_write_nowait, memory_order_relaxed))
        res = buffered_try_nowait(op);
    if (res == -EOPNOTSUPP) {
        atomic_store_explicit(&buffered->cannot_write_nowait, true, memory_order_relaxed);
        res = buffered_try_quick(buffered, op, len_bytes);
    }
    writer_end(&buffered->writer, rq->queue);
    return res;
}

static void buffered_write(struct buffered *buffered, struct rq *rq)
{
    int res = buffered_try_write(buffered, rq);

    if (res > 0)
        rq->ring_op.done(&rq->ring_op, res);
    else
        writer_queue(&buffered->writer, rq);
}

static void buffered_issue(struct rq *rq)
{
    struct buffered *buffered = container_of(rq->io, struct buffered, io);

    if (rq->op == REQ_OP_READ)
        buffered_read(buffered, rq);
    else
        buffered_write(buffered, rq);
}

static void buffered_rw(struct io *io, struct rq *rq)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    if (buffered->is_single) {
        io_prep_rw(rq, io_rw_done);
        workers_submit(&rq->ring_op);
    } else if (!buffered_may_splice(buffered, rq) || !buffered_splice(buffered, rq)) {
        rq->io = io;
        plug_rw(rq, buffered_issue);
    }
}

static void buffered_flush(struct io *io, struct rq *rq)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    if (!buffered->is_single) {
        io_queue_fsync(io, rq);
        return;
    }
    rq->ring_op.code = RING_FSYNC;
    rq->ring_op.fd = rq->ext.fd;
    rq->ring_op.ring = rq->queue->ring;
    workers_submit(&rq->ring_op);
}

static int buffered_prefetch_work(struct rq *rq)
{
    const struct image *image = rq->queue->dev->image;

    if (!rq->len_bytes) // would mean the rest of the file
        return 0;
    return -posix_fadvise(image->fd, (off_t)(image->offset_bytes + rq->offset_bytes), (off_t)rq->len_bytes,
                          POSIX_FADV_WILLNEED);
}

static void buffered_other(struct io *io, struct rq *rq)
{
    (void)io;
    rq_call_worker(rq, rq->op == REQ_OP_PREFETCH ? buffered_prefetch_work : zero_work, rq_work_done);
}

static int buffered_init(struct io *io, const char *spec, struct err *err)
{
    struct buffered *buffered = container_of(io, struct buffered, io);

    (void)spec;
    (void)err;
    buffered->page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    buffered->is_single = workers_max() == 1;
    writer_init(&buffered->writer);
    return 0;
}

const struct io_ops io_buffered_ops = {
    .name = "buffered",
    .is_stored = true,
    .io_bytes = sizeof(struct buffered),
    .init = buffered_init,
    .rw = buffered_rw,
    .flush = buffered_flush,
    .other = buffered_other,
};

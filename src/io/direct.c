// direct: O_DIRECT, many in flight, no copy. What the file below cannot take as it is (offset, length
// or memory off its alignment) goes to bounce.c.
//
//  D1. A write that is smaller than a block of the file is a read-modify-write of that block. It holds
//      the range of its blocks exclusively, against every write of the device on any queue: else a
//      neighbour's bytes that are written between its read and its write are lost.
//  D2. Aligned writes do not exclude each other, and need no lock as long as there is no unaligned
//      one. So the lock is off until the first unaligned write; that one has all queues frozen once,
//      and from then on every write takes its range.
//  D3. A map may redirect to another fd, where the same bytes have other offsets: ranges are those of the
//      image. What is aligned in one of the two is aligned in the other (map_adjust()).
//  D4. The bytes of a last block that is none in whole are written by way of the page cache (B1 of bounce.c).
//      A direct write that ends while its page, or a larger folio, is dirty fails: the kernel cannot drop
//      what it has there, and the next fsync of the file is told EIO. So who writes these bytes excludes all
//      writes.

#include <errno.h>

#include "core/device.h"
#include "core/queue.h"
#include "io/bounce.h"
#include "io/direct.h"
#include "io/zero.h"
#include "util/util.h"

static bool direct_is_aligned(const struct image *image, const struct rq *rq)
{
    uintptr_t mem = 0;

    for (unsigned i = 0; i < rq->part_nr_iov; i++)
        mem |= (uintptr_t)rq->iov[i].iov_base | (rq->iov[i].iov_len & (image->dio_offset_align - 1));
    return !((rq->ext.offset_bytes | rq_part_bytes(rq)) & (image->dio_offset_align - 1)) &&
           !(mem & (image->dio_mem_align - 1));
}

static void direct_locked_rw_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (io_is_retried(res)) {
        int ret = rq_need_memory(rq);

        res = ret < 0 ? ret : res;
    }
    if (!io_is_retried(res)) // else io_rw_done() tries again, still under the lock
        direct_unlock(rq);
    io_rw_done(op, res);
}

static void direct_aligned_locked(struct ring_op *op, int res)
{
    (void)res;
    io_queue_rw(container_of(op, struct rq, ring_op), direct_locked_rw_done);
}

static void direct_bounce_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (rq_is_write(rq))
        direct_unlock(rq);
    rq_part_done(rq, res);
}

static void direct_bounce_locked(struct ring_op *op, int res)
{
    (void)res;
    rq_call_worker(container_of(op, struct rq, ring_op), bounce_work, direct_bounce_done);
}

static void direct_issue(struct rq *rq)
{
    ring_queue(rq->queue->ring, &rq->ring_op);
}

// D1, D4: for a write of [start, end) that has edges.
static void direct_lock_blocks(struct rq *rq, uint64_t start, uint64_t end,
                               void (*locked)(struct ring_op *op, int res))
{
    const struct image *image = rq->queue->dev->image;
    uint64_t align = image->dio_offset_align;
    bool has_tail = end > round_down(image->file_bytes, align);

    direct_lock(rq, has_tail ? 0 : round_down(start, align), round_up(end, align), true, locked);
}

static void direct_rw(struct io *io, struct rq *rq)
{
    struct direct *direct = container_of(io, struct direct, io);
    // D1, D3: in the image, wherever the map has it.
    uint64_t start = io->dev->image->offset_bytes + rq->offset_bytes + rq->done_bytes;
    uint64_t end = start + rq_part_bytes(rq);
    int ret;

    if (__builtin_expect(direct_is_aligned(io->dev->image, rq), 1)) {
        if (rq->op == REQ_OP_WRITE && direct->is_locking)
            direct_lock(rq, start, end, false, direct_aligned_locked);
        else
            plug_rw(rq, direct_issue);
        return;
    }
    ret = rq_need_memory(rq);
    if (ret < 0)
        rq_part_done(rq, ret);
    else if (rq->op == REQ_OP_READ)
        rq_call_worker(rq, bounce_work, direct_bounce_done);
    else if (direct->is_locking)
        direct_lock_blocks(rq, start, end, direct_bounce_locked);
    else
        direct_start_locking(rq);
}

static void direct_other_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    if (rq->lock.is_held)
        direct_unlock(rq);
    rq_end(rq, res);
}

static void direct_other_locked(struct ring_op *op, int res)
{
    (void)res;
    rq_call_worker(container_of(op, struct rq, ring_op), zero_work, direct_other_done);
}

static void direct_other(struct io *io, struct rq *rq)
{
    struct direct *direct = container_of(io, struct direct, io);
    uint64_t align = io->dev->image->dio_offset_align;
    uint64_t start = io->dev->image->offset_bytes + rq->offset_bytes, end = start + rq->len_bytes;
    // DISCARD is cut to whole blocks, WRITE_ZEROES may have edges to write.
    bool has_edges = rq->op == REQ_OP_WRITE_ZEROES && ((start | end) & (align - 1));

    if (rq->op == REQ_OP_PREFETCH) // there is no cache to read into
        rq_end(rq, 0);
    else if (direct->is_locking && has_edges)
        direct_lock_blocks(rq, start, end, direct_other_locked);
    else if (direct->is_locking)
        direct_lock(rq, start, end, false, direct_other_locked);
    else if (has_edges)
        direct_start_locking(rq);
    else
        direct_other_locked(&rq->ring_op, 0);
}

const struct io_ops io_direct_ops = {
    .name = "direct",
    .is_stored = true,
    .takes_bufs = true,
    .wants_direct = direct_wants_direct,
    .io_bytes = sizeof(struct direct),
    .init = direct_init,
    .exit = direct_exit,
    .rw = direct_rw,
    .flush = io_queue_fsync,
    .other = direct_other,
};

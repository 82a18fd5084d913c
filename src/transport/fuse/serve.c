// What the kernel's requests mean for the device. Hot.
//
// The file has the device's size, which no client can change. Reads past its end are short, as are writes
// across it; a write behind it has no space.

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/fuse/fuse.h"
#include "util/util.h"

#define FREEZE_PAUSE_NS 1000000

static void serve_rq_done(struct rq *rq)
{
    struct fuse_rq *frq = container_of(rq, struct fuse_rq, rq);
    size_t answer_bytes = 0;

    if (rq->op == REQ_OP_READ) {
        answer_bytes = rq->len_bytes;
    } else if (rq->op == REQ_OP_WRITE) {
        memcpy(frq->payload, &(struct fuse_write_out){.size = (uint32_t)rq->len_bytes},
               sizeof(struct fuse_write_out));
        answer_bytes = sizeof(struct fuse_write_out);
    }
    fuse_chan_answer(frq, rq->error, answer_bytes);
}

static void serve_lseek_done(struct rq *rq);

static void serve_submit(struct fuse_rq *frq, enum req_op op, unsigned flags, uint64_t offset, uint64_t len)
{
    struct rq *rq = &frq->rq;

    rq->op = (uint8_t)op;
    rq->flags = (uint8_t)flags;
    rq->offset_bytes = offset;
    rq->len_bytes = len;
    rq->buf_index = -1;
    rq->nr_iov = 1;
    rq->iov = &frq->iov;
    // Neighbours in the same state are one extent, so that the second one is in the other: it may be data.
    frq->iov.iov_len = op == REQ_OP_BLOCK_STATUS ? 2 * sizeof(struct extent) : len;
    frq->iov.iov_base = frq->payload;
    rq->done = op == REQ_OP_BLOCK_STATUS ? serve_lseek_done : serve_rq_done;
    queue_submit(frq->chan->queue, rq);
}

static void serve_rw(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;
    uint64_t size = frq->chan->dev->limits.size_bytes, offset = request->offset_bytes, len;
    bool is_write = request->opcode == FUSE_WRITE;

    if (request->len_bytes > frq->chan->payload_bytes) {
        fuse_chan_answer(frq, -EINVAL, 0);
    } else if (offset >= size || !request->len_bytes) {
        if (is_write)
            fuse_chan_answer(frq, request->len_bytes ? -ENOSPC : -EINVAL, 0);
        else
            fuse_chan_answer(frq, 0, 0);
    } else {
        len = min_of(request->len_bytes, size - offset);
        serve_submit(frq, is_write ? REQ_OP_WRITE : REQ_OP_READ,
                     is_write && (request->flags & O_DSYNC) ? RQ_FUA : 0, offset, len);
    }
}

// fallocate(2). Space cannot be reserved through a device; what lies behind its end needs no change.
static void serve_fallocate(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;
    uint64_t size = frq->chan->dev->limits.size_bytes, offset = request->offset_bytes;
    uint64_t len = request->len_bytes;
    bool keeps_size = request->flags & FALLOC_FL_KEEP_SIZE;
    unsigned flags;

    switch (request->flags & ~(unsigned)FALLOC_FL_KEEP_SIZE) {
    case FALLOC_FL_PUNCH_HOLE: // what cannot be done fast is not done: the kernel then writes zeroes if need
                               // be
        flags = RQ_FAST_ZERO;
        break;
    case FALLOC_FL_ZERO_RANGE:
        flags = RQ_NOUNMAP;
        break;
    default:
        fuse_chan_answer(frq, -EOPNOTSUPP, 0);
        return;
    }
    if (!keeps_size && (offset > size || len > size - offset))
        fuse_chan_answer(frq, -EFBIG, 0);
    else if (offset >= size)
        fuse_chan_answer(frq, 0, 0);
    else
        serve_submit(frq, REQ_OP_WRITE_ZEROES, flags, offset, min_of(len, size - offset));
}

// ---- lseek

static void serve_lseek_answer(struct fuse_rq *frq, uint64_t offset)
{
    memcpy(frq->payload, &(struct fuse_lseek_out){.offset = offset}, sizeof(struct fuse_lseek_out));
    fuse_chan_answer(frq, 0, sizeof(struct fuse_lseek_out));
}

static void serve_lseek_from(struct fuse_rq *frq, uint64_t at);

static void serve_lseek_done(struct rq *rq)
{
    struct fuse_rq *frq = container_of(rq, struct fuse_rq, rq);
    const struct extent *exts = (const struct extent *)(const void *)frq->payload;
    bool want_data = frq->request.flags == SEEK_DATA;
    uint64_t at = rq->offset_bytes;

    if (rq->error) {
        fuse_chan_answer(frq, rq->error, 0);
        return;
    }
    for (unsigned i = 0; i < rq->nr_extents; at += exts[i++].len_bytes) {
        bool is_data = exts[i].state != EXTENT_HOLE && exts[i].state != EXTENT_UNWRITTEN;

        if (is_data == want_data) {
            serve_lseek_answer(frq, max_of(at, frq->request.offset_bytes));
            return;
        }
    }
    if (frq->chan->queue->is_frozen) // the size may be another one: from the beginning
        fuse_serve(frq);
    else
        serve_lseek_from(frq, at);
}

static void serve_lseek_from(struct fuse_rq *frq, uint64_t at)
{
    uint64_t size = frq->chan->dev->limits.size_bytes;

    if (at < size) {
        serve_submit(frq, REQ_OP_BLOCK_STATUS, 0, at, size - at);
    } else if (frq->request.flags == SEEK_HOLE) {
        serve_lseek_answer(frq, size); // there is one behind the end
    } else {
        fuse_chan_answer(frq, -ENXIO, 0);
    }
}

static void serve_lseek(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;
    const struct limits *limits = &frq->chan->dev->limits;

    if (request->flags != SEEK_DATA && request->flags != SEEK_HOLE)
        fuse_chan_answer(frq, -EINVAL, 0);
    else if (request->offset_bytes >= limits->size_bytes)
        fuse_chan_answer(frq, -ENXIO, 0);
    else
        serve_lseek_from(frq, round_down(request->offset_bytes, limits->min_block_bytes));
}

// ---- The file

static void serve_worked(struct ring_op *op, int res)
{
    struct fuse_rq *frq = container_of(op, struct fuse_rq, op);

    queue_count_out(frq->chan->queue);
    fuse_chan_answer(frq, min_of(res, 0), (size_t)max_of(res, 0));
}

static void serve_call(struct fuse_rq *frq, int (*work)(struct ring_op *op))
{
    frq->op.code = RING_CALL;
    frq->op.done = serve_worked;
    frq->op.call = work;
    queue_count_in(frq->chan->queue); // a freeze waits for it: it looks at the image
    ring_queue(frq->chan->queue->ring, &frq->op);
}

// Direct where it was asked for: then the kernel keeps no pages, and lets writes run at once.
static void serve_open(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;
    struct fuse_open_out out = {0};

    if ((request->flags & O_ACCMODE) != O_RDONLY && frq->chan->dev->image->is_read_only) {
        fuse_chan_answer(frq, -EROFS, 0);
        return;
    }
    if (frq->chan->backing_id) { // F5
        out.open_flags = FOPEN_PASSTHROUGH;
        out.FUSE_OPEN_BACKING_ID = frq->chan->backing_id;
    } else if (request->flags & O_DIRECT) {
        out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
    }
    memcpy(frq->payload, &out, sizeof(out));
    fuse_chan_answer(frq, 0, sizeof(out));
}

// Times are the image's, whatever is asked. Size, owner and mode stay.
static void serve_setattr(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;
    bool is_resize = (request->flags & FATTR_SIZE) && request->len_bytes != frq->chan->dev->limits.size_bytes;

    if (is_resize || (request->flags & (FATTR_MODE | FATTR_UID | FATTR_GID)))
        fuse_chan_answer(frq, -EPERM, 0);
    else
        serve_call(frq, fuse_attr_work);
}

static void serve_again(struct ring_op *op, int res)
{
    (void)res;
    fuse_serve(container_of(op, struct fuse_rq, op));
}

void fuse_serve(struct fuse_rq *frq)
{
    const struct fuse_request *request = &frq->request;

    if (frq->chan->queue->is_frozen) { // the device is being changed
        frq->op.code = RING_TIMEOUT;
        frq->op.done = serve_again;
        frq->op.timeout_ns = FREEZE_PAUSE_NS;
        ring_queue(frq->chan->queue->ring, &frq->op);
        return;
    }
    if (request->error) {
        fuse_chan_answer(frq, request->error, 0);
        return;
    }
    switch (request->opcode) {
    case FUSE_READ:
    case FUSE_WRITE:
        serve_rw(frq);
        break;
    case FUSE_FSYNC:
        serve_submit(frq, REQ_OP_FLUSH, 0, 0, 0);
        break;
    case FUSE_FALLOCATE:
        serve_fallocate(frq);
        break;
    case FUSE_LSEEK:
        serve_lseek(frq);
        break;
    case FUSE_GETATTR:
        serve_call(frq, fuse_attr_work);
        break;
    case FUSE_SETATTR:
        serve_setattr(frq);
        break;
    case FUSE_STATFS:
        serve_call(frq, fuse_statfs_work);
        break;
    case FUSE_OPEN:
        serve_open(frq);
        break;
    case FUSE_RELEASE:
    case FUSE_DESTROY:
        fuse_chan_answer(frq, 0, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT: // a request that is under way comes to its end soon, and may be answered as ever
        fuse_chan_drop(frq);
        break;
    case FUSE_LOOKUP:
        fuse_chan_answer(frq, -ENOTDIR, 0);
        break;
    case FUSE_IOCTL:
        fuse_chan_answer(frq, -ENOTTY, 0);
        break;
    default: // the kernel does without, and most of them it does not ask for again
        fuse_chan_answer(frq, -ENOSYS, 0);
    }
}

// Block requests (virtio 1.2, 5.2.6): a header that the device reads, data, and a status byte that it
// writes, in however many descriptors (ANY_LAYOUT).

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/vhost_user/virtqueue.h"
#include "util/iov.h"
#include "util/util.h"

static uint8_t blk_status(int error)
{
    if (!error)
        return VIRTIO_BLK_S_OK;
    return error == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

// written: bytes of data.
static void blk_answer(struct virtqueue_rq *vrq, uint8_t status, uint32_t written)
{
    *vrq->status = status;
    virtqueue_use(vrq->vq, vrq, written + 1);
}

static void blk_done(struct rq *rq)
{
    struct virtqueue_rq *vrq = container_of(rq, struct virtqueue_rq, rq);
    uint32_t written = rq->op == REQ_OP_READ && !rq->error ? (uint32_t)rq->len_bytes : 0;

    blk_answer(vrq, blk_status(rq->error), written);
}

static void blk_submit_range(struct virtqueue_rq *vrq);

static void blk_range_done(struct rq *rq)
{
    struct virtqueue_rq *vrq = container_of(rq, struct virtqueue_rq, rq);

    if (rq->error || ++vrq->range == vrq->nr_ranges)
        blk_answer(vrq, blk_status(rq->error), 0);
    else
        blk_submit_range(vrq);
}

static void blk_submit_range(struct virtqueue_rq *vrq)
{
    const struct virtio_blk_discard_write_zeroes *range = &vrq->ranges[vrq->range];
    struct rq *rq = &vrq->rq;

    rq->offset_bytes = le64toh(range->sector) * SECTOR_BYTES;
    rq->len_bytes = le32toh(range->num_sectors) * SECTOR_BYTES;
    rq->flags &= (uint8_t)~RQ_NOUNMAP;
    if (rq->op == REQ_OP_WRITE_ZEROES && !(le32toh(range->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP))
        rq->flags |= RQ_NOUNMAP;
    queue_submit(vrq->vq->queue, rq);
}

// 5.2.6.2: unknown flags, and unmap with a discard, are unsupported.
static uint8_t blk_check_range(const struct virtqueue_rq *vrq,
                               const struct virtio_blk_discard_write_zeroes *range)
{
    uint32_t allowed = vrq->rq.op == REQ_OP_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

    if (le32toh(range->flags) & ~allowed)
        return VIRTIO_BLK_S_UNSUPP;
    if (le64toh(range->sector) > INT64_MAX / SECTOR_BYTES)
        return VIRTIO_BLK_S_IOERR;
    return VIRTIO_BLK_S_OK;
}

static void blk_start_ranges(struct virtqueue_rq *vrq, uint8_t op)
{
    uint64_t nr = vrq->out_bytes / sizeof(*vrq->ranges);
    struct virtio_blk_discard_write_zeroes ranges[VIRTQUEUE_MAX_RANGES];

    vrq->rq.op = op;
    if (!nr || nr > VIRTQUEUE_MAX_RANGES || vrq->out_bytes % sizeof(*ranges)) {
        blk_answer(vrq, VIRTIO_BLK_S_IOERR, 0);
        return;
    }
    iov_to_buf(vrq->rq.iov, 0, ranges, vrq->out_bytes);
    __asm__ __volatile__("" ::: "memory"); // V2
    for (unsigned i = 0; i < nr; i++) {
        uint8_t status = blk_check_range(vrq, &ranges[i]);

        if (status != VIRTIO_BLK_S_OK) {
            blk_answer(vrq, status, 0);
            return;
        }
    }
    memcpy(vrq->ranges, ranges, nr * sizeof(*ranges)); // where the iov was
    vrq->rq.iov = NULL;
    vrq->rq.nr_iov = 0;
    vrq->rq.done = blk_range_done;
    vrq->range = 0;
    vrq->nr_ranges = (uint16_t)nr;
    blk_submit_range(vrq);
}

static void blk_start_get_id(struct virtqueue *vq, struct virtqueue_rq *vrq)
{
    char id[VIRTIO_BLK_ID_BYTES] = "";
    uint32_t len = (uint32_t)min_of(vrq->in_bytes, sizeof(id));

    memcpy(id, vq->queue->dev->name, strnlen(vq->queue->dev->name, sizeof(id)));
    iov_from_buf(vrq->iov + vrq->nr_out, 0, id, len);
    blk_answer(vrq, VIRTIO_BLK_S_OK, len);
}

static void blk_start_rw(struct virtqueue *vq, struct virtqueue_rq *vrq, uint8_t op, uint64_t sector)
{
    struct rq *rq = &vrq->rq;

    rq->op = op;
    if (op == REQ_OP_READ) {
        rq->iov = vrq->iov + vrq->nr_out;
        rq->nr_iov = vrq->nr_in;
        rq->len_bytes = vrq->in_bytes;
    } else {
        rq->nr_iov = (uint16_t)(vrq->iov + vrq->nr_out - rq->iov);
        rq->len_bytes = vrq->out_bytes;
    }
    if (sector > INT64_MAX / SECTOR_BYTES || rq->len_bytes % SECTOR_BYTES || !rq->len_bytes) {
        blk_answer(vrq, VIRTIO_BLK_S_IOERR, 0);
        return;
    }
    rq->offset_bytes = sector * SECTOR_BYTES;
    queue_submit(vq->queue, rq);
}

// Takes the status byte off what is written, and the header off what is read. false: one is not there.
static bool blk_take_ends(struct virtqueue_rq *vrq, struct virtio_blk_outhdr *header)
{
    struct iovec *iov = vrq->iov, *last = vrq->iov + vrq->nr_out + vrq->nr_in - 1;
    size_t left = sizeof(*header);

    if (vrq->out_bytes < sizeof(*header) || !vrq->in_bytes)
        return false;
    last->iov_len--;
    vrq->status = (uint8_t *)last->iov_base + last->iov_len;
    if (!last->iov_len)
        vrq->nr_in--;
    vrq->in_bytes--;
    iov_to_buf(iov, 0, header, sizeof(*header));
    __asm__ __volatile__("" ::: "memory"); // V2
    while (left >= iov->iov_len) {
        left -= iov->iov_len;
        iov++;
        if (!left)
            break;
    }
    if (left) {
        iov->iov_base = (char *)iov->iov_base + left;
        iov->iov_len -= left;
    }
    vrq->out_bytes -= sizeof(*header);
    vrq->rq.iov = iov; // what is left to read
    return true;
}

const char *blk_start(struct virtqueue *vq, struct virtqueue_rq *vrq)
{
    struct rq *rq = &vrq->rq;
    struct virtio_blk_outhdr header;

    if (!blk_take_ends(vrq, &header))
        return "a request has no header or no status";
    vrq->vq = vq;
    rq->flags = atomic_load_explicit(vq->is_writethrough, memory_order_relaxed) ? RQ_FUA : 0;
    // Guest memory is not registered with the ring: that would pin all of it, and a page that the guest gives
    // back (balloon, free page reporting) is replaced in its memory and not in what is registered.
    rq->buf_index = -1;
    rq->nr_iov = 0;
    rq->offset_bytes = 0;
    rq->len_bytes = 0;
    rq->done = blk_done;
    switch (le32toh(header.type)) {
    case VIRTIO_BLK_T_IN:
        blk_start_rw(vq, vrq, REQ_OP_READ, le64toh(header.sector));
        break;
    case VIRTIO_BLK_T_OUT:
        blk_start_rw(vq, vrq, REQ_OP_WRITE, le64toh(header.sector));
        break;
    case VIRTIO_BLK_T_FLUSH:
        rq->op = REQ_OP_FLUSH;
        queue_submit(vq->queue, rq);
        break;
    case VIRTIO_BLK_T_GET_ID:
        blk_start_get_id(vq, vrq);
        break;
    case VIRTIO_BLK_T_DISCARD:
        blk_start_ranges(vrq, REQ_OP_DISCARD);
        break;
    case VIRTIO_BLK_T_WRITE_ZEROES:
        blk_start_ranges(vrq, REQ_OP_WRITE_ZEROES);
        break;
    default:
        blk_answer(vrq, VIRTIO_BLK_S_UNSUPP, 0);
    }
    return NULL;
}

// The channel to the kernel on a queue: /dev/fuse, read and written on the queue's thread. A request's way:
//
//   chan_look -> chan_read -> fuse_serve -> queue_submit ... rq done -> fuse_chan_answer
//
//  C1. The file is non-blocking, and shared by the queues. Each takes what is there, a batch at most, and
//      the I/O of all of that goes in one submission. It looks again after each turn of its ring, and when
//      there was nothing, a POLL waits for more. Reads and writes of
//      /dev/fuse only copy: they are system calls of their own, since what io_uring makes of them costs
//      more, and some kernels let a READ of a non-blocking file wait.
//  C2. Whoever is over (no POLL in flight, no tag in use) has posted over_op, and nothing after it.

#include <errno.h>
#include <poll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/fuse/fuse.h"
#include "util/util.h"

#define CHAN_BATCH 32

void fuse_chan_check_over(struct fuse_chan *chan)
{
    if (chan->is_over || !(chan->is_stopping || chan->is_gone) || chan->is_polling || chan->nr_serving ||
        tags_nr_used(&chan->tags))
        return;
    chan->is_over = true;
    ring_remove_poller(chan->queue->ring, &chan->poller);
    ring_remove_fd(chan->queue->ring, chan->fd);
    ring_post(chan->main_ring, &chan->over_op, 0); // C2
}

// A message of len bytes at frq->payload - FUSE_HEAD_BYTES. false: it makes no sense.
static bool chan_take(struct fuse_rq *frq, size_t len)
{
    const uint8_t *msg = frq->payload - FUSE_HEAD_BYTES;
    const struct fuse_in_header *header = (const struct fuse_in_header *)(const void *)msg;
    size_t args_bytes = len - sizeof(*header), data_bytes = 0;

    if (len < sizeof(*header) || header->len != len)
        return false;
    if (header->opcode == FUSE_WRITE && args_bytes > sizeof(struct fuse_write_in)) {
        data_bytes = args_bytes - sizeof(struct fuse_write_in);
        args_bytes = sizeof(struct fuse_write_in);
    }
    fuse_request_parse(header, header + 1, args_bytes, data_bytes, &frq->request);
    frq->buf_bytes = header->opcode == FUSE_READ ? frq->request.len_bytes : data_bytes;
    queue_count_bufs(frq->chan->queue, &frq->chan->buf_bytes, (int64_t)frq->buf_bytes);
    fuse_serve(frq);
    return true;
}

// One message. false: there is none.
static bool chan_read_one(struct fuse_chan *chan, struct fuse_rq *frq)
{
    ssize_t n = read(chan->fd, frq->payload - FUSE_HEAD_BYTES, FUSE_HEAD_BYTES + chan->payload_bytes);

    if (n > 0 && chan_take(frq, (size_t)n))
        return true;
    tags_put(&chan->tags, &frq->rq);
    if (n < 0 && errno == ENODEV)
        chan->is_gone = true; // unmounted
    // A request that was taken back while it was read (ENOENT, EINTR) is no reason to stop.
    return n > 0 || errno == ENOENT || errno == EINTR;
}

// A batch of what is there. true: something was.
static bool chan_read(struct fuse_chan *chan)
{
    for (unsigned i = 0; i < CHAN_BATCH && !chan->is_stopping; i++) {
        struct rq *rq = NULL;

        if (queue_has_room(chan->queue, chan->buf_bytes, 1)) // Q5
            rq = tags_get(&chan->tags);
        if (!rq)
            chan->is_stalled = true; // goes on when answers have left
        if (!rq || !chan_read_one(chan, container_of(rq, struct fuse_rq, rq)))
            return i;
    }
    return true;
}

static bool chan_is_reading(const struct fuse_chan *chan)
{
    return !chan->is_polling && !chan->is_stalled && !chan->is_stopping && !chan->is_gone;
}

static bool chan_look(struct ring_poller *poller)
{
    struct fuse_chan *chan = container_of(poller, struct fuse_chan, poller);
    bool is_found = chan->is_found;

    chan->is_found = false;
    if (chan_is_reading(chan))
        is_found |= chan_read(chan);
    fuse_chan_check_over(chan);
    return is_found;
}

static bool chan_arm(struct ring_poller *poller)
{
    struct fuse_chan *chan = container_of(poller, struct fuse_chan, poller);

    if (chan_is_reading(chan)) {
        chan->is_polling = true;
        ring_queue(chan->queue->ring, &chan->poll_op);
    }
    return true;
}

void fuse_chan_drop(struct fuse_rq *frq)
{
    struct fuse_chan *chan = frq->chan;

    if (frq->is_entry) {
        fuse_entry_answer(container_of(frq, struct fuse_entry, frq), 0, 0);
        return;
    }
    queue_count_bufs(chan->queue, &chan->buf_bytes, -(int64_t)frq->buf_bytes);
    tags_put(&chan->tags, &frq->rq);
    if (chan->is_stalled && tags_can_resume(&chan->tags))
        chan->is_stalled = false;
    fuse_chan_check_over(chan);
}

void fuse_chan_answer(struct fuse_rq *frq, int error, size_t answer_bytes)
{
    struct fuse_out_header *header = (struct fuse_out_header *)(void *)frq->payload - 1; // F3
    size_t len = sizeof(*header) + (error ? 0 : answer_bytes);

    if (frq->is_entry) {
        fuse_entry_answer(container_of(frq, struct fuse_entry, frq), error, answer_bytes);
        return;
    }
    *header = (struct fuse_out_header){.len = (uint32_t)len, .error = error, .unique = frq->request.unique};
    if (write(frq->chan->fd, header, len) < 0 && errno == ENODEV) // ENOENT: who asked has gone meanwhile
        frq->chan->is_gone = true;
    fuse_chan_drop(frq);
}

static void chan_polled(struct ring_op *op, int res)
{
    struct fuse_chan *chan = container_of(op, struct fuse_chan, poll_op);

    chan->is_polling = false;
    if (res > 0 && (res & POLLERR))
        chan->is_gone = true;
    fuse_chan_check_over(chan);
}

void fuse_chan_start(struct ring_op *op, int res)
{
    struct fuse_chan *chan = container_of(op, struct fuse_chan, start_op);

    (void)res;
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0); // F4; only root may
    ring_add_fd(chan->queue->ring, chan->fd);
    chan->poll_op =
        (struct ring_op){.done = chan_polled, .code = RING_POLL, .fd = chan->fd, .events = POLLIN};
    for (unsigned i = 0; i < chan->nr_entries; i++)
        fuse_entry_register(&chan->entries[i]);
    chan->poller = (struct ring_poller){.poll = chan_look, .arm = chan_arm};
    ring_add_poller(chan->queue->ring, &chan->poller, chan->queue->ring->poll_max_ns);
}

void fuse_chan_stop(struct ring_op *op, int res)
{
    struct fuse_chan *chan = container_of(op, struct fuse_chan, stop_op);

    (void)res;
    chan->is_stopping = true;
    if (chan->is_polling)
        ring_cancel(chan->queue->ring, &chan->poll_op);
    fuse_chan_check_over(chan);
}

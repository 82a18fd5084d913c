// The kernel's io_uring channel (Linux 6.14, where the administrator set the fuse module's enable_uring). A
// request's way:
//
//   entry_fetched -> fuse_serve -> queue_submit ... rq done -> fuse_entry_answer
//
//  E1. The kernel has a queue for each CPU, and puts a request there that was made on it. Entries of each of
//      them are registered, or it would not begin. FORGET and INTERRUPT still come by /dev/fuse.
//  E2. An entry is with the kernel from its REGISTER or COMMIT_AND_FETCH on until that is done, and then has
//      a request. What waits in the kernel when the ring ends, the kernel takes back.

#include <errno.h>
#include <string.h>

#include "core/queue.h"
#include "transport/fuse/fuse.h"
#include "util/util.h"

static void entry_fetched(struct ring_op *op, int res);

static void entry_command(struct fuse_entry *entry, uint32_t command)
{
    struct fuse_uring_cmd_req data = {.commit_id = entry->commit_id, .qid = entry->cpu};
    struct ring_op *op = &entry->frq.op;

    op->done = entry_fetched;
    op->code = RING_CMD;
    op->fd = entry->frq.chan->fd;
    op->cmd.op = command;
    op->cmd.data = &data;
    op->cmd.data_bytes = sizeof(data);
    op->cmd.addr = entry->iov;
    op->cmd.len = ARRAY_SIZE(entry->iov);
    ring_queue(entry->frq.chan->queue->ring, op);
}

void fuse_entry_register(struct fuse_entry *entry)
{
    entry_command(entry, FUSE_IO_URING_CMD_REGISTER);
}

void fuse_entry_answer(struct fuse_entry *entry, int error, size_t answer_bytes)
{
    struct fuse_out_header header = {.len = sizeof(header),
                                     .error = error,
                                     .unique = entry->frq.request.unique};
    struct fuse_chan *chan = entry->frq.chan;

    memcpy(entry->header->in_out, &header, sizeof(header));
    entry->header->ring_ent_in_out.payload_sz = error ? 0 : (uint32_t)answer_bytes;
    chan->nr_serving--;
    entry_command(entry, FUSE_IO_URING_CMD_COMMIT_AND_FETCH);
    fuse_chan_check_over(chan);
}

// The request in the entry, on a copy of what stands before its data.
static void entry_take(struct fuse_entry *entry)
{
    struct fuse_request *request = &entry->frq.request;
    struct fuse_uring_req_header copy = *entry->header;
    struct fuse_in_header header;
    size_t data_bytes = copy.ring_ent_in_out.payload_sz;
    size_t args_bytes;

    memcpy(&header, copy.in_out, sizeof(header));
    args_bytes = header.len - sizeof(header) - data_bytes;
    entry->commit_id = copy.ring_ent_in_out.commit_id;
    if (header.len < sizeof(header) + data_bytes || args_bytes > sizeof(copy.op_in))
        *request = (struct fuse_request){.opcode = header.opcode, .unique = header.unique, .error = -EINVAL};
    else
        fuse_request_parse(&header, copy.op_in, args_bytes, data_bytes, request);
    fuse_serve(&entry->frq);
}

static void entry_fetched(struct ring_op *op, int res)
{
    struct fuse_rq *frq = container_of(op, struct fuse_rq, op);
    struct fuse_chan *chan = frq->chan;

    // Unmounted, or this kernel will not do it after all: then requests come by /dev/fuse.
    if (res < 0 || chan->is_over)
        return;
    chan->nr_serving++;
    chan->is_found = true;
    if (chan->is_stopping)
        fuse_entry_answer(container_of(frq, struct fuse_entry, frq), -ENOTCONN, 0);
    else
        entry_take(container_of(frq, struct fuse_entry, frq));
}

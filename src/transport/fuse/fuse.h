// A device as a file: FUSE with one file a mount, which is the root of its file system. The kernel's
// protocol is spoken on the rings of the device's queues.
//
//  F1. hold() mounts, agrees with the kernel on how to talk (FUSE_INIT), and lets a guard process unmount
//      when nobody is left (mount.c). A worker knows by facts what was agreed on.
//  F2. The kernel's messages come by a channel (chan.c) on each queue, read from /dev/fuse. A request is
//      answered by the one that read it, exactly once.
//      Where the kernel offers it, requests come by its io_uring channel instead (entry.c): it puts them
//      into memory of ours, and the answer to one and the wait for the next are one submission.
//  F3. The data of a WRITE arrives, and that of a READ leaves, at frq->payload, which begins a page. What
//      belongs before it in the message stands right before it in memory: one piece, and aligned for
//      direct I/O.
//  F4. A queue's thread never waits for the kernel's answer to a request on the mount: it is who gives it.
//      PR_SET_IO_FLUSHER keeps its allocations from waiting for write-back that comes here.
//  F5. With --passthrough the kernel is told of the image once for each mount, and each OPEN is answered with
//      the number that it gave it: who has the file open then reads and writes the image past us, and the
//      kernel keeps our struct file of it, with its locks, as long. It takes no other number, and no other
//      kind of open, while somebody has the file open: so the number outlives workers, as a fact.
#pragma once

#include "core/tags.h"
#include "transport/fuse/proto.h"
#include "transport/fuse/request.h"
#include "transport/transport.h"

#define FUSE_PAGE_BYTES 4096
#define FUSE_NR_PAGES 1024U // of one request, if the kernel takes so many
// What stands before the data of a WRITE.
#define FUSE_HEAD_BYTES (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))

struct fuse_chan;

struct fuse_rq {
    struct rq rq;
    struct fuse_chan *chan;
    bool is_entry; // the one in a struct fuse_entry
    uint8_t *payload;
    struct fuse_request request;
    uint64_t buf_bytes; // Q5 in core/queue.h, on /dev/fuse: what the data takes
    struct iovec iov;   // of rq
    struct ring_op op;  // of what is no rq
};

// A place for one request of the FUSE io_uring channel (entry.c). The kernel puts it there, and takes the
// answer from there.
struct fuse_entry {
    struct fuse_rq frq;
    struct fuse_uring_req_header *header; // in the page before the payload
    struct iovec iov[2];                  // header and payload, for the kernel
    uint64_t commit_id;                   // of the request at hand
    uint16_t cpu;                         // the kernel has a queue for each
};

// The messages of /dev/fuse that one queue reads. The queue's thread's own, but for what fuse.c posts.
struct fuse_chan {
    struct device *dev;
    struct queue *queue;
    int fd;
    size_t payload_bytes; // room at each payload
    struct tags tags;
    uint8_t *mem; // of all payloads and what stands before them
    size_t mem_bytes;
    uint64_t buf_bytes;  // of it, in use for data
    uint32_t backing_id; // F5; 0: all goes by us

    struct fuse_entry *entries;
    unsigned nr_entries;
    uint8_t *entry_mem;
    size_t entry_mem_bytes;
    unsigned nr_serving; // of these, have a request

    struct ring_poller poller;
    struct ring_op poll_op;
    bool is_found; // an entry has had a request
    bool is_polling;
    bool is_stalled;  // out of tags
    bool is_stopping; // reads no more
    bool is_gone;     // unmounted, or the connection was aborted
    bool is_over;     // over_op has been posted

    // Messages.
    struct ring_op start_op, stop_op;
    struct ring *main_ring;
    struct ring_op over_op;     // done() is fuse.c's
    struct fuse_server *server; // fuse.c's
};

// 0 or -ENOMEM. Main thread, as is destroy, when the queue has ended.
int fuse_chan_create(struct fuse_chan *chan, struct device *dev, struct queue *queue, int fd,
                     size_t payload_bytes);
void fuse_chan_destroy(struct fuse_chan *chan);

// done() of start_op and stop_op: on the queue's thread.
void fuse_chan_start(struct ring_op *op, int res);
void fuse_chan_stop(struct ring_op *op, int res);

// serve.c: does what frq->request asks and ends with fuse_chan_answer(), now or later. Queue's thread, hot.
void fuse_serve(struct fuse_rq *frq);

// entry.c: offers the entry to the kernel. Queue's thread.
void fuse_entry_register(struct fuse_entry *entry);
void fuse_entry_answer(struct fuse_entry *entry, int error, size_t answer_bytes);

// chan.c: whether nothing is under way any more, and then says so.
void fuse_chan_check_over(struct fuse_chan *chan);
// chan.c: sends error (0 or a negative errno), or answer_bytes at payload. Queue's thread, hot.
void fuse_chan_answer(struct fuse_rq *frq, int error, size_t answer_bytes);
// There is nothing to be sent.
void fuse_chan_drop(struct fuse_rq *frq);

// attr.c: what the file looks like, into payload. On a worker: the image's file system may block. Returns
// the answer's bytes or a negative errno.
int fuse_attr_work(struct ring_op *op);
int fuse_statfs_work(struct ring_op *op);

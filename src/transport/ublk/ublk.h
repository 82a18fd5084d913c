// A real block device: the kernel's ublk driver hands the requests of /dev/ublkbN to the rings of the
// device's queues.
//
//  B1. The kernel's device outlives a worker: hold() makes it, release() stops and deletes it. Without a
//      server its requests wait (USER_RECOVERY), and those that a dead one had are sent again (REISSUE).
//      Where nobody would start another server they fail instead.
//  B2. A hardware queue is served by one of the device's queues, on whose ring a FETCH is in flight for each
//      tag that the kernel may use. A request is answered by COMMIT_AND_FETCH, which is the next FETCH too.
//  B3. A tag is the kernel's, or ours with a request that is not answered yet. It is lost once the kernel has
//      ended its FETCH with an error; a hardware queue ends with its last tag.
//  B4. Descriptors are the kernel's memory: each is copied once, when its FETCH has come back.
//  B5. What stops a device may wait for its requests: it runs where nobody serves them.
//  B6. The kernel deletes a device when nothing of /dev/ublkcN is open or mapped any more: that is before
//      transport_stopped().
//  B7. Without a copy (is_zero_copy): while we have a request, its pages are the registered buffer of its tag
//      in the queue's ring, and the image's I/O goes there. Who has to see the data, or cannot use such a
//      buffer, asks rq_need_memory(): it is copied then, by hand, by way of /dev/ublkcN.
//  B8. The last process of a mount namespace unmounts what is mounted there as it ends, and closes its files
//      only then: with its own device mounted it would wait for the device, which ends with those files. So
//      a keeper, which has none of them, is the last one wherever the others are killed.
#pragma once

#include <sched.h>
#include <semaphore.h>

#include "core/queue.h"
#include "transport/transport.h"
#include "transport/ublk/proto.h"

// The kernel splits larger ones. Each tag has a buffer of that size, of which it touches what it uses.
#define UBLK_MAX_IO_BYTES (512U * 1024)

struct ublk_hwq;

struct ublk_rq {
    struct rq rq;
    struct ublk_hwq *hwq;
    struct iovec iov;
    struct ring_op op; // the FETCH
    struct ublk_io_cmd cmd;
    bool is_copied; // B7: READ: what is behind copied_from_bytes is in the tag's memory
    uint64_t copied_from_bytes;
};

// A hardware queue: the queue's thread's own, but for what ublk.c posts.
struct ublk_hwq {
    struct device *dev;
    struct queue *queue;
    int fd; // of /dev/ublkcN
    uint16_t index, depth;
    uint32_t max_io_bytes;
    uint32_t fetch_op, commit_op; // as the kernel wants them
    bool is_zero_copy;
    int first_buf; // B7: of tag 0, or -1: there are none to be had
    const struct ublk_io_desc *descs;
    size_t descs_bytes;
    char *bufs;
    struct ublk_rq *rqs;
    unsigned nr_tags;  // not lost (B3)
    _Atomic int error; // why the first one was lost, when not for good reason
    cpu_set_t cpus;    // whose requests come here
    struct ring_op start_op;
    sem_t over; // all are lost
};

// done() of start_op: on the queue's thread.
void ublk_hwq_start(struct ring_op *op, int res);
// done() of a FETCH.
void ublk_hwq_fetched(struct ring_op *op, int res);
// The last tag is lost (ublk.c).
void ublk_hwq_end(struct ublk_hwq *hwq);

struct device;
// What the kernel is told of the device: pure.
struct ublk_params ublk_params_of(const struct device *dev, const struct ublk_dev_info *info);

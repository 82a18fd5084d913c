// One front-end, from accept() to the end: messages on the main thread, vrings on the queues' threads.
//
//  S1. Messages are handled one after the other. One that changes what running vrings use has them
//      stopped first (V1 in virtqueue.h), and those that are still complete started again.
//  S2. A file descriptor that came with a message is closed when the message is over, unless its handler
//      has taken it.
//  S3. A session ends when its vrings are stopped and nothing is under way on the main ring either.
//  S4. We never keep the front-end's own end of the connection open, nor a socket in which it may lie: we
//  would
//      not learn that the front-end has gone. The channel for our own messages is a socket pair, and closed
//      as soon as it becomes readable, for nothing is said on it; no socket waits for the rest of a message.
#pragma once

#include "transport/vhost_user/config.h"
#include "transport/vhost_user/memory.h"
#include "transport/vhost_user/proto.h"
#include "transport/vhost_user/virtqueue.h"

struct session_options {
    struct device *dev;
    struct ring *ring; // the main thread's
    uint64_t poll_ns;
    bool *has_writeback; // the cache mode: a front-end that comes back does not set it again
    void (*closed)(void *arg);
    void *arg;
};

struct session {
    struct session_options options;
    int fd;
    uint64_t features, protocol_features;
    bool is_closing;
    bool is_message_held; // until nothing is pending

    struct vu_header header;
    union vu_payload payload;
    size_t in_len; // of header and payload
    int fds[VU_MAX_FDS];
    unsigned nr_fds;
    struct ring_op poll_op;
    bool is_poll_queued;

    struct memory memory;
    struct memory_map inflight_map;
    char *inflight; // in it
    struct vu_inflight inflight_desc;
    atomic_bool is_writethrough;
    int backend_fd; // -1: none. Else backend_op is queued (S4)
    struct ring_op backend_op;
    bool is_backend_stopping;

    unsigned nr_pending; // vrings that stop, err eventfds that are signalled, the channel that is closed
    struct virtqueue vqs[CONFIG_MAX_QUEUES];
};

// fd is the session's from now on. NULL: no memory, and fd is still the caller's.
struct session *session_create(int fd, const struct session_options *options);

// Lets what is in flight come to its end, and calls closed() after all has been freed: now or later.
void session_close(struct session *session);

// The device's size or limits have changed: the front-end is told, if it has asked for that.
void session_device_changed(struct session *session);

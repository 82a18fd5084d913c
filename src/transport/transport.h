// A transport speaks somebody's protocol and turns it into requests. Its words stay in its folder.
#pragma once

#include <stdbool.h>

#include "ring/ring.h"
#include "util/log.h"

struct device;
struct transport;

struct transport_options {
    struct device *const *devs; // the first one is the default
    unsigned nr_devs;
    const char *const *addrs; // as given on the command line
    unsigned nr_addrs;
    const int *listen_fds; // sockets that somebody opened for us (LISTEN_FDS)
    unsigned nr_listen_fds;
    unsigned max_connections;
    struct ring *ring; // the main thread's: the cold part of the transport runs there
};

struct transport_ops {
    const char *name; // also its option: --NAME
    // Required. Main thread. Begins to listen. 0 or a negative errno with err set.
    int (*start)(struct transport **transport, const struct transport_options *options, struct err *err);
    // Required. Main thread. Takes no new clients, lets what is in flight come to its end, and calls
    // stopped() on the main thread when nobody is left, which is in bounded time.
    void (*stop)(struct transport *transport, void (*stopped)(struct transport *transport, void *arg),
                 void *arg);
    // Required. After stopped(), when the main ring is gone: the ring may have been waiting for us.
    void (*destroy)(struct transport *transport);
};

struct transport {
    const struct transport_ops *ops;
};

extern const struct transport_ops nbd_transport_ops;

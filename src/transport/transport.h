// A transport speaks somebody's protocol and turns it into requests. Its words stay in its folder.
#pragma once

#include <stdbool.h>

#include "ring/ring.h"
#include "util/log.h"

struct device;
struct transport;

#define TRANSPORT_NR 1 // of them in the table

// What all transports of a process are told.
struct transport_options {
    struct device *const *devs; // the first one is the default
    unsigned nr_devs;
    const int *listen_fds; // sockets that somebody opened for us (LISTEN_FDS)
    unsigned nr_listen_fds;
    unsigned max_connections;
    struct ring *ring; // the main thread's: the cold part of the transport runs there
};

// The arguments of a transport's option, one for each time that it was given.
struct transport_addrs {
    const char **addrs;
    unsigned nr_addrs;
};

struct transport_ops {
    const char *name; // also its option: --NAME
    // Whether it takes over listen_fds.
    bool takes_listen_fds;
    // Required. Main thread. Begins to listen. 0 or a negative errno with err set.
    int (*start)(struct transport **transport, const struct transport_options *options,
                 const struct transport_addrs *addrs, struct err *err);
    // Required. Main thread. Takes no new clients, lets what is in flight come to its end, and calls
    // transport_stopped() on the main thread when nobody is left, which is in bounded time.
    void (*stop)(struct transport *transport);
    // Required. After transport_stopped(), when the main ring is gone: the ring may have been waiting
    // for us.
    void (*destroy)(struct transport *transport);
    // Optional. Main thread. The device's size or another limit has changed: clients are told where
    // the protocol can.
    void (*device_changed)(struct transport *transport, struct device *dev);
};

// All transports of a process.
struct transport_set {
    struct transport *transports[TRANSPORT_NR];
    unsigned nr_transports;
    unsigned nr_running; // not stopped
};

struct transport {
    const struct transport_ops *ops;
    struct transport_set *set;
};

extern const struct transport_ops *const transport_table[TRANSPORT_NR];
extern const struct transport_ops nbd_transport_ops;

// Starts those that have an address (addrs: TRANSPORT_NR of them, in the table's order) or take over
// listen_fds. Main thread. 0, or a negative errno with err set: then what has started is to be
// stopped and destroyed like the rest.
int transports_start(struct transport_set *set, const struct transport_options *options,
                     const struct transport_addrs *addrs, struct err *err);

// All of them; set->nr_running is 0 when they have stopped. Main thread.
void transports_stop(struct transport_set *set);
void transports_destroy(struct transport_set *set);
void transports_device_changed(struct transport_set *set, struct device *dev);

// For a transport: it has stopped. Main thread.
void transport_stopped(struct transport *transport);

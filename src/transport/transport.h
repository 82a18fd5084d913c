// A transport speaks somebody's protocol and turns it into requests. Its words stay in its folder.
//
//  T1. What has to outlive a worker process (a listening socket, a mount) is opened by hold() in the
//      process that starts workers, inherited by each of them, and used by start(). In bight serve
//      both are the same process. Holds are in memory that all of them share: the next worker finds the
//      facts that start() has added.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/ring.h"
#include "util/log.h"

struct device;
struct transport;

#define TRANSPORT_NR 4         // of them in the table
#define TRANSPORT_MAX_FDS 1024 // LISTEN_FDS that are taken over

// What hold() may want to know before there is a device.
struct transport_hold_options {
    const char *const *images; // of the devices, by path
    unsigned nr_images;
    const char *ring_name; // --ring
    unsigned nr_queues, depth;
    bool is_read_only;
    bool is_direct;                      // data goes to the image as it comes: nothing of ours looks at it
    bool is_supervised;                  // a worker that dies is followed by another one
    bool is_passthrough;                 // of struct device_options
    const struct transport_holds *holds; // what is held already; transports_hold() sets it
};

struct transport_hold {
    const struct transport_ops *ops;
    const char *addr;  // as given on the command line; NULL: a socket that came by LISTEN_FDS
    int fd;            // -1: none
    uint64_t facts[5]; // the transport's own: what a worker has to know of fd
};

// What a process is to serve to, in the table's order.
struct transport_holds {
    struct transport_hold *holds;
    unsigned nr_holds, max_holds;
};

// What all transports of a process are told.
struct transport_options {
    struct device *const *devs; // the first one is the default
    unsigned nr_devs;
    unsigned max_connections;
    uint64_t poll_ns;  // vhost-user: how long to look for more requests before sleeping
    struct ring *ring; // the main thread's: the cold part of the transport runs there
};

// The arguments of a transport's option, one for each time that it was given.
struct transport_addrs {
    const char **addrs;
    unsigned nr_addrs;
};

struct transport_ops {
    const char *name;      // also its option: --NAME
    bool takes_listen_fds; // they are held with addr NULL
    // Required. T1; cold, may block. hold->addr is set; sets fd and facts. 0 or a negative errno with
    // err set.
    int (*hold)(struct transport_hold *hold, const struct transport_hold_options *options, struct err *err);
    // Required. T1; nobody is served any more. Takes back what hold() did, and closes fd; also when
    // addr is NULL, when there was no hold(), and when fd is -1: those who had it are dead.
    void (*release)(struct transport_hold *hold);
    // Required. Main thread. Begins to serve. The holds live longer than the transport. 0 or a negative
    // errno with err set.
    int (*start)(struct transport **transport, const struct transport_options *options,
                 struct transport_hold *holds, unsigned nr_holds, struct err *err);
    // Required. Main thread. Takes no new clients, lets what is in flight come to its end, and calls
    // transport_stopped() on the main thread when nobody is left, which is in bounded time.
    void (*stop)(struct transport *transport);
    // Required. After transport_stopped(), when the main ring is gone: the ring may have been waiting
    // for us.
    void (*destroy)(struct transport *transport);
    // Optional. Any process that has the hold. The address for people and programs; without it, addr.
    void (*uri)(const struct transport_hold *hold, char *uri, unsigned uri_bytes);
    // Optional. Main thread. Who uses the device: -EBUSY with err naming them, or 0.
    int (*busy)(struct transport *transport, struct err *err);
    // Optional. Main thread. The device's size or another limit may have changed: clients are told where
    // the protocol can. 0, or a negative errno with err set where they should be, and cannot.
    int (*device_changed)(struct transport *transport, struct device *dev, struct err *err);
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
extern const struct transport_ops nbd_transport_ops, ublk_transport_ops, vhost_user_transport_ops,
    fuse_transport_ops;

// Holds every address of addrs (TRANSPORT_NR of them, in the table's order), and listen_fds. 0, or a
// negative errno with err set and nothing held.
int transports_hold(struct transport_holds *holds, const struct transport_addrs *addrs, const int *listen_fds,
                    unsigned nr_listen_fds, const struct transport_hold_options *options, struct err *err);
void transports_release(struct transport_holds *holds);

void transport_hold_uri(const struct transport_hold *hold, char *uri, unsigned uri_bytes);

// Starts those that something is held for. Main thread. 0, or a negative errno with err set: then what
// has started is to be stopped and destroyed like the rest.
int transports_start(struct transport_set *set, const struct transport_options *options,
                     const struct transport_holds *holds, struct err *err);

// All of them; set->nr_running is 0 when they have stopped. Main thread.
void transports_stop(struct transport_set *set);
void transports_destroy(struct transport_set *set);
// Tells all of them. 0, or a negative errno with err set by one that could not be told.
int transports_device_changed(struct transport_set *set, struct device *dev, struct err *err);

// -EBUSY with err naming who uses a device, or 0. Main thread.
int transports_busy(struct transport_set *set, struct err *err);

// For a transport: it has stopped. Main thread.
void transport_stopped(struct transport *transport);

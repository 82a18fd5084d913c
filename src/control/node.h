// The kernel's loop device on our FUSE file: what is to be done with it, each on a thread of its own: it
// waits for what the transport answers (K1 of transport/fuse/loop.h), which may need all workers that there
// are.
#pragma once

#include "ring/ring.h"
#include "transport/fuse/loop.h"

enum node_op {
    NODE_ATTACH,
    NODE_DETACH,
    NODE_DETACH_LAZY, // at its last close
    NODE_RESIZE,
    NODE_REREAD,    // other contents: what is cached of it is dropped
    NODE_READ_ONLY, // or not any more, as its options say now
};

struct node {
    struct ring *ring;
    unsigned *nr_pending;           // counts what is under way
    const char *path;               // the FUSE file; NULL: no loop device is wanted
    char device[LOOP_DEVICE_BYTES]; // "": there is none
    struct loop_options options;
};

// Has done() called with what came of it, on the ring's thread. Without a device, all but NODE_ATTACH is
// nothing to be done. Ring's thread.
void node_do(struct node *node, enum node_op op, void (*done)(void *arg, int error, const struct err *err),
             void *arg);

// Whether the device is still on the file at path, which is mounted.
bool node_is_there(const char *device, const char *path);

// The kernel's loop device on our FUSE file: what is to be done with it, each on a thread of its own: it
// waits for what the transport answers (K1 of transport/fuse/loop.h), which may need all workers that there
// are.
//
//  N1. The thread has it done by a process that was forked before there were threads and rings. Not even
//      SIGKILL ends who waits for a request that a worker has taken. Were that a thread of the worker, one
//      that is killed would keep its files, its memory and so its rings until the next one answers, which
//      starts when they are gone (P3 of supervisor.h).
//  N2. The process has open, beside stderr: a socket, whose other end is the worker's alone, and the pipe to
//      the guard of the mount, which so waits for what it is about to do (M1 of transport/fuse/mount.c).
#pragma once

#include <pthread.h>

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
    int process_fd;       // N2; -1: there is none, and the threads do without
    pthread_mutex_t lock; // of the process: one thing at a time
};

// N1: starts the process; its socket, or -1. To be closed before the mount is let go of. guard_fd: N2.
int node_start_process(const char *path, int guard_fd);

// Has done() called with what came of it, on the ring's thread. Without a device, all but NODE_ATTACH is
// nothing to be done. Ring's thread.
void node_do(struct node *node, enum node_op op, void (*done)(void *arg, int error, const struct err *err),
             void *arg);

// Whether the device is still on the file at path, which is mounted.
bool node_is_there(const char *device, const char *path);

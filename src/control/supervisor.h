// The process of an attached device that does no I/O: it holds what must survive, and starts a worker.
//
//  P1. It has one thread, forks the worker without exec, and never waits for it by other means than
//      poll(): a worker that hangs must not hang it.
//  P2. It holds the transports' holds, the control socket, the lock on the run directory and a
//      descriptor of the image (with the image's locks): the worker inherits them.
//  P3. The next worker starts when the one before is dead and the kernel has taken its rings apart, so
//      that nothing of it is in flight any more. Each ring has the other end of a pipe (ring_guard_fd).
//  P4. A worker that stopped because it was asked to is not replaced. One that was killed is, at once. It is
//      given up, and what is held let go of (who waits gets errors), after MAX_VAIN_DEATHS in a row of
//      workers that served nothing and did not live for LONG_LIFE_SEC, and, for what kills who serves it
//      beside requests that do not, after MAX_DEATHS in DEATHS_SEC.
//  P5. A worker whose supervisor has died goes on, and cleans up itself when it is detached.
#pragma once

#include "control/state.h"
#include "control/worker.h"

struct supervisor_options {
    struct worker_options worker; // of one image; holds is what the supervisor holds
    struct transport_holds *holds;
    struct state *dir;
    int answer_fd;         // for supervisor_tell()
    bool is_json;          // that line is JSON
    int metrics_fd;        // that listens for who wants them, or -1
    const char *node_path; // a FUSE file to put a loop device on, or NULL
    bool is_partscan;      // of that
};

// Tells who waits for the device: on fd, the device behind a '+', or what is wrong behind a '-' or (usage) a
// '?'. fd -1: on stdout and stderr, as it is.
void supervisor_tell(int fd, char kind, const char *text);

// Serves until the device is detached, and releases the holds. 0 or a negative errno with err set; where
// that is empty, it has been logged, and answer_fd was told of a device before.
int supervisor_run(const struct supervisor_options *options, struct err *err);

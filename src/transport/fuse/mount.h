// Mounting, the first words with the kernel, and unmounting whatever happens. Cold; in the process that
// outlives workers.
#pragma once

#include "transport/transport.h"

// Indices of struct transport_hold's facts.
enum {
    FUSE_FACT_PAYLOAD, // bytes of data in the largest request
    FUSE_FACT_GUARD,   // pid of the guard
    FUSE_FACT_PIPE,    // fd of the pipe to it
    FUSE_FACT_CPUS,    // queues of the kernel's io_uring channel; 0: there is none
    FUSE_FACT_BACKING, // F5 of fuse.h: what the kernel calls the image; 0: it was not told yet
};

int fuse_hold(struct transport_hold *hold, const struct transport_hold_options *options, struct err *err);
void fuse_release(struct transport_hold *hold);

// A range that is being written back.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct wb_sync {
    uint64_t start, end; // bytes of the device
    uint64_t placed_end; // no DELAYED page from before the sync lies before it, but for FAILED ones
    uint64_t cursor;     // what lies before it was looked at
    atomic_uint nr_writes;
    uint64_t nr_unblocks_seen;
    bool is_gathered; // the cursor has come to the end
    bool is_blocked;  // something had to be left out
    atomic_int error; // the first
};

// fastfs: I/O goes to the blocks under the file system. What can be asked without doing it.
#pragma once

#include <stdint.h>

#include "util/log.h"

// The file system that a file is in, and what it stands on.
struct fastfs_place {
    const char *fs; // "ext4" or "XFS"
    char device[256];
    uint64_t rdev; // dev_t of device
    uint32_t block_bytes;
};

// Whether the I/O of this file may be redirected, as far as the file and its file system go: 0, or a
// negative errno with err set. Cold.
int fastfs_check(int fd, const char *path, struct fastfs_place *place, struct err *err);

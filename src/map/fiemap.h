// Where the file system keeps a file's bytes: FS_IOC_FIEMAP (linux/fiemap.h), put in order.
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum file_state {
    FILE_HOLE,
    FILE_WRITTEN,   // plainly, at physical_bytes of the device, and nobody else's
    FILE_UNWRITTEN, // allocated, reads as zeroes
    FILE_SHARED,    // with another file: a write moves it
    FILE_OTHER,     // delayed, inline, encoded, not aligned, unknown
    FILE_NR_STATES,
};

struct file_extent {
    uint64_t start_bytes, len_bytes;
    enum file_state state;
    uint64_t physical_bytes; // WRITTEN, UNWRITTEN, SHARED: on the device under the file system
};

// A non-zero result ends the walk, which returns it.
typedef int (*fiemap_take)(void *arg, const struct file_extent *ext);

// A walk over [at, end) of a file: what the kernel tells goes in, extents without gaps come out.
struct fiemap_walk {
    uint64_t at, end;     // at: a multiple of block_bytes
    uint32_t block_bytes; // of the file system: what is not aligned to it is FILE_OTHER
    fiemap_take take;
    void *arg;
};

struct fiemap_extent;

// The next one that the kernel told. 0, what take() returned, or -EIO for what makes no sense. Pure but
// for take().
int fiemap_next(struct fiemap_walk *walk, const struct fiemap_extent *ext);

// The rest is a hole.
int fiemap_end(struct fiemap_walk *walk);

// The whole walk, by the kernel's word on fd. Cold. is_synced: dirty pages are written first, so that
// nothing is delayed. 0, what take() returned, or a negative errno (-EOPNOTSUPP: the file system has no
// FIEMAP).
int fiemap_run(int fd, struct fiemap_walk *walk, bool is_synced);

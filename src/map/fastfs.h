// fastfs: I/O goes to the blocks under the file system, as long as nobody else can change where they are.
//
//  F1. Nothing is redirected but under a write lease on the image. redirect_until_ns is how long the
//      keeper has seen that we have it, and half of lease-break-time more: a process that was stopped
//      longer than the kernel waits for it finds that its time is over. 0: not now.
//      A process that is killed has the lease until its I/O is over: it belongs to the struct file, which
//      each ring with I/O in flight pins (R6 of ring.h). Where somebody else keeps that open, as a supervisor
//      does, the next keeper drops the lease, and is started when those rings have gone (P3 of supervisor.h).
//  F2. redirect_until_ns goes from a time to 0 when it is over or the lease is broken, and from there to a
//      time again only behind a barrier, with no region in the map: what was written by way of the file
//      meanwhile, and not marked (X2 of extent_map.h), is known to the kernel by then.
//  F3. A punch (DISCARD, WRITE_ZEROES) begins when its regions are closed and no I/O to places in them is
//      in flight, and they open again, with nothing in them, when it is over: else a write could hit a
//      block that belongs to another file by now.
//  F4. There is one struct file. To open the image again, by any path, would break our own lease.
//  F5. While redirecting begins there are no dirty pages of the file (fdatasync under the lease), and no
//      page of it stays in the cache, then and when it ends: others would read what was there before. With
//      pages that somebody holds it does not begin.
#pragma once

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>

#include "map/extent_map.h"
#include "map/map.h"
#include "ring/ring.h"
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

// The part of it that whoever opens the file can change (chattr).
int fastfs_check_file(int fd, const char *path, struct err *err);

struct fastfs {
    struct map map;
    _Atomic uint64_t redirect_until_ns; // F1
    struct extent_map extents;          // of the file, not of the device
    atomic_bool is_refill_asked, has_marks;
    struct ring_op refill_op;

    // The keeper's: a thread that owns the lease and the extent map.
    struct fastfs_place place;
    struct err *open_err; // for the first attempt
    pthread_t thread;
    sem_t sem; // the first attempt is over; a stop is over
    int open_ret;
    struct ring *ring;
    int signal_fd;
    struct ring_op signal_op, tick_op, stop_op;
    struct ring_hook work_hook;
    struct map_call *calls;   // to do
    struct map_call *punches; // under way
    bool is_in;               // between enter() and leave()
    bool is_sampled, is_stopped, is_ending;
    uint64_t retry_ns;      // until the next attempt to get the lease
    const char *why_not;    // not redirecting
    uint64_t file_bytes;    // as of the last adjust()
    struct map_status sums; // of the extents in the map
    // For fastfs_describe().
    pthread_mutex_t lock;
    struct map_status status;
};

// fastfs_keeper.c, fastfs_open.c; cold.
int fastfs_open(struct map *map, struct err *err);
int fastfs_adjust(struct map *map, struct image *image, struct err *err);
void fastfs_stop(struct map *map);
void fastfs_close(struct map *map);
void fastfs_call(struct map *map, struct map_call *call);
void fastfs_describe(struct map *map, struct map_status *status);

void *fastfs_keeper(void *arg);

// The image has file_bytes now. No queue looks at the map meanwhile. Any thread but the keeper's.
void fastfs_grow(struct fastfs *fastfs, uint64_t file_bytes);

// Compares some of the file with what the device has at those places. 0, or a negative errno with err set.
int fastfs_sample(struct fastfs *fastfs, struct err *err);

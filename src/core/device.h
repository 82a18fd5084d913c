// A device: an image, a map, an io, and the queues that serve it.
#pragma once

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>

#include "core/flush.h"
#include "core/limits.h"
#include "image/image.h"
#include "ring/ring.h"
#include "util/log.h"

struct image;
struct io;
struct map;
struct queue;
struct rq;
struct writeback;

#define DEVICE_NAME_MAX 4096

struct device_options {
    const char *name;
    const char *io;  // "direct", "buffered", "null" or "fault:SPEC"
    const char *map; // "linear" or "fastfs"
    const struct ring_ops *ring;
    unsigned nr_queues;
    unsigned depth;
    uint32_t block_bytes;            // 0: any
    uint64_t writeback_bytes;        // of memory for write-back; 0: none
    uint64_t allocation_unit_bytes;  // of write-back; 0: WRITEBACK_UNIT_BYTES
    uint64_t extent_size_hint_bytes; // set on the image; 0: not
    bool is_passthrough;             // who has its FUSE file open reads and writes the image without us
    struct queue_stats *stats;       // of nr_queues queues, who goes on counting; NULL: the device's own
    struct image_options image;
};

// A freeze: all queues of the device idle, new requests held back.
struct freeze {
    // Required. Called once all queues are frozen, on the thread of one of them; ends (now or later)
    // with device_unfreeze().
    void (*frozen)(struct freeze *freeze);
    struct freeze *next;
};

struct device {
    char *name;
    struct device_options options; // with strings of our own

    // Changed by the main thread, and only while all queues are frozen (change.c).
    struct image *image;
    struct map *map;
    struct io *io;
    struct limits limits;
    struct durability durability;
    unsigned depth;
    unsigned nr_queues;
    struct queue *queues;
    struct queue_stats *own_stats;               // or NULL: options.stats
    struct writeback *writeback;                 // NULL: requests go straight to map and io
    atomic_uint next_queue;                      // for device_pick_queue()
    atomic_int flush_error;                      // sticky (core/flush.c F2)
    _Atomic uint64_t nr_image_writes, nr_synced; // core/flush.c F4

    // Freezes are done one after the other, first come first served.
    pthread_mutex_t freeze_lock;
    struct freeze *freezes; // the first is the active one
    atomic_uint nr_unfrozen_queues;

    pthread_mutex_t
        barrier_lock; // one barrier at a time; also nr_queues, until queues run and when they do not
    atomic_uint nr_barrier_queues;
    sem_t barrier_over;
};

// Opens the image and starts the queues. 0 or a negative errno with err set.
int device_create(struct device **out, const char *image_path, const struct device_options *options,
                  struct err *err);

// Ends the queues' threads. No transport uses the device any more. 0, or the error of a last flush.
int device_stop(struct device *dev);

// After workers_stop(), see R5 in ring/ring.h.
void device_destroy(struct device *dev);

// Has freeze->frozen() called when nothing is in flight. Any thread.
void device_freeze(struct device *dev, struct freeze *freeze);

// Ends the active freeze. Any thread.
void device_unfreeze(struct device *dev);

// Returns when every part of a request that was with the io has come back, and every queue has been told
// since. Any thread but a queue's; not from a worker, which such a part may be waiting for.
void device_barrier(struct device *dev);

// What follows from options, and from the image and the io that it has now. For change.c. Main thread, frozen
// or not started.
int device_take(struct device *dev, const struct device_options *options);

// The write-back that options want on these, or NULL. 0 or a negative errno with err set.
int device_create_writeback(struct writeback **writeback, struct device *dev,
                            const struct device_options *options, const struct image *image, struct map *map,
                            struct io *io, struct err *err);

// One of the queues (lifecycle.c), in turn. Any thread.
struct queue *device_pick_queue(struct device *dev);

// 0, or what the request is to be answered: range, read-only, alignment. Pure; hot.
int device_check(const struct limits *limits, const struct rq *rq);

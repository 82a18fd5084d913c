// How a device begins and ends, and how it is frozen. Cold.
//
//  L1. A freeze: one message to each queue; each tells the device when it is idle; the last one to
//      do so calls frozen(). All queues are idle from then until device_unfreeze().
//  L2. Freezes do not overlap: the next one begins after the end of the one before.
//  L3. While a queue is frozen its ring has nothing of the image registered: another image may take the
//      place of this one.

#include <assert.h>
#include <errno.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "io/io.h"
#include "map/map.h"
#include "util/util.h"
#include "writeback/writeback.h"

static void queue_add_fds(struct queue *queue)
{
    ring_pin_fd(queue->ring, queue->dev->image->fd); // its locks and its lease last as long as its I/O
    if (queue->dev->map->device_fd >= 0)
        ring_add_fd(queue->ring, queue->dev->map->device_fd);
}

static void queue_remove_fds(struct queue *queue)
{
    ring_remove_fd(queue->ring, queue->dev->image->fd);
    if (queue->dev->map->device_fd >= 0)
        ring_remove_fd(queue->ring, queue->dev->map->device_fd);
}

static void queue_freeze(struct ring_op *op, int res)
{
    struct queue *queue = container_of(op, struct queue, freeze_op);

    (void)res;
    queue->is_frozen = true;
    queue->is_freeze_due = true;
    if (!queue->nr_inflight)
        queue_tell_frozen(queue);
}

static void queue_unfreeze(struct ring_op *op, int res)
{
    struct queue *queue = container_of(op, struct queue, unfreeze_op);

    (void)res;
    queue->is_frozen = false;
    queue->limits = queue->dev->limits;
    queue_add_fds(queue); // L3
    queue_restart_held(queue);
}

void queue_tell_frozen(struct queue *queue)
{
    struct device *dev = queue->dev;

    queue->is_freeze_due = false;
    queue_remove_fds(queue); // L3
    if (atomic_fetch_sub(&dev->nr_unfrozen_queues, 1) == 1) {
        struct freeze *active;

        pthread_mutex_lock(&dev->freeze_lock);
        active = dev->freezes;
        pthread_mutex_unlock(&dev->freeze_lock);
        active->frozen(active); // L1
    }
}

// freeze_lock held.
static void device_begin_freeze(struct device *dev)
{
    atomic_store(&dev->nr_unfrozen_queues, dev->nr_queues);
    for (unsigned i = 0; i < dev->nr_queues; i++)
        ring_post(dev->queues[i].ring, &dev->queues[i].freeze_op, 0);
}

void device_freeze(struct device *dev, struct freeze *freeze)
{
    struct freeze **at = &dev->freezes;

    freeze->next = NULL;
    pthread_mutex_lock(&dev->freeze_lock);
    while (*at)
        at = &(*at)->next;
    *at = freeze;
    if (dev->freezes == freeze)
        device_begin_freeze(dev); // L2
    pthread_mutex_unlock(&dev->freeze_lock);
}

void device_unfreeze(struct device *dev)
{
    pthread_mutex_lock(&dev->freeze_lock);
    assert(dev->freezes);
    dev->freezes = dev->freezes->next;
    // Each queue gets this message before that of the next freeze: R4 of ring/ring.h.
    for (unsigned i = 0; i < dev->nr_queues; i++)
        ring_post(dev->queues[i].ring, &dev->queues[i].unfreeze_op, 0);
    if (dev->freezes)
        device_begin_freeze(dev); // L2
    pthread_mutex_unlock(&dev->freeze_lock);
}

static void queue_barrier(struct ring_op *op, int res)
{
    struct queue *queue = container_of(op, struct queue, barrier_op);

    (void)res;
    assert(!queue->nr_parts[queue->phase ^ 1]); // the barrier before this one
    queue->phase ^= 1;
    queue->is_barrier_due = true;
    if (!queue->nr_parts[queue->phase ^ 1])
        queue_tell_barrier(queue);
}

void queue_tell_barrier(struct queue *queue)
{
    struct device *dev = queue->dev;

    queue->is_barrier_due = false;
    if (atomic_fetch_sub(&dev->nr_barrier_queues, 1) == 1)
        sem_post(&dev->barrier_over);
}

void device_barrier(struct device *dev)
{
    pthread_mutex_lock(&dev->barrier_lock);
    if (dev->nr_queues) {
        atomic_store(&dev->nr_barrier_queues, dev->nr_queues);
        for (unsigned i = 0; i < dev->nr_queues; i++)
            ring_post(dev->queues[i].ring, &dev->queues[i].barrier_op, 0);
        while (sem_wait(&dev->barrier_over) < 0)
            ; // EINTR
    }
    pthread_mutex_unlock(&dev->barrier_lock);
}

static void queue_stop(struct ring_op *op, int res)
{
    struct queue *queue = container_of(op, struct queue, stop_op);

    (void)res;
    queue->is_stopping = true;
}

struct queue_start {
    struct queue *queue;
    const struct ring_ops *ring_ops;
    sem_t started;
    int ret;
    struct err err;
};

static void *queue_main(void *arg)
{
    struct queue_start *start = arg;
    struct queue *queue = start->queue;
    int ret = ring_create(start->ring_ops, &queue->ring, &start->err); // R1

    prctl(PR_SET_TIMERSLACK, 1000); // ns: waits for a batch are short (ring/uring.c)

    start->ret = ret;
    if (!ret)
        queue_add_fds(queue);
    sem_post(&start->started); // start is gone after this
    if (ret < 0)
        return NULL;
    while (!queue->is_stopping || queue->nr_inflight) {
        ret = ring_run(queue->ring);
        if (ret < 0) {
            log_line("queue %u of %s: ring: %s; cannot go on", queue->index, queue->dev->name,
                     strerror(-ret));
            abort(); // requests in flight could not be answered any more
        }
    }
    // The kernel takes a ring apart after the process has ended: what is still registered would stay
    // open until then, and a file system busy.
    queue_remove_fds(queue);
    return NULL;
}

static int queue_start(struct device *dev, struct queue *queue, const struct ring_ops *ring_ops,
                       struct err *err)
{
    struct queue_start start = {.queue = queue, .ring_ops = ring_ops};
    sigset_t all, old;
    int ret;

    queue->held_tail = &queue->held;
    plug_init(&queue->plug);
    queue->limits = dev->limits;
    queue->freeze_op.done = queue_freeze;
    queue->unfreeze_op.done = queue_unfreeze;
    queue->barrier_op.done = queue_barrier;
    queue->stop_op.done = queue_stop;
    sem_init(&start.started, 0, 0);
    sigfillset(&all);        // signals are for the main thread
    sigdelset(&all, SIGBUS); // but this: memory that a client shares may go away
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = -pthread_create(&queue->thread, NULL, queue_main, &start);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (ret < 0) {
        err_set(err, ret, "%s: starting a thread: %s; use fewer --queues", dev->name, strerror(-ret));
        goto out;
    }
    while (sem_wait(&start.started) < 0)
        ; // EINTR
    ret = start.ret;
    if (ret < 0) {
        pthread_join(queue->thread, NULL);
        *err = start.err;
    }
out:
    sem_destroy(&start.started);
    return ret;
}

static void device_stop_queues(struct device *dev, unsigned nr_started)
{
    for (unsigned i = 0; i < nr_started; i++)
        ring_post(dev->queues[i].ring, &dev->queues[i].stop_op, 0);
    for (unsigned i = 0; i < nr_started; i++)
        pthread_join(dev->queues[i].thread, NULL);
}

static int device_start_queues(struct device *dev, const struct device_options *options, struct err *err)
{
    int ret;

    dev->queues = aligned_alloc(64, options->nr_queues * sizeof(*dev->queues));
    if (!dev->queues)
        return err_set(err, -ENOMEM, "%s: out of memory", dev->name);
    memset(dev->queues, 0, options->nr_queues * sizeof(*dev->queues));
    if (!options->stats)
        dev->own_stats = calloc(options->nr_queues, sizeof(*dev->own_stats));
    if (!options->stats && !dev->own_stats) {
        free(dev->queues);
        return err_set(err, -ENOMEM, "%s: out of memory", dev->name);
    }
    for (unsigned i = 0; i < options->nr_queues; i++) {
        struct queue *queue = &dev->queues[i];

        queue->dev = dev;
        queue->index = i;
        queue->stats = options->stats ? &options->stats[i] : &dev->own_stats[i];
        atomic_store(&queue->stats->nr_inflight,
                     0); // what was under way in a worker that died is not any more
        ret = queue_start(dev, queue, options->ring, err);
        if (ret < 0) {
            device_stop_queues(dev, i);
            for (unsigned j = 0; j < i; j++)
                ring_destroy(dev->queues[j].ring);
            free(dev->queues);
            return ret;
        }
    }
    pthread_mutex_lock(&dev->barrier_lock);
    dev->nr_queues = options->nr_queues;
    pthread_mutex_unlock(&dev->barrier_lock);
    return 0;
}

int device_take(struct device *dev, const struct device_options *options)
{
    char *io = strdup(options->io), *map = strdup(options->map);

    if (!io || !map) {
        free(io);
        free(map);
        return -ENOMEM;
    }
    free((char *)dev->options.io);
    free((char *)dev->options.map);
    dev->options = *options;
    dev->options.name = dev->name;
    dev->options.io = io;
    dev->options.map = map;
    dev->options.image.is_open = false; // that was the first one
    dev->limits = limits_of(dev->image, options->block_bytes);
    if (dev->writeback) // whose size is what the user wants to be taken
        dev->limits.max_buf_bytes = WRITEBACK_BUF_BYTES / options->nr_queues;
    dev->durability = flush_durability(&(struct durability_in){
        .is_read_only = dev->image->is_read_only,
        .is_stored = dev->io->ops->is_stored,
        .is_sync = dev->image->is_sync,
        .has_writeback = dev->writeback,
        .has_device_fd = dev->map->device_fd >= 0,
    });
    return 0;
}

int device_create_writeback(struct writeback **writeback, struct device *dev,
                            const struct device_options *options, const struct image *image, struct map *map,
                            struct io *io, struct err *err)
{
    uint64_t unit_bytes = options->allocation_unit_bytes;

    *writeback = NULL;
    if (!options->writeback_bytes || image->is_read_only)
        return 0;
    return writeback_create(writeback, dev,
                            &(struct writeback_options){
                                .size_bytes = options->writeback_bytes,
                                .unit_bytes = unit_bytes ? unit_bytes : WRITEBACK_UNIT_BYTES,
                            },
                            image, map, io, err);
}

static void device_free(struct device *dev)
{
    pthread_mutex_destroy(&dev->freeze_lock);
    pthread_mutex_destroy(&dev->barrier_lock);
    sem_destroy(&dev->barrier_over);
    free((char *)dev->options.io);
    free((char *)dev->options.map);
    free(dev->image);
    free(dev->own_stats);
    free(dev->name);
    free(dev);
}

// Whether what goes to the image past us finds there what it would get from us. No request of other
// transports is smaller than a block of the image then: filling it up would undo what comes past us.
static int device_pass(struct device_options *options, struct image *image, struct err *err)
{
    uint32_t block_bytes = max_of(image->dio_offset_align, SECTOR_BYTES);

    if (strcmp(options->io, "direct") || strcmp(options->map, "linear") || options->writeback_bytes)
        return err_usage(err, "--passthrough: goes past --io, --map and --writeback; leave it or them out");
    if (options->image.offset_bytes || options->image.size_limit_bytes)
        return err_usage(err, "--passthrough: serves all of an image; leave --offset and --size-limit out");
    if (image->is_block_device || !image->is_direct)
        return err_usage(err, "--passthrough: %s: %s; leave it out", image->path,
                         image->is_block_device ? "is no regular file" : "its file system has no direct I/O");
    if (options->block_bytes && options->block_bytes < block_bytes)
        return err_usage(err,
                         "--block-size: %s takes blocks of %u bytes; use that, or leave --passthrough out",
                         image->path, block_bytes);
    options->block_bytes = max_of(options->block_bytes, block_bytes);
    image->is_passed = true;
    return 0;
}

int device_create(struct device **out, const char *image_path, const struct device_options *options,
                  struct err *err)
{
    struct device_options taken = *options;
    struct device *dev = calloc(1, sizeof(*dev));
    int ret;

    if (!dev)
        return err_set(err, -ENOMEM, "%s: out of memory", options->name);
    pthread_mutex_init(&dev->freeze_lock, NULL);
    pthread_mutex_init(&dev->barrier_lock, NULL);
    sem_init(&dev->barrier_over, 0, 0);
    dev->depth = options->depth;
    dev->name = strdup(options->name);
    dev->image = calloc(1, sizeof(*dev->image));
    if (!dev->name || !dev->image) {
        ret = err_set(err, -ENOMEM, "%s: out of memory", options->name);
        goto out_free;
    }
    taken.image.want_direct = io_wants_direct(options->io);
    ret = image_open(dev->image, image_path, &taken.image, err);
    if (ret < 0)
        goto out_free;
    if (options->is_passthrough)
        ret = device_pass(&taken, dev->image, err);
    if (!ret && options->extent_size_hint_bytes)
        ret = image_set_extent_size_hint(dev->image, options->extent_size_hint_bytes, err);
    if (ret < 0)
        goto out_image;
    ret = io_create(&dev->io, dev, dev->image, options->io, err);
    if (ret < 0)
        goto out_image;
    ret = map_create(&dev->map, options->map, dev, dev->image, err);
    if (ret < 0)
        goto out_io;
    ret = map_adjust(dev->map, dev->image, err);
    if (!ret)
        ret = device_create_writeback(&dev->writeback, dev, &taken, dev->image, dev->map, dev->io, err);
    if (ret < 0)
        goto out_map;
    ret = device_take(dev, &taken);
    if (ret < 0) {
        err_set(err, ret, "%s: out of memory", dev->name);
        goto out_writeback;
    }
    ret = device_start_queues(dev, options, err);
    if (ret < 0)
        goto out_writeback;
    *out = dev;
    return 0;

out_writeback:
    if (dev->writeback)
        writeback_destroy(dev->writeback);
out_map:
    map_destroy(dev->map);
out_io:
    io_destroy(dev->io);
out_image:
    image_close(dev->image);
out_free:
    device_free(dev);
    return ret;
}

struct queue *device_pick_queue(struct device *dev)
{
    return &dev->queues[atomic_fetch_add(&dev->next_queue, 1) % dev->nr_queues];
}

// What write-back still holds, before the queues end.
static int device_drain(struct device *dev)
{
    uint64_t lost_bytes;
    int error;

    if (!dev->writeback)
        return 0;
    error = writeback_drain_wait(dev->writeback, &lost_bytes);
    if (lost_bytes)
        log_line("%s: %llu bytes could not be written (%s) and are lost", dev->name,
                 (unsigned long long)lost_bytes, strerror(-error));
    return error;
}

int device_stop(struct device *dev)
{
    int error = device_drain(dev);

    map_stop(dev->map);
    device_stop_queues(dev, dev->nr_queues);
    return error ? error : flush_all(dev);
}

void device_destroy(struct device *dev)
{
    for (unsigned i = 0; i < dev->nr_queues; i++)
        ring_destroy(dev->queues[i].ring);
    free(dev->queues);
    if (dev->writeback)
        writeback_destroy(dev->writeback);
    map_destroy(dev->map);
    io_destroy(dev->io);
    image_close(dev->image);
    device_free(dev);
}

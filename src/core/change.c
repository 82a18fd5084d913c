// Changes of a device in use. Cold.
//
//  H1. The way of a change: a freeze; what is new is opened, and what is old is flushed, on a worker
//      (it may block); the main thread puts the new in place of the old; unfreeze. A failure before that
//      has changed nothing.
//  H2. What is old is closed behind a second freeze: a freeze that the old io had asked for (range_lock.c)
//      is over by then.
//  H3. Changes do not overlap: L2 of lifecycle.c.
//  H5. What write-back holds is drained first, while frozen; write-back itself is always made anew.
//  H4. Who was told that there is no volatile cache would not flush: a device does not come to have one.

#include "core/change.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/holder.h"
#include "io/io.h"
#include "map/map.h"
#include "util/util.h"

// ---- What can be asked for

static int set_io(struct device_options *options, const char *value)
{
    options->io = value;
    return strcmp(value, "null") ? 0 : -EINVAL; // H4
}

static int set_map(struct device_options *options, const char *value)
{
    options->map = value;
    return 0;
}

static int set_readonly(struct device_options *options, const char *value)
{
    options->image.is_read_only = !strcmp(value, "on");
    return options->image.is_read_only || !strcmp(value, "off") ? 0 : -EINVAL;
}

static int set_writeback(struct device_options *options, const char *value)
{
    return writeback_parse(value, &options->writeback_bytes);
}

static const struct setting {
    const char *key, *values;
    // value stays as long as the change. -EINVAL: no such value.
    int (*set)(struct device_options *options, const char *value);
} settings[] = {
    {"readonly", "on or off", set_readonly},
    {"io", "direct, buffered or fault:SPEC", set_io},
    {"map", "linear or fastfs", set_map},
    {"writeback", "off, on or a size from 1M on", set_writeback},
};

const char *device_change_key(unsigned i, const char **values)
{
    if (i >= ARRAY_SIZE(settings))
        return NULL;
    *values = settings[i].values;
    return settings[i].key;
}

// What comes past us would not notice.
static int change_refuse_passed(struct device_change *change)
{
    if (!change->dev->options.is_passthrough)
        return 0;
    return err_set(&change->err, -EBUSY,
                   "%s: the kernel reads and writes the image without us (--passthrough); detach it, and "
                   "attach it without that",
                   change->dev->name);
}

int device_change_set(struct device_change *change, const char *key, const char *value)
{
    struct device_options scratch = {0};

    if (change_refuse_passed(change) < 0)
        return -EBUSY;
    for (unsigned i = 0; i < ARRAY_SIZE(settings); i++) {
        const struct setting *setting = &settings[i];

        if (strcmp(key, setting->key))
            continue;
        if (setting->set(&scratch, value) < 0)
            return err_usage(&change->err, "%s=%s: no such value; use %s", key, value, setting->values);
        if (change->nr_sets == DEVICE_CHANGE_MAX_SETS)
            return err_usage(&change->err, "%s: too many settings; set some of them first", key);
        change->sets[change->nr_sets].setting = setting;
        change->sets[change->nr_sets].value = strdup(value);
        if (!change->sets[change->nr_sets].value)
            return err_set(&change->err, -ENOMEM, "out of memory");
        change->nr_sets++;
        return 0;
    }
    return err_usage(&change->err, "%s: cannot be changed; see bight-set(1) for what can be", key);
}

int device_change_image(struct device_change *change, const char *path)
{
    if (change_refuse_passed(change) < 0)
        return -EBUSY;
    free(change->path);
    change->path = strdup(path);
    return change->path ? 0 : err_set(&change->err, -ENOMEM, "out of memory");
}

// ---- On a worker, frozen

// The same file, for writing, where it was opened for reading only.
static int change_reopen(struct device_change *change)
{
    struct image *old = change->dev->image;
    struct image_options options = change->options.image;
    char path[32];
    int ret;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", old->fd);
    options.fd = open(path, O_RDWR | O_CLOEXEC | (old->is_block_device ? O_EXCL : 0));
    if (options.fd < 0)
        return err_set(&change->err, -errno, "%s: %s; it stays read-only", old->path, strerror(errno));
    options.is_open = true;
    image_unlock(old->fd); // they would be in each other's way
    ret = image_open(change->image, old->path, &options, &change->err);
    if (ret < 0)
        image_lock(old->fd, true);
    return ret;
}

static int change_open_image(struct device_change *change)
{
    int ret;

    change->image = calloc(1, sizeof(*change->image));
    if (!change->image)
        return err_set(&change->err, -ENOMEM, "out of memory");
    ret = change->path ? image_open(change->image, change->path, &change->options.image, &change->err)
                       : change_reopen(change);
    if (ret < 0) {
        free(change->image);
        change->image = NULL;
        return ret;
    }
    if (change->path && change->image->size_bytes != change->dev->image->size_bytes)
        return err_set(&change->err, -EINVAL, "%s: has %llu bytes, %s has %llu; the sizes have to match",
                       change->path, (unsigned long long)change->image->size_bytes, change->dev->image->path,
                       (unsigned long long)change->dev->image->size_bytes);
    return 0;
}

// Of the image that stays.
static int change_adjust_image(struct device_change *change)
{
    const struct image *image = change->dev->image;
    const struct image_options *options = &change->options.image;
    char holder[64];
    int ret;

    ret = image_remeasure(&change->next, image, options, &change->err);
    change->is_changed = !ret;
    if (!ret && options->want_direct != change->dev->options.image.want_direct) {
        struct image measured = change->next;

        ret = image_set_direct(&change->next, &measured, options->want_direct, &change->err);
    }
    if (!ret && options->is_read_only != image->is_read_only) {
        ret = image_lock(image->fd, options->is_read_only);
        if (ret < 0) {
            image_lock(image->fd, image->is_read_only);
            image_holder(image->fd, holder, sizeof(holder));
            return err_set(&change->err, ret, "%s: %s has it open; it stays read-only", image->path, holder);
        }
        change->next.is_read_only = options->is_read_only;
    }
    return ret;
}

// Another name for the file that is there already.
static bool change_is_same(const struct device_change *change)
{
    struct stat there, wanted;

    if (fstat(change->dev->image->fd, &there) < 0 || stat(change->path, &wanted) < 0)
        return false;
    if (S_ISBLK(there.st_mode))
        return S_ISBLK(wanted.st_mode) && there.st_rdev == wanted.st_rdev;
    return there.st_dev == wanted.st_dev && there.st_ino == wanted.st_ino;
}

static int change_flush(struct device_change *change)
{
    int error = flush_all(change->dev);

    return error ? err_set(&change->err, error, "%s: flushing: %s; what was written last may be lost",
                           change->dev->image->path, strerror(-error))
                 : 0;
}

static int change_open_io(struct device_change *change)
{
    struct device *dev = change->dev;
    const struct image *image = change->image ? change->image : &change->next;
    int ret = io_create(&change->io, dev, image, change->options.io, &change->err);

    if (ret < 0)
        return ret;
    if (!change->image)
        change->io->image = dev->image; // which becomes next
    if (change->io->ops->is_stored != dev->io->ops->is_stored)
        return err_usage(&change->err, "io=%s: %s is in use; detach it, and attach it with --io %s",
                         change->options.io, dev->io->ops->name, change->options.io); // H4
    return 0;
}

// On what is new, measured anew.
static int change_create_writeback(struct device_change *change)
{
    struct device *dev = change->dev;
    const struct image *image = change->image ? change->image : &change->next;
    int ret = device_create_writeback(&change->writeback, dev, &change->options, image,
                                      change->map ? change->map : dev->map, change->io ? change->io : dev->io,
                                      &change->err);

    if (!ret && change->writeback && !dev->writeback && !dev->image->is_read_only &&
        !dev->durability.has_volatile_cache)
        return err_usage(&change->err,
                         "writeback: %s has no volatile cache, and its clients know that; detach it, "
                         "and attach it with --writeback",
                         dev->image->path); // H4
    return ret;
}

static int change_open(struct device_change *change)
{
    struct device *dev = change->dev;
    const struct device_options *options = &change->options, *now = &dev->options;
    bool is_writable;
    int ret = change_flush(change);

    if (ret < 0)
        return ret;
    change->old_flags = fcntl(dev->image->fd, F_GETFL);
    is_writable = (change->old_flags & O_ACCMODE) == O_RDWR;
    if (change->path && change_is_same(change)) {
        device_change_end(change);
        ret = change_adjust_image(change);
        if (!ret && change->next.size_bytes != dev->image->size_bytes)
            ret =
                err_set(&change->err, -EINVAL,
                        "%s: is its image already, and has another size; use bight resize", dev->image->path);
    } else if (change->path || (!options->image.is_read_only && !is_writable))
        ret = change_open_image(change);
    else
        ret = change_adjust_image(change);
    if (!ret && (change->image || strcmp(options->io, now->io)))
        ret = change_open_io(change);
    if (!ret && (change->image || strcmp(options->map, now->map)))
        ret = map_create(&change->map, options->map, dev, change->image ? change->image : dev->image,
                         &change->err);
    if (!ret)
        ret = map_adjust(change->map ? change->map : dev->map, change->image ? change->image : &change->next,
                         &change->err);
    return ret ? ret : change_create_writeback(change);
}

static void change_close(struct device_change *change)
{
    if (change->writeback)
        writeback_destroy(change->writeback);
    if (change->io)
        io_destroy(change->io);
    if (change->map)
        map_destroy(change->map);
    if (change->image) {
        image_close(change->image);
        free(change->image);
    }
    change->writeback = NULL;
    change->io = NULL;
    change->map = NULL;
    change->image = NULL;
}

// Back to what the image was.
static void change_undo(struct device_change *change)
{
    const struct image *image = change->dev->image;

    if (change->is_changed) {
        if (change->next.buffered_fd != image->buffered_fd)
            close(change->next.buffered_fd);
        fcntl(image->fd, F_SETFL, change->old_flags);
        image_lock(image->fd, image->is_read_only);
    }
    if (change->image && !change->path) { // change_reopen()
        image_unlock(change->image->fd);
        image_lock(image->fd, image->is_read_only);
    }
    change_close(change);
}

static int change_work(struct ring_op *op)
{
    struct device_change *change = container_of(op, struct device_change, op);
    int ret = change_open(change);

    if (ret < 0)
        change_undo(change);
    return ret;
}

static int change_close_work(struct ring_op *op)
{
    change_close(container_of(op, struct device_change, op));
    return 0;
}

// ---- From thread to thread

static void change_to_worker(struct device_change *change, int (*work)(struct ring_op *op),
                             void (*done)(struct ring_op *op, int res))
{
    change->op = (struct ring_op){.done = done, .code = RING_CALL, .call = work};
    ring_queue(change->ring, &change->op);
}

static void change_to_main(struct device_change *change, void (*done)(struct ring_op *op, int res))
{
    change->op = (struct ring_op){.done = done};
    ring_post(change->ring, &change->op, 0);
}

static void change_over(struct device_change *change)
{
    device_change_end(change);
    change->done(change, change->error);
}

static void change_closed(struct ring_op *op, int res)
{
    struct device_change *change = container_of(op, struct device_change, op);

    (void)res;
    device_unfreeze(change->dev);
    change_over(change);
}

static void change_may_close(struct ring_op *op, int res)
{
    (void)res;
    change_to_worker(container_of(op, struct device_change, op), change_close_work, change_closed);
}

static void change_frozen_again(struct freeze *freeze)
{
    change_to_main(container_of(freeze, struct device_change, freeze), change_may_close);
}

// The device has all that is new; change has what was there before. Main thread.
static void change_swap(struct device_change *change)
{
    struct device *dev = change->dev;
    struct writeback *old_writeback;

    if (change->image) {
        struct image *old = dev->image;

        dev->image = change->image;
        change->image = old;
    }
    if (change->is_changed)
        image_take(dev->image, &change->next);
    if (change->io) {
        struct io *old = dev->io;

        dev->io = change->io;
        change->io = old;
    }
    if (change->map) {
        struct map *old = dev->map;

        dev->map = change->map;
        change->map = old;
    }
    old_writeback = dev->writeback;
    dev->writeback = change->writeback;
    change->writeback = old_writeback;
    change->error = device_take(dev, &change->options); // no memory: the options stay untold
}

static void change_opened(struct ring_op *op, int res)
{
    struct device_change *change = container_of(op, struct device_change, op);
    bool has_old;

    change->error = res;
    if (!res)
        change_swap(change); // H1
    if (!res && change->committed)
        change->committed(change);
    has_old = change->io || change->map || change->image || change->writeback;
    device_unfreeze(change->dev);
    if (!has_old) {
        change_over(change);
        return;
    }
    change->freeze.frozen = change_frozen_again; // H2
    device_freeze(change->dev, &change->freeze);
}

static void change_drained(struct ring_op *op, int res)
{
    struct device_change *change = container_of(op, struct device_change, op);

    if (!res) {
        change_to_worker(change, change_work, change_opened);
        return;
    }
    err_set(&change->err, res, "%s: %s: what is cached cannot be written; nothing was changed",
            change->dev->image->path, strerror(-res));
    change_opened(op, res);
}

// First queue's thread.
static void change_drain_done(struct writeback_drain *drain, int error, uint64_t lost_bytes)
{
    struct device_change *change = container_of(drain, struct device_change, drain);

    (void)lost_bytes;
    change->op = (struct ring_op){.done = change_drained};
    ring_post(change->ring, &change->op, error);
}

static void change_may_open(struct ring_op *op, int res)
{
    struct device_change *change = container_of(op, struct device_change, op);
    struct device_options *options = &change->options;

    (void)res;
    *options = change->dev->options; // H3: as the changes before this one have left them
    for (unsigned i = 0; i < change->nr_sets; i++)
        change->sets[i].setting->set(options, change->sets[i].value);
    options->image.want_direct = io_wants_direct(options->io);
    if (change->dev->writeback) // H5
        writeback_drain(change->dev->writeback, &change->drain);
    else
        change_to_worker(change, change_work, change_opened);
}

static void change_frozen(struct freeze *freeze)
{
    change_to_main(container_of(freeze, struct device_change, freeze), change_may_open);
}

void device_change_init(struct device_change *change, struct device *dev, struct ring *ring,
                        void (*done)(struct device_change *change, int error))
{
    *change = (struct device_change){
        .dev = dev,
        .ring = ring,
        .done = done,
        .freeze.frozen = change_frozen,
        .drain.done = change_drain_done,
    };
}

void device_change_start(struct device_change *change)
{
    device_freeze(change->dev, &change->freeze);
}

void device_change_end(struct device_change *change)
{
    while (change->nr_sets)
        free(change->sets[--change->nr_sets].value);
    free(change->path);
    change->path = NULL;
}

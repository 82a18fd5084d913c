// How fastfs begins and ends. Cold. Invariants: fastfs.h.

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/device.h"
#include "image/image.h"
#include "map/fastfs.h"
#include "map/fiemap.h"
#include "util/util.h"

#define SAMPLES 8
#define SAMPLE_TRIES 5 // somebody may write there just now
#define SAMPLE_PAUSE_US 2000

static int open_device(struct fastfs *fastfs, struct err *err)
{
    const struct image *image = fastfs->map.image;
    const char *path = image->path, *device = fastfs->place.device;
    int sector_bytes;

    fastfs->map.device_fd = open(device, (image->is_read_only ? O_RDONLY : O_RDWR) | O_DIRECT | O_CLOEXEC);
    if (fastfs->map.device_fd < 0 && errno == EBUSY)
        return err_set(
            err, -EBUSY,
            "%s: fastfs: %s: this kernel lets nobody write to a device that is mounted; boot it with "
            "bdev_allow_write_mounted=1, or use --map linear",
            path, device);
    if (fastfs->map.device_fd < 0)
        return err_set(err, -errno, "%s: fastfs: %s: %s; run as root, or use --map linear", path, device,
                       strerror(errno));
    if (ioctl(fastfs->map.device_fd, BLKSSZGET, &sector_bytes) < 0 || sector_bytes <= 0 ||
        (uint32_t)sector_bytes > fastfs->place.block_bytes)
        return err_set(err, -EINVAL,
                       "%s: fastfs: %s: its sectors are larger than the file system's blocks of %u "
                       "bytes; use --map linear",
                       path, device, fastfs->place.block_bytes);
    return 0;
}

int fastfs_adjust(struct map *map, struct image *image, struct err *err)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);
    uint32_t block = fastfs->place.block_bytes;

    if (!image->is_direct)
        return err_set(err, -EINVAL, "%s: fastfs: goes past the page cache; use --io direct, or --map linear",
                       image->path);
    if (image->offset_bytes % block)
        return err_set(
            err, -EINVAL,
            "%s: fastfs: --offset %llu is no multiple of the file system's block (%u); use another one, or "
            "--map linear",
            image->path, (unsigned long long)image->offset_bytes, block);
    // A write to a part of the file's last block would need O_DIRECT off, and so a second struct file: F4.
    if (!image->is_read_only &&
        image->offset_bytes + image->size_bytes > round_down(image->file_bytes, block))
        return err_set(
            err, -EINVAL,
            "%s: fastfs: its size is no multiple of the file system's block (%u): truncate -s %%%u makes it "
            "one; or use --map linear",
            image->path, block, block);
    // F5: smaller writes are read-modify-write of whole blocks here, and punches are cut to whole blocks. The
    // file system would do the former (XFS, where blocks are shared) and zero the edges of the latter in its
    // page cache, and write them back when newer data are on the device.
    image->dio_offset_align = max_of(image->dio_offset_align, block);
    image->sector_bytes = max_of(image->sector_bytes, block);
    fastfs_grow(fastfs, image->file_bytes);
    return 0;
}

static int read_block(int fd, void *buf, uint32_t len, uint64_t offset)
{
    ssize_t n = pread(fd, buf, len, (off_t)offset);

    return n == (ssize_t)len ? 0 : n < 0 ? -errno : -EIO;
}

static int sample_block(struct fastfs *fastfs, const struct file_extent *ext, char *buf, struct err *err)
{
    uint32_t block = fastfs->place.block_bytes;
    const char *path = fastfs->map.image->path;
    int ret = 0;

    for (unsigned i = 0; i < SAMPLE_TRIES; i++) {
        ret = read_block(fastfs->map.image->fd, buf, block, ext->start_bytes);
        if (!ret)
            ret = read_block(fastfs->map.device_fd, buf + block, block, ext->physical_bytes);
        if (ret < 0)
            return err_set(err, ret, "%s: fastfs: reading a sample from it and from %s: %s; use --map linear",
                           path, fastfs->place.device, strerror(-ret));
        if (!memcmp(buf, buf + block, block))
            return 0;
        usleep(SAMPLE_PAUSE_US);
    }
    return err_set(err, -EIO,
                   "%s: fastfs: %s has something else at byte %llu than the file at %llu; use --map linear",
                   path, fastfs->place.device, (unsigned long long)ext->physical_bytes,
                   (unsigned long long)ext->start_bytes);
}

// Ends a walk with 1 at the first block that can be compared.
static int take_sample(void *arg, const struct file_extent *ext)
{
    struct file_extent *sample = arg;

    *sample = *ext;
    return ext->state == FILE_WRITTEN;
}

int fastfs_sample(struct fastfs *fastfs, struct err *err)
{
    const struct image *image = fastfs->map.image;
    uint32_t block = fastfs->place.block_bytes;
    uint64_t end = round_down(image->file_bytes, block);
    char *buf;
    int ret = 0;

    if (posix_memalign((void **)&buf, 4096, 2ULL * block))
        return err_set(err, -ENOMEM, "%s: out of memory", image->path);
    for (unsigned i = 0; i < SAMPLES && ret >= 0; i++) {
        struct file_extent sample;
        struct fiemap_walk walk = {.at = round_down(end / SAMPLES * i, block),
                                   .end = end,
                                   .block_bytes = block,
                                   .take = take_sample,
                                   .arg = &sample};

        ret = fiemap_run(image->fd, &walk, false);
        if (ret < 0)
            err_set(err, ret, "%s: fastfs: FIEMAP: %s; use --map linear", image->path, strerror(-ret));
        else if (ret)
            ret = sample_block(fastfs, &sample, buf, err);
    }
    free(buf);
    return ret < 0 ? ret : 0;
}

int fastfs_open(struct map *map, struct err *err)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);
    const struct image *image = map->image;
    sigset_t all, old;
    int ret = fastfs_check(image->fd, image->path, &fastfs->place, err);

    if (ret < 0)
        return ret;
    ret = open_device(fastfs, err);
    if (ret < 0)
        goto out_device;
    ret = extent_map_create(&fastfs->extents, image->file_bytes);
    if (ret < 0) {
        err_set(err, ret, "%s: out of memory", image->path);
        goto out_device;
    }
    pthread_mutex_init(&fastfs->lock, NULL);
    sem_init(&fastfs->sem, 0, 0);
    fastfs->open_err = err;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = -pthread_create(&fastfs->thread, NULL, fastfs_keeper, fastfs);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (ret < 0) {
        err_set(err, ret, "%s: starting a thread: %s", image->path, strerror(-ret));
        goto out_map;
    }
    while (sem_wait(&fastfs->sem) < 0)
        ; // EINTR
    ret = fastfs->open_ret;
    if (!ret)
        return 0;
    pthread_join(fastfs->thread, NULL);
out_map:
    sem_destroy(&fastfs->sem);
    pthread_mutex_destroy(&fastfs->lock);
    extent_map_destroy(&fastfs->extents);
out_device:
    if (map->device_fd >= 0)
        close(map->device_fd);
    return ret;
}

static void stop(struct fastfs *fastfs, bool is_ending)
{
    ring_post(fastfs->ring, &fastfs->stop_op, is_ending);
    while (sem_wait(&fastfs->sem) < 0)
        ; // EINTR
}

void fastfs_stop(struct map *map)
{
    stop(container_of(map, struct fastfs, map), false);
}

void fastfs_close(struct map *map)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);

    stop(fastfs, true);
    pthread_join(fastfs->thread, NULL);
    ring_destroy(fastfs->ring); // which still polls signal_fd
    close(fastfs->signal_fd);
    sem_destroy(&fastfs->sem);
    pthread_mutex_destroy(&fastfs->lock);
    extent_map_destroy(&fastfs->extents);
    close(map->device_fd);
}

void fastfs_describe(struct map *map, struct map_status *status)
{
    struct fastfs *fastfs = container_of(map, struct fastfs, map);

    pthread_mutex_lock(&fastfs->lock);
    *status = fastfs->status;
    pthread_mutex_unlock(&fastfs->lock);
}

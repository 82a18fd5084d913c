// A device in memory on each kind of ring, for the targets that talk to one.
#pragma once

#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "util/util.h"

#define DEVICE_BYTES (64 * KiB + 777)

static struct device *devs[2];
static struct ring *the_main_ring;

static struct device *make_device(const char *ring_name)
{
    struct device_options options = {
        .name = "fuzz", .io = "buffered", .map = "linear", .nr_queues = 1, .depth = 8};
    int fd = memfd_create("disk", MFD_CLOEXEC);
    struct device *dev;
    struct err err;
    char path[40];

    must(fd >= 0 && !ftruncate(fd, DEVICE_BYTES));
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    options.ring = ring_choose(ring_name, &err);
    must(options.ring);
    must(!device_create(&dev, path, &options, &err));
    close(fd);
    return dev;
}

static void make_devices(void)
{
    struct err err;

    devs[0] = make_device("auto");
    devs[1] = make_device("threads");
    must(!ring_create(devs[0]->queues[0].ring->ops, &the_main_ring, &err));
}

#include "transport/fuse/loop.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "transport/holders.h"
#include "util/util.h"

// Others look for free devices as well, and may be quicker each time: with hundreds at once, often.
#define LOOP_TRIES 1000
#define LOOP_PAUSE_US 2000

static int loop_open(const char *device, int flags, struct err *err)
{
    int fd = open(device, flags | O_CLOEXEC);

    return fd < 0 ? err_set(err, -errno, "%s: %s; attach as root, or without a loop device", device,
                            strerror(errno))
                  : fd;
}

static int loop_configure(int fd, int backing_fd, const char *path, const struct loop_options *options)
{
    struct loop_config config = {
        .fd = (uint32_t)backing_fd,
        .block_size = options->block_bytes,
        .info.lo_flags = (options->is_read_only ? LO_FLAGS_READ_ONLY : 0U) |
                         (options->is_partscan ? LO_FLAGS_PARTSCAN : 0U) |
                         (options->is_buffered ? 0U : LO_FLAGS_DIRECT_IO),
    };

    snprintf((char *)config.info.lo_file_name, sizeof(config.info.lo_file_name), "%s", path);
    return ioctl(fd, LOOP_CONFIGURE, &config) < 0 ? -errno : 0;
}

int loop_attach(char device[LOOP_DEVICE_BYTES], const char *path, const struct loop_options *options,
                struct err *err)
{
    int access = options->is_read_only ? O_RDONLY : O_RDWR, backing_fd, control_fd, ret = -EBUSY;

    backing_fd = open(path, access | O_CLOEXEC | (options->is_buffered ? 0 : O_DIRECT));
    if (backing_fd < 0)
        return err_set(err, -errno, "%s: %s", path, strerror(errno));
    control_fd = loop_open("/dev/loop-control", O_RDWR, err);
    if (control_fd < 0) {
        close(backing_fd);
        return control_fd;
    }
    for (unsigned i = 0; i < LOOP_TRIES && (ret == -EBUSY || ret == -ENXIO || ret == -ENOENT); i++) {
        int number = ioctl(control_fd, LOOP_CTL_GET_FREE), fd;

        if (number < 0) {
            ret = -errno;
            break;
        }
        snprintf(device, LOOP_DEVICE_BYTES, "/dev/loop%d", number);
        fd = open(device, access | O_CLOEXEC);
        ret = fd < 0 ? -errno : loop_configure(fd, backing_fd, path, options);
        if (fd >= 0)
            close(fd);
        if (ret < 0)
            usleep(LOOP_PAUSE_US); // somebody was quicker, or udev makes the node
    }
    if (ret < 0)
        err_set(err, ret, "%s: %s: %s; use --fuse without a loop device", path, "loop device",
                strerror(-ret));
    close(control_fd);
    close(backing_fd);
    return ret;
}

int loop_detach(const char *device, const char *path, bool is_lazy, struct err *err)
{
    char backing[PATH_MAX], holders[300];
    int fd = loop_open(device, O_RDONLY, err), ret = 0;

    if (fd < 0)
        return fd;
    // K2. What is unmounted is called "/".
    if (loop_backing_file(device, backing, sizeof(backing)) < 0 ||
        (strcmp(backing, path) && strcmp(backing, "/")))
        goto out;
    if (!is_lazy && holders_of_device(device, holders, sizeof(holders))) {
        ret = err_set(err, -EBUSY, "%s: %s; end that first, or use --lazy", device, holders);
        goto out;
    }
    // With somebody else on it, the kernel makes this the last close's business.
    if (ioctl(fd, LOOP_CLR_FD) < 0 && errno != ENXIO)
        ret = err_set(err, -errno, "%s: %s", device, strerror(errno));
out:
    close(fd);
    return ret;
}

int loop_resize(const char *device, struct err *err)
{
    int fd = loop_open(device, O_RDONLY, err), ret;

    if (fd < 0)
        return fd;
    ret = ioctl(fd, LOOP_SET_CAPACITY) < 0 ? -errno : 0;
    close(fd);
    return ret < 0 ? err_set(err, ret, "%s: its new size: %s", device, strerror(-ret)) : 0;
}

// The base name of a device's node: "loop3".
static const char *loop_name(const char *device)
{
    const char *slash = strrchr(device, '/');

    return slash ? slash + 1 : device;
}

int loop_backing_file(const char *device, char *path, size_t path_bytes)
{
    char name[100];
    FILE *file;

    snprintf(name, sizeof(name), "/sys/block/%s/loop/backing_file", loop_name(device));
    file = fopen(name, "re");
    if (!file)
        return errno == ENOENT ? -ENXIO : -errno;
    if (!fgets(path, (int)path_bytes, file))
        *path = '\0';
    fclose(file);
    path[strcspn(path, "\n")] = '\0';
    return 0;
}

unsigned loop_find(const char *path, char (*devices)[LOOP_DEVICE_BYTES], unsigned max)
{
    DIR *dir = opendir("/sys/block");
    char backing[PATH_MAX];
    struct dirent *entry;
    unsigned nr = 0;

    while (dir && nr < max && (entry = readdir(dir))) {
        if (strncmp(entry->d_name, "loop", 4) || strlen(entry->d_name) >= LOOP_DEVICE_BYTES - 5 ||
            loop_backing_file(entry->d_name, backing, sizeof(backing)) < 0 || strcmp(backing, path))
            continue;
        snprintf(devices[nr++], LOOP_DEVICE_BYTES, "/dev/%.20s", entry->d_name);
    }
    if (dir)
        closedir(dir);
    return nr;
}

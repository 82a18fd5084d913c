#include "transport/fuse/loop.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

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

int loop_detach(const char *device, bool is_lazy, struct err *err)
{
    char holders[300];
    int fd, ret;

    if (!is_lazy && loop_holders(device, holders, sizeof(holders)))
        return err_set(err, -EBUSY, "%s: %s; end that first, or use --lazy", device, holders);
    fd = loop_open(device, O_RDONLY, err);
    if (fd < 0)
        return fd;
    // With somebody else on it, the kernel makes this the last close's business.
    ret = ioctl(fd, LOOP_CLR_FD) < 0 ? -errno : 0;
    close(fd);
    if (ret < 0 && ret != -ENXIO)
        return err_set(err, ret, "%s: %s", device, strerror(-ret));
    return 0;
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

// ---- Who has it

struct holders {
    char *text;
    size_t left;
    dev_t devs[64]; // the device and its partitions
    unsigned nr_devs;
    const char *file; // or this
};

__attribute__((format(printf, 2, 3))) static void holders_add(struct holders *holders, const char *fmt, ...)
{
    va_list args;
    int n;

    if (holders->left < 2)
        return;
    va_start(args, fmt);
    n = vsnprintf(holders->text, holders->left, fmt, args);
    va_end(args);
    n = min_of(n, (int)holders->left - 1);
    holders->text += n;
    holders->left -= (size_t)n;
}

static bool holders_have(const struct holders *holders, dev_t dev)
{
    for (unsigned i = 0; i < holders->nr_devs; i++) {
        if (holders->devs[i] == dev)
            return true;
    }
    return false;
}

// "7:3".
static dev_t parse_dev(const char *text)
{
    char *colon;
    unsigned long major = strtoul(text, &colon, 10);

    return *colon == ':' ? makedev((unsigned)major, (unsigned)strtoul(colon + 1, NULL, 10)) : 0;
}

static void holders_add_dev(struct holders *holders, const char *sys_path)
{
    char path[700], text[40];
    FILE *file;

    snprintf(path, sizeof(path), "%s/dev", sys_path);
    file = fopen(path, "re");
    if (!file)
        return;
    if (fgets(text, sizeof(text), file) && holders->nr_devs < ARRAY_SIZE(holders->devs))
        holders->devs[holders->nr_devs++] = parse_dev(text);
    fclose(file);
}

// What device mapper, md and their like have built on it.
static void holders_add_stacked(struct holders *holders, const char *sys_path)
{
    char path[700];
    struct dirent *entry;
    DIR *dir;

    snprintf(path, sizeof(path), "%s/holders", sys_path);
    dir = opendir(path);
    while (dir && (entry = readdir(dir))) {
        if (entry->d_name[0] != '.')
            holders_add(holders, "used by %s, ", entry->d_name);
    }
    if (dir)
        closedir(dir);
}

static void holders_look_at(struct holders *holders, const char *sys_path)
{
    holders_add_dev(holders, sys_path);
    holders_add_stacked(holders, sys_path);
}

// The number of a file system of several devices, such as btrfs, is none of a device: its source tells one.
static bool holders_have_source(const struct holders *holders, const char *rest)
{
    const char *source = rest ? strstr(rest, " - ") : NULL;
    char path[PATH_MAX];
    struct stat st;

    return source && sscanf(source, " - %*s %4095s", path) == 1 && !strncmp(path, "/dev/", 5) &&
           !stat(path, &st) && S_ISBLK(st.st_mode) && holders_have(holders, st.st_rdev);
}

// proc(5), mountinfo: fields 3 and 5 are major:minor and the mount point; type and source follow a dash.
static void holders_add_mounts(struct holders *holders)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t line_bytes = 0;

    while (file && getline(&line, &line_bytes, file) > 0) {
        char *rest = line, *fields[5];

        for (unsigned i = 0; i < ARRAY_SIZE(fields); i++)
            fields[i] = strsep(&rest, " ");
        if (fields[4] && (holders_have(holders, parse_dev(fields[2])) || holders_have_source(holders, rest)))
            holders_add(holders, "mounted on %s, ", fields[4]);
    }
    free(line);
    if (file)
        fclose(file);
}

static bool process_has_open(const struct holders *holders, const char *pid)
{
    char path[600];
    struct dirent *entry;
    struct stat st;
    bool has = false;
    DIR *dir;

    snprintf(path, sizeof(path), "/proc/%s/fd", pid);
    dir = opendir(path);
    while (dir && !has && (entry = readdir(dir))) {
        char target[PATH_MAX];
        ssize_t n;

        // Only what looks like a device is asked for more: a stat of a file on a dead server would hang.
        snprintf(path, sizeof(path), "/proc/%s/fd/%s", pid, entry->d_name);
        n = readlink(path, target, sizeof(target) - 1);
        if (n > 0 && holders->file) {
            target[n] = '\0';
            has = !strcmp(target, holders->file);
            continue;
        }
        if (n < 5 || strncmp(target, "/dev/", 5))
            continue;
        has = !stat(path, &st) && S_ISBLK(st.st_mode) && holders_have(holders, st.st_rdev);
    }
    if (dir)
        closedir(dir);
    return has;
}

static void holders_add_openers(struct holders *holders)
{
    DIR *dir = opendir("/proc");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        char path[300], name[32] = "";
        FILE *file;

        if (!isdigit((unsigned char)entry->d_name[0]) || strtol(entry->d_name, NULL, 10) == getpid() ||
            !process_has_open(holders, entry->d_name))
            continue;
        snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
        file = fopen(path, "re");
        if (file && fgets(name, sizeof(name), file))
            name[strcspn(name, "\n")] = '\0';
        if (file)
            fclose(file);
        holders_add(holders, "opened by %s (%s), ", name, entry->d_name);
    }
    if (dir)
        closedir(dir);
}

static bool holders_end(struct holders *holders, const char *text)
{
    if (holders->text == text)
        return false;
    if (holders->text - text >= 2 && !strcmp(holders->text - 2, ", "))
        holders->text[-2] = '\0';
    return true;
}

bool loop_file_holders(const char *path, char *text, size_t text_bytes)
{
    struct holders holders = {.text = text, .left = text_bytes, .file = path};

    *text = '\0';
    holders_add_openers(&holders);
    return holders_end(&holders, text);
}

// By a mount, also in another namespace, by swap, by a volume: the kernel lets nobody else have it then.
static bool is_claimed(const char *device)
{
    int fd = open(device, O_RDONLY | O_EXCL | O_CLOEXEC);

    if (fd >= 0)
        close(fd);
    return fd < 0 && errno == EBUSY;
}

bool loop_holders(const char *device, char *text, size_t text_bytes)
{
    struct holders holders = {.text = text, .left = text_bytes};
    const char *name = loop_name(device);
    char path[300];
    struct dirent *entry;
    DIR *dir;

    *text = '\0';
    snprintf(path, sizeof(path), "/sys/block/%s", name);
    holders_look_at(&holders, path);
    dir = opendir(path);
    while (dir && (entry = readdir(dir))) { // partitions: loop3p1
        char part[600];

        if (strncmp(entry->d_name, name, strlen(name)))
            continue;
        snprintf(part, sizeof(part), "%s/%s", path, entry->d_name);
        holders_look_at(&holders, part);
    }
    if (dir)
        closedir(dir);
    holders_add_mounts(&holders);
    holders_add_openers(&holders);
    if (holders.text == text && is_claimed(device))
        holders_add(&holders, "in use, as swap, in a volume, or where it cannot be seen from here, ");
    return holders_end(&holders, text);
}

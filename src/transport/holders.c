#include "transport/holders.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "util/util.h"

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

bool holders_of_file(const char *path, char *text, size_t text_bytes)
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

bool holders_of_device(const char *device, char *text, size_t text_bytes)
{
    struct holders holders = {.text = text, .left = text_bytes};
    const char *slash = strrchr(device, '/'), *name = slash ? slash + 1 : device;
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

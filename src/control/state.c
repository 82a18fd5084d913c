#include "control/state.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/util.h"

#define REMOVE_TRIES 100
#define REMOVE_PAUSE_US 20000
#define MAX_NUMBER 1000000       // NAME-2...
#define MAX_FILE_BYTES (1 << 20) // of state_read()

// All that is ever in a directory.
static const char *const files[] = {"command", "control", "state",    "log",
                                    "data",    "nbd",     ".command", ".state"};

static bool is_name_char(char c)
{
    return isalnum((unsigned char)c) || c == '.' || c == '_' || c == '-';
}

bool state_is_name(const char *name)
{
    size_t len = strlen(name);

    if (!len || len > STATE_NAME_MAX || name[0] == '.' || name[0] == '-')
        return false;
    for (; *name; name++) {
        if (!is_name_char(*name) || (unsigned char)*name >= 0x80)
            return false;
    }
    return true;
}

void state_name_of(const char *image_path, char name[STATE_NAME_MAX + 1])
{
    const char *slash = strrchr(image_path, '/'), *base = slash ? slash + 1 : image_path;
    const char *dot = strrchr(base, '.');
    size_t len = dot && dot > base ? (size_t)(dot - base) : strlen(base);

    len = min_of(len, STATE_NAME_MAX - 8); // room for a number
    for (size_t i = 0; i < len; i++)
        name[i] = is_name_char(base[i]) && (unsigned char)base[i] < 0x80 ? base[i] : '_';
    name[len] = '\0';
    if (!len)
        strcpy(name, "image");
    if (name[0] == '.' || name[0] == '-')
        name[0] = '_';
}

// ---- BASE

// Room for a name and a socket's: sockets have 108 bytes in all.
static int base_check(const char *path, int len, struct err *err)
{
    if (path[0] != '/' || len >= STATE_PATH_MAX - STATE_NAME_MAX - 16)
        return err_set(err, -EINVAL, "%s: no good place for sockets and state; set BIGHT_RUN_DIR", path);
    return 0;
}

static int base_path(char path[STATE_PATH_MAX], struct err *err)
{
    const char *asked = getenv("BIGHT_RUN_DIR"), *runtime = getenv("XDG_RUNTIME_DIR");
    int len;

    if (asked && *asked)
        len = snprintf(path, STATE_PATH_MAX, "%s", asked);
    else if (!geteuid())
        len = snprintf(path, STATE_PATH_MAX, "/run/bight");
    else if (runtime && *runtime)
        len = snprintf(path, STATE_PATH_MAX, "%s/bight", runtime);
    else
        return err_set(
            err, -ENOENT,
            "no place for sockets and state: XDG_RUNTIME_DIR is not set; set it, or BIGHT_RUN_DIR, "
            "to a directory of yours");
    return base_check(path, len, err);
}

// Opens BASE, and makes it where there is none. path: without links, as the kernel names what is mounted and
// attached there. A file descriptor, or a negative errno with err set.
static int base_open(char path[STATE_PATH_MAX], struct err *err)
{
    int ret = base_path(path, err), fd;
    char real[PATH_MAX];
    struct stat st;

    if (ret < 0)
        return ret;
    if (mkdir(path, 0755) < 0 && errno != EEXIST)
        return err_set(err, -errno, "%s: %s; make it, or set BIGHT_RUN_DIR", path, strerror(errno));
    if (!realpath(path, real))
        return err_set(err, -errno, "%s: %s", path, strerror(errno));
    ret = base_check(real, (int)strlen(real), err);
    if (ret < 0)
        return ret;
    strcpy(path, real);
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, -errno, "%s: %s", path, strerror(errno));
    // Somebody else's directory would be somebody else's sockets.
    if (fstat(fd, &st) < 0 || (st.st_uid != geteuid() && st.st_uid)) {
        close(fd);
        return err_set(err, -EPERM, "%s: belongs to another user; set BIGHT_RUN_DIR", path);
    }
    return fd;
}

// A signal is no reason to go on without.
static int lock(int fd, int how)
{
    int ret;

    do {
        ret = flock(fd, how);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : 0;
}

// ---- NAME

static void state_set(struct state *state, const char *base, const char *name)
{
    snprintf(state->name, sizeof(state->name), "%s", name);
    snprintf(state->path, sizeof(state->path), "%.*s/%s", STATE_PATH_MAX - STATE_NAME_MAX - 2, base,
             state->name);
}

static int state_make(struct state *state, const char *base, const char *name, bool is_exact, struct err *err)
{
    char tried[STATE_NAME_MAX + 1];

    snprintf(tried, sizeof(tried), "%s", name);
    for (unsigned n = 2; n < MAX_NUMBER; n++) {
        state_set(state, base, tried);
        if (!mkdir(state->path, 0700))
            return 0;
        if (errno != EEXIST)
            return err_set(err, -errno, "%s: %s", state->path, strerror(errno));
        if (is_exact)
            return err_set(err, -EEXIST, "%s: is attached already; use another --name, or bight detach %s",
                           name, name);
        snprintf(tried, sizeof(tried), "%.*s-%u", STATE_NAME_MAX - 8, name, n);
    }
    return err_set(err, -EEXIST, "%s: too many of that name; use --name", name);
}

int state_claim(struct state *state, const char *name, bool is_exact, struct err *err)
{
    char base[STATE_PATH_MAX];
    int base_fd = base_open(base, err), ret;

    if (base_fd < 0)
        return base_fd;
    lock(base_fd, LOCK_EX); // Y2
    ret = state_make(state, base, name, is_exact, err);
    if (!ret) {
        state->fd = open(state->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        ret = state->fd < 0 ? -errno : lock(state->fd, LOCK_EX); // Y1; who looks at it is done soon
        if (ret < 0)
            err_set(err, ret, "%s: %s", state->path, strerror(-ret));
    }
    close(base_fd);
    return ret;
}

int state_open(struct state *state, const char *name, struct err *err)
{
    char base[STATE_PATH_MAX];
    int ret = base_path(base, err);

    if (ret < 0)
        return ret;
    state_set(state, base, name);
    state->fd = state_is_name(name) ? open(state->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (state->fd < 0)
        return err_set(err, state_is_name(name) ? -errno : -ENOENT,
                       "%s: no device of that name; see bight list", name);
    return 0;
}

void state_close(struct state *state)
{
    if (state->fd >= 0)
        close(state->fd);
    state->fd = -1;
}

// Y2: a directory that has just been made has its lock already.
static int state_lock(const struct state *state, int how)
{
    char base[STATE_PATH_MAX];
    int base_fd = base_open(base, &(struct err){.line = ""}), ret;

    if (base_fd >= 0)
        lock(base_fd, LOCK_SH);
    ret = lock(state->fd, how | LOCK_NB);
    if (base_fd >= 0)
        close(base_fd);
    return ret;
}

bool state_is_alive(const struct state *state)
{
    int ret = state_lock(state, LOCK_SH);

    if (!ret)
        lock(state->fd, LOCK_UN);
    return ret < 0;
}

bool state_take_dead(const struct state *state)
{
    return !state_lock(state, LOCK_EX);
}

void state_wait_dead(const struct state *state)
{
    lock(state->fd, LOCK_EX);
}

// Y3. An empty one is of an attach that did not come further.
static bool is_device(const char *base, const char *name)
{
    char path[STATE_PATH_MAX + STATE_NAME_MAX];
    struct dirent *entry;
    bool has_command = false, is_empty = true;
    DIR *dir;

    snprintf(path, sizeof(path), "%s/%s", base, name);
    dir = opendir(path);
    while (dir && (entry = readdir(dir))) {
        has_command |= !strcmp(entry->d_name, files[0]);
        is_empty &= entry->d_name[0] == '.';
    }
    if (dir)
        closedir(dir);
    return dir && (has_command || is_empty);
}

void state_remove(const struct state *state)
{
    char base[STATE_PATH_MAX];
    int base_fd = base_open(base, &(struct err){.line = ""});
    struct stat ours, there;

    if (base_fd >= 0)
        lock(base_fd, LOCK_EX); // Y2
    // Only if it is the same one still, and a device's.
    if (base_fd >= 0 && !fstat(state->fd, &ours) && !stat(state->path, &there) &&
        ours.st_ino == there.st_ino && is_device(base, state->name)) {
        // A file that is mounted on is about to be unmounted (transport/fuse/mount.c, M1).
        for (unsigned i = 0; i < REMOVE_TRIES; i++) {
            for (unsigned f = ARRAY_SIZE(files); f--;) // Y3: the first one last
                unlinkat(state->fd, files[f], 0);
            if (!rmdir(state->path) || (errno != ENOTEMPTY && errno != EBUSY))
                break;
            usleep(REMOVE_PAUSE_US);
        }
    }
    if (base_fd >= 0)
        close(base_fd);
}

int state_each(void (*each)(const char *name, void *arg), void *arg, struct err *err)
{
    char base[STATE_PATH_MAX];
    struct dirent **entries;
    int ret = base_path(base, err), nr;

    if (ret < 0)
        return ret;
    nr = scandir(base, &entries, NULL, versionsort);
    if (nr < 0)
        return errno == ENOENT ? 0 : err_set(err, -errno, "%s: %s", base, strerror(errno));
    for (int i = 0; i < nr; i++) {
        if (state_is_name(entries[i]->d_name) && is_device(base, entries[i]->d_name))
            each(entries[i]->d_name, arg);
        free(entries[i]);
    }
    free(entries);
    return 0;
}

char *state_read(const struct state *state, const char *file)
{
    int fd = openat(state->fd, file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    char *text = fd < 0 ? NULL : calloc(1, MAX_FILE_BYTES + 1);
    ssize_t n = text ? read(fd, text, MAX_FILE_BYTES) : -1;

    if (fd >= 0)
        close(fd);
    if (n >= 0)
        return text;
    free(text);
    return NULL;
}

// By way of another file: who reads it sees all or nothing.
int state_write(const struct state *state, const char *file, const char *text)
{
    size_t len = strlen(text);
    ssize_t n;
    char made[32];
    int fd, ret = 0;

    snprintf(made, sizeof(made), ".%s", file);
    fd = openat(state->fd, made, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    n = write(fd, text, len);
    if (n != (ssize_t)len)
        ret = n < 0 ? -errno : -ENOSPC;
    close(fd);
    if (!ret && renameat(state->fd, made, state->fd, file) < 0)
        ret = -errno;
    return ret;
}

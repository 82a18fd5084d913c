// A mount and its guard.
//
//  M1. The guard is a process of its own that waits at the end of a pipe. It unmounts when nobody has the
//      other end any more: the holder has let go, or is gone, and so are its workers, however they ended,
//      and who puts loop devices on the file (N2 of control/node.h). So there is one way to unmount, it is
//      always gone, and no loop device comes there after it was looked for one (M4).
//  M2. The guard is born before the mount and has nothing else open: it keeps no connection alive.
//  M3. What is unmounted is ours: the last mount at the path, of our type.
//  M4. Loop devices are known by the path of their file, which they lose when it is unmounted. So they are
//      looked for before that, and taken off after it, when what they still want to write fails at once.
//      Guard and supervisor may both do so (K2 of loop.h).

#include "transport/fuse/mount.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <mntent.h>
#include <paths.h>
#include <poll.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "transport/fuse/fuse.h"
#include "transport/fuse/loop.h"
#include "util/util.h"

#define MOUNT_TYPE "fuse.bight"
#define INIT_TIMEOUT_MS 10000
#define MAX_LOOPS 16  // on one file; ours is one
#define STACK_DEPTH 2 // the image may be on an overlay: the kernel's FILESYSTEM_MAX_STACK_DEPTH

// Whether the last mount at the path is one of ours.
static bool mount_is_ours(const char *path)
{
    FILE *file = setmntent("/proc/self/mounts", "re");
    struct mntent *entry;
    bool is_ours = false;

    if (!file)
        return false;
    while ((entry = getmntent(file))) {
        if (!strcmp(entry->mnt_dir, path))
            is_ours = !strcmp(entry->mnt_type, MOUNT_TYPE);
    }
    endmntent(file);
    return is_ours;
}

static void mount_undo_by_helper(const char *path)
{
    char *argv[] = {(char[]){"fusermount3"}, (char[]){"-uqz"}, (char[]){"--"}, NULL, NULL}, *env[] = {NULL};
    pid_t pid;

    argv[3] = (char *)(uintptr_t)path;
    if (!posix_spawnp(&pid, argv[0], NULL, NULL, argv, env))
        waitpid(pid, NULL, 0);
}

// M3. MNT_FORCE aborts the connection: who waits for an answer gets an error instead of waiting for ever.
static void mount_undo(const char *path)
{
    char loops[MAX_LOOPS][LOOP_DEVICE_BYTES];
    unsigned nr_loops;
    struct err err;

    if (!mount_is_ours(path))
        return;
    nr_loops = geteuid() ? 0 : loop_find(path, loops, MAX_LOOPS); // M4
    if (umount2(path, MNT_FORCE | MNT_DETACH) < 0 && errno == EPERM)
        mount_undo_by_helper(path);
    while (nr_loops--) {
        if (loop_detach(loops[nr_loops], path, true, &err) < 0)
            log_line("%s", err.line);
    }
}

// ---- The guard

static void guard_run(int pipe_fd, const char *path, bool is_created)
{
    util_wait_alone("bight-guard", pipe_fd); // M2
    mount_undo(path);                        // M1
    if (is_created)
        unlink(path);
    _exit(0);
}

static int guard_start(struct transport_hold *hold, const char *path, bool is_created, struct err *err)
{
    int fds[2];
    pid_t pid;

    if (pipe2(fds, O_CLOEXEC) < 0)
        return err_set(err, -errno, "--fuse: %s: pipe: %s", path, strerror(errno));
    pid = fork();
    if (!pid)
        guard_run(fds[0], path, is_created);
    close(fds[0]);
    if (pid < 0) {
        close(fds[1]);
        return err_set(err, -errno, "--fuse: %s: fork: %s", path, strerror(errno));
    }
    hold->facts[FUSE_FACT_GUARD] = (uint64_t)pid;
    hold->facts[FUSE_FACT_PIPE] = (uint64_t)fds[1];
    return 0;
}

static void guard_end(struct transport_hold *hold)
{
    close((int)hold->facts[FUSE_FACT_PIPE]);
    while (waitpid((pid_t)hold->facts[FUSE_FACT_GUARD], NULL, 0) < 0 && errno == EINTR)
        ;
}

// ---- FUSE_INIT

static unsigned init_max_pages(void)
{
    unsigned long max_pages = 256; // before 6.13, that was fixed
    FILE *file = fopen("/proc/sys/fs/fuse/max_pages_limit", "re");
    char text[40];

    if (file) {
        if (fgets(text, sizeof(text), file))
            max_pages = strtoul(text, NULL, 10);
        fclose(file);
    }
    return (unsigned)max_of(1, min_of(max_pages, FUSE_NR_PAGES));
}

// How many CPUs there may ever be: the kernel has a queue for each.
static unsigned init_cpus(void)
{
    FILE *file = fopen("/sys/devices/system/cpu/possible", "re");
    char text[100] = "";
    const char *last;

    if (!file)
        return 0;
    if (!fgets(text, sizeof(text), file))
        text[0] = '\0';
    fclose(file);
    last = strrchr(text, '-');
    return (unsigned)strtoul(last ? last + 1 : text, NULL, 10) + 1;
}

// Once FUSE_OVER_IO_URING is agreed on, the kernel waits for us to take it up: we must be able to. Not with
// a supervisor: what the kernel was about to put into the memory of a worker that died is lost, and no
// RESEND brings it again (6.18).
static bool init_takes_ring(const struct transport_hold_options *options)
{
    struct ring *ring;
    struct err err;

    if (options->is_supervised || !strcmp(options->ring_name, ring_threads_ops.name) ||
        ring_create(&ring_uring_ops, &ring, &err) < 0)
        return false;
    ring_destroy(ring);
    return true;
}

// Answers FUSE_INIT, the first message of every connection. 0 or a negative errno.
static int init_answer(struct transport_hold *hold, const struct transport_hold_options *options)
{
    uint64_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_INIT_EXT |
                      FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_HAS_RESEND;
    struct {
        struct fuse_in_header header;
        struct fuse_init_in in;
        char rest[FUSE_MIN_READ_BUFFER - sizeof(struct fuse_in_header) - sizeof(struct fuse_init_in)];
    } msg = {.header = {.len = 0}};
    struct {
        struct fuse_out_header header;
        struct fuse_init_out out;
    } answer;
    unsigned nr_inflight = min_of(options->nr_queues * options->depth, UINT16_MAX), max_pages;
    uint64_t flags;
    ssize_t n;

    if (poll(&(struct pollfd){.fd = hold->fd, .events = POLLIN}, 1, INIT_TIMEOUT_MS) != 1)
        return -ETIMEDOUT;
    n = read(hold->fd, &msg, sizeof(msg));
    if (n < 0)
        return -errno;
    if ((size_t)n < sizeof(msg.header) + offsetof(struct fuse_init_in, flags2) ||
        msg.header.len != (size_t)n || msg.header.opcode != FUSE_INIT)
        return -EPROTO;
    if (msg.in.major != FUSE_KERNEL_VERSION || msg.in.minor < FUSE_PROTO_MIN_MINOR)
        return -EPROTONOSUPPORT;
    flags = msg.in.flags;
    if (flags & FUSE_INIT_EXT)
        flags |= (uint64_t)msg.in.flags2 << 32;
    if ((flags & FUSE_OVER_IO_URING) && init_takes_ring(options)) {
        wanted |= FUSE_OVER_IO_URING;
        hold->facts[FUSE_FACT_CPUS] = init_cpus();
    }
    if (options->is_passthrough) {
        if (!(flags & FUSE_PASSTHROUGH))
            return -EOPNOTSUPP;
        wanted |= FUSE_PASSTHROUGH;
    }
    flags &= wanted;
    max_pages = init_max_pages();
    answer.out = (struct fuse_init_out){
        .major = FUSE_KERNEL_VERSION,
        .minor = FUSE_PROTO_MINOR,
        .max_readahead = msg.in.max_readahead,
        .flags = (uint32_t)flags,
        .flags2 = (uint32_t)(flags >> 32),
        .max_background = (uint16_t)nr_inflight,
        .congestion_threshold = (uint16_t)nr_inflight,
        .max_write = max_pages * FUSE_PAGE_BYTES,
        .max_pages = (uint16_t)max_pages,
        .time_gran = 1,
        .FUSE_INIT_STACK_DEPTH = options->is_passthrough ? STACK_DEPTH : 0,
    };
    answer.header = (struct fuse_out_header){.len = sizeof(answer), .unique = msg.header.unique};
    if (write(hold->fd, &answer, sizeof(answer)) < 0)
        return -errno;
    hold->facts[FUSE_FACT_PAYLOAD] = answer.out.max_write;
    return 0;
}

// ---- hold() and release()

// fusermount3(1) opens /dev/fuse, mounts, and sends the fd over the socket that _FUSE_COMMFD names: an
// interface that is as old as FUSE. What it says on stderr goes there.
static int mount_by_helper(const char *path, const char *options)
{
    char *argv[] = {(char[]){"fusermount3"}, (char[]){"-o"}, NULL, (char[]){"--"}, NULL, NULL};
    char *env[] = {(char[]){"_FUSE_COMMFD=3"}, NULL}, byte;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {&byte, 1};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof(control)};
    posix_spawn_file_actions_t actions;
    int fds[2], fd = -EPERM, error;
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return -errno;
    argv[2] = (char *)(uintptr_t)options;
    argv[4] = (char *)(uintptr_t)path;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fds[0], 3);
    error = posix_spawnp(&pid, argv[0], &actions, NULL, argv, env);
    posix_spawn_file_actions_destroy(&actions);
    close(fds[0]);
    if (error) {
        close(fds[1]);
        return -error;
    }
    if (recvmsg(fds[1], &msg, MSG_CMSG_CLOEXEC) > 0 && msg.msg_controllen >= sizeof(control) &&
        control.header.cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(&control.header), sizeof(fd));
    close(fds[1]);
    waitpid(pid, NULL, 0);
    return fd;
}

// Mounts on the regular file. The fd or a negative errno.
static int mount_open(const char *path, bool is_read_only)
{
    unsigned long flags = MS_NOSUID | MS_NODEV | (is_read_only ? MS_RDONLY : 0UL);
    char options[200];
    int fd, ret = 0;

    if (geteuid())
        return mount_by_helper(path,
                               is_read_only ? "fsname=bight,subtype=bight,ro" : "fsname=bight,subtype=bight");
    fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    snprintf(options, sizeof(options),
             "fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other,default_permissions", fd, (unsigned)S_IFREG);
    if (mount("bight", path, MOUNT_TYPE, flags, options) < 0) {
        ret = -errno;
        close(fd);
    }
    return ret < 0 ? ret : fd;
}

// Whether this process has mounted there. Until it serves that, even stat(2) of it would wait for ever.
static bool mount_is_held(const char *path, const struct transport_holds *holds)
{
    char held[PATH_MAX];

    for (unsigned i = 0; i < holds->nr_holds; i++) {
        if (holds->holds[i].ops == &fuse_transport_ops && realpath(holds->holds[i].addr, held) &&
            !strcmp(held, path))
            return true;
    }
    return false;
}

// The file to be mounted over; it is made where there is none. What a server that is gone left mounted is
// unmounted. 1: it was made. Else 0 or a negative errno.
static int mount_point(char *path, const char *addr, const struct transport_hold_options *options,
                       struct err *err)
{
    int fd = open(addr, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600), is_created = fd >= 0;
    struct stat st, image;

    if (is_created)
        close(fd);
    else if (errno != EEXIST)
        return err_set(err, -errno, "--fuse: %s: %s; name a file where you may create one", addr,
                       strerror(errno));
    if (!realpath(addr, path))
        return err_set(err, -errno, "--fuse: %s: %s; name a file", addr, strerror(errno));
    if (mount_is_held(path, options->holds))
        return err_set(err, -EBUSY, "--fuse: %s: is named twice; name another file", addr);
    if (stat(path, &st) < 0 && errno == ENOTCONN)
        mount_undo(path);
    if (stat(path, &st) < 0)
        return err_set(err, -errno, "--fuse: %s: %s; unmount what is there, or name another file", addr,
                       strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err_set(err, -EINVAL, "--fuse: %s: is no regular file; name one, or a path that is not there",
                       addr);
    if (mount_is_ours(path))
        return err_set(err, -EBUSY, "--fuse: %s: is a device of bight already; name another file", addr);
    for (unsigned i = 0; i < options->nr_images; i++) {
        if (!stat(options->images[i], &image) && image.st_dev == st.st_dev && image.st_ino == st.st_ino)
            return err_set(err, -EBUSY, "--fuse: %s: is the image itself; name another file", addr);
    }
    return is_created;
}

int fuse_hold(struct transport_hold *hold, const struct transport_hold_options *options, struct err *err)
{
    char path[PATH_MAX];
    bool is_created;
    int ret;

    // fusermount3(1) mounts without it, but unmounts only what it finds there: M1.
    if (geteuid() && access(_PATH_MOUNTED, R_OK) < 0)
        return err_set(err, -errno,
                       "--fuse: %s: fusermount3 needs " _PATH_MOUNTED
                       " to unmount it: %s; link that to /proc/self/mounts, or use --nbd",
                       hold->addr, strerror(errno));
    ret = mount_point(path, hold->addr, options, err);
    if (ret < 0)
        return ret;
    // Inherited by every thread and worker from here on: fuse.h F4.
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    is_created = ret == 1;
    ret = guard_start(hold, path, is_created, err);
    if (ret < 0) {
        if (is_created)
            unlink(path);
        return ret;
    }
    hold->fd = mount_open(path, options->is_read_only);
    if (hold->fd < 0) {
        ret = err_set(err, hold->fd, "--fuse: %s: mounting: %s; use --nbd where FUSE cannot be had",
                      hold->addr, strerror(-hold->fd));
        hold->fd = -1;
        goto out_guard;
    }
    ret = init_answer(hold, options);
    if (ret == -EOPNOTSUPP) {
        err_set(err, ret, "--passthrough: this kernel's FUSE has none (Linux 6.9 brought it); leave it out");
        goto out_close;
    }
    if (ret < 0 || fcntl(hold->fd, F_SETFL, O_NONBLOCK) < 0) {
        ret = err_set(err, ret < 0 ? ret : -errno, "--fuse: %s: FUSE_INIT: %s; use --nbd", hold->addr,
                      strerror(ret < 0 ? -ret : errno));
        goto out_close;
    }
    return 0;

out_close:
    close(hold->fd);
    hold->fd = -1;
out_guard:
    guard_end(hold);
    return ret;
}

void fuse_release(struct transport_hold *hold)
{
    if (hold->fd < 0) { // M1: the guard is at it, or was killed as well
        mount_undo(hold->addr);
        return;
    }
    close(hold->fd); // the last one of the connection: who waits for an answer gets an error
    guard_end(hold);
    mount_undo(hold->addr); // the guard may have been killed
}

#include "control/node.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/partitions.h"
#include "util/util.h"

// To the process and back: one datagram each.
struct node_job {
    enum node_op what;
    char device[LOOP_DEVICE_BYTES];
    struct loop_options options;
    int ret;
    struct err err;
};

struct node_work {
    struct ring_op op; // posted by the thread
    pthread_t thread;
    struct node *node;
    struct node_job job;
    void (*done)(void *arg, int error, const struct err *err);
    void *arg;
};

// is_reread: and drops what is cached of it.
static int node_tell(const char *device, bool is_read_only, bool is_reread, struct err *err)
{
    int fd = open(device, O_RDONLY | O_CLOEXEC), value = is_read_only, ret = 0;

    if (fd < 0)
        return err_set(err, -errno, "%s: %s", device, strerror(errno));
    if (ioctl(fd, BLKROSET, &value) < 0 || (is_reread && ioctl(fd, BLKFLSBUF) < 0))
        ret = err_set(err, -errno, "%s: telling it of a change: %s", device, strerror(errno));
    close(fd);
    return ret;
}

static int job_do(struct node_job *job, const char *path)
{
    struct stat st;
    int ret;

    switch (job->what) {
    case NODE_ATTACH:
        ret = loop_attach(job->device, path, &job->options, &job->err);
        break;
    case NODE_RESIZE:
        (void)!stat(path, &st); // the kernel asks us for the size
        ret = loop_resize(job->device, &job->err);
        break;
    case NODE_REREAD:
        ret = node_tell(job->device, job->options.is_read_only, true, &job->err);
        break;
    case NODE_READ_ONLY:
        return node_tell(job->device, job->options.is_read_only, false, &job->err);
    default:
        return loop_detach(job->device, path, job->what == NODE_DETACH_LAZY, &job->err);
    }
    // A disk whose table is damaged is there all the same, to be repaired.
    if (!ret && job->options.is_partscan && partitions_update(job->device, &job->err) < 0)
        log_line("%s", job->err.line);
    return ret;
}

static void process_run(int fd, const char *path, int guard_fd)
{
    struct node_job job;
    sigset_t all;

    prctl(PR_SET_NAME, "bight-node");
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL); // it ends with the worker, not before
    dup2(fd, STDIN_FILENO);
    dup2(guard_fd, STDOUT_FILENO);
    close_range(STDERR_FILENO + 1, ~0U, 0); // N2
    while (recv(STDIN_FILENO, &job, sizeof(job), 0) == sizeof(job)) {
        job.ret = job_do(&job, path);
        if (send(STDIN_FILENO, &job, sizeof(job), MSG_NOSIGNAL) < 0 && job.what == NODE_ATTACH && !job.ret)
            loop_detach(job.device, path, true, &job.err); // nobody will ever know of it
    }
    _exit(0);
}

int node_start_process(const char *path, int guard_fd)
{
    int fds[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
        return -1;
    pid = fork();
    if (!pid)
        process_run(fds[0], path, guard_fd);
    close(fds[0]);
    if (pid > 0)
        return fds[1];
    close(fds[1]);
    return -1;
}

static int node_work(struct node_work *work)
{
    struct node *node = work->node;
    struct node_job *job = &work->job;

    pthread_mutex_lock(&node->lock);
    if (node->process_fd < 0 || send(node->process_fd, job, sizeof(*job), MSG_NOSIGNAL) < 0)
        job->ret = job_do(job, node->path); // it could not be had, or was killed
    else if (recv(node->process_fd, job, sizeof(*job), 0) != sizeof(*job))
        job->ret =
            err_set(&job->err, -EIO, "%s: bight-node was killed; detach it, and attach it again", node->path);
    pthread_mutex_unlock(&node->lock);
    return job->ret;
}

static void *node_main(void *arg)
{
    struct node_work *work = arg;

    ring_post(work->node->ring, &work->op, node_work(work));
    return NULL;
}

static void node_work_done(struct ring_op *op, int res)
{
    struct node_work *work = container_of(op, struct node_work, op);
    struct node *node = work->node;

    pthread_join(work->thread, NULL); // R5: it is past its post
    if (work->job.what == NODE_ATTACH && !res)
        memcpy(node->device, work->job.device, sizeof(node->device));
    if (work->job.what == NODE_DETACH && !res)
        node->device[0] = '\0';
    --*node->nr_pending;
    work->done(work->arg, res, &work->job.err);
    free(work);
}

void node_do(struct node *node, enum node_op op, void (*done)(void *arg, int error, const struct err *err),
             void *arg)
{
    struct node_work *work;
    int ret;

    if (op != NODE_ATTACH && !node->device[0]) {
        done(arg, 0, NULL);
        return;
    }
    work = calloc(1, sizeof(*work));
    if (!work) {
        done(arg, -ENOMEM, &(struct err){.line = "out of memory"});
        return;
    }
    work->op = (struct ring_op){.done = node_work_done};
    work->node = node;
    work->job.what = op;
    work->job.options = node->options;
    work->done = done;
    work->arg = arg;
    memcpy(work->job.device, node->device, sizeof(work->job.device));
    ret = -pthread_create(&work->thread, NULL, node_main, work);
    if (ret < 0) {
        done(arg, ret, &(struct err){.line = "no thread for it"});
        free(work);
        return;
    }
    ++*node->nr_pending; // before the ring can see the post: this is its thread
}

bool node_is_there(const char *device, const char *path)
{
    char backing[PATH_MAX];

    return !loop_backing_file(device, backing, sizeof(backing)) && !strcmp(backing, path);
}

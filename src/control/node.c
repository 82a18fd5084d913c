#include "control/node.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/partitions.h"
#include "util/util.h"

struct node_work {
    struct ring_op op; // posted by the thread
    pthread_t thread;
    struct node *node;
    enum node_op what;
    char device[LOOP_DEVICE_BYTES];
    bool is_read_only;
    struct err err;
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

static int node_work(struct node_work *work)
{
    struct stat st;
    int ret;

    switch (work->what) {
    case NODE_ATTACH:
        ret = loop_attach(work->device, work->node->path, &work->node->options, &work->err);
        break;
    case NODE_RESIZE:
        (void)!stat(work->node->path, &st); // the kernel asks us for the size
        ret = loop_resize(work->device, &work->err);
        break;
    case NODE_REREAD:
        ret = node_tell(work->device, work->is_read_only, true, &work->err);
        break;
    case NODE_READ_ONLY:
        return node_tell(work->device, work->is_read_only, false, &work->err);
    default:
        return loop_detach(work->device, work->node->path, work->what == NODE_DETACH_LAZY, &work->err);
    }
    // A disk whose table is damaged is there all the same, to be repaired.
    if (!ret && work->node->options.is_partscan && partitions_update(work->device, &work->err) < 0)
        log_line("%s", work->err.line);
    return ret;
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
    if (work->what == NODE_ATTACH && !res)
        memcpy(node->device, work->device, sizeof(node->device));
    if (work->what == NODE_DETACH && !res)
        node->device[0] = '\0';
    --*node->nr_pending;
    work->done(work->arg, res, &work->err);
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
    work->what = op;
    work->is_read_only = node->options.is_read_only;
    work->done = done;
    work->arg = arg;
    memcpy(work->device, node->device, sizeof(work->device));
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
